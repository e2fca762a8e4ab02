"""Options of a conversion that do not fit the source are refused by name."""

import pytest

from ddpm_hf.convert.options import ConvertOptions

WHERE = {"checkpoint": "c.pt", "output_dir": "out", "resolution": 32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "stylegan"}, "source must be one of .*improved-diffusion.* got 'stylegan'"),
        ({"source": "ddpm-torch", "num_heads": 4}, "num_heads = 4 is for improved-diffusion and guided-diffusion only"),
        ({"source": "pytorch-ddpm", "rescale_timesteps": True}, "rescale_timesteps = True is for improved-diffusion"),
        ({"source": "improved-diffusion"}, "improved-diffusion needs num_heads or num_head_channels"),
        ({"source": "guided-diffusion", "num_heads": 4, "num_head_channels": 64}, "got num_heads = 4 and"),
        ({"source": "improved-diffusion", "num_head_channels": 64}, "are for guided-diffusion only"),
        ({"source": "improved-diffusion", "num_heads": 4, "num_train_timesteps": 1500}, "a multiple of 1000"),
        ({"source": "improved-diffusion", "num_heads": 4, "num_train_timesteps": 100}, "a multiple of 1000"),
        ({"source": "ddpm-torch", "noise_schedule": "sigmoid"}, "noise_schedule must be one of .* got 'sigmoid'"),
    ],
)
def test_options_that_do_not_fit_the_source_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvertOptions(**WHERE, **options)


@pytest.mark.parametrize(
    ("source", "T", "rescale", "told"),
    [
        ("improved-diffusion", 4000, None, True),
        ("improved-diffusion", 4000, False, False),
        ("improved-diffusion", 1000, None, False),
        ("guided-diffusion", 4000, None, False),
        ("guided-diffusion", 4000, True, True),
    ],
)
def test_other_timesteps_are_told_as_by_default_in_the_source(source, T, rescale, told):
    options = ConvertOptions(**WHERE, source=source, num_heads=4, num_train_timesteps=T, rescale_timesteps=rescale)
    assert options.is_told_other_timesteps == told
