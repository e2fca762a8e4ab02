"""Image editing. Tests of moments use the exact network of Gaussian data (`tests.gaussian_unet`)."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.pipelines.editing import denoise_image, image_to_image, inpaint, interpolate, repaint_levels
from ddpm_hf.pipelines.inversion import decode, encode, interpolate_seeds
from ddpm_hf.schedulers.samplers import make_sampler
from tests.gaussian_unet import MEAN, STD, gaussian_pipeline
from tests.pipelines.helpers import ROUNDING, edits, spoil, to_unit

# ---------------------------------------------------------------------- image to image, interpolation


def test_interpolation_ends_are_image_to_image_of_either_image(tiny_pipeline, photos):
    one, other = photos[:1], photos[1:]
    ends = interpolate(tiny_pipeline, one, other, 9, [0.0, 1.0], seed=4, output_type="pt")
    for image, end in zip((one, other), ends, strict=True):
        assert torch.equal(end, image_to_image(tiny_pipeline, image, 9, seed=4, output_type="pt"))
    assert (ends[0] - ends[1]).abs().max() > 0.01


def test_interpolated_images_have_the_moments_of_the_data():
    """Any mixture of two images of the data's mean is that mean; sampled from it, images have the data's moments."""
    pipe = gaussian_pipeline()
    flat = torch.full((2, 1, 64, 64), MEAN)
    for mixed in interpolate(pipe, flat, flat, 600, [0.3, 0.5], 100, seed=0, output_type="pt"):
        assert (2 * mixed - 1).mean().item() == pytest.approx(MEAN, abs=0.01)
    t, bar = 600, pipe.scheduler.diffusion.alphas_cumprod[600].item()
    assert bar < 0.03, t  # so little of the image is left at t that the variance is the data's
    assert (2 * mixed - 1).std().item() == pytest.approx(STD, rel=0.15)


def test_less_noise_keeps_more_of_the_image(gaussian_images):
    pipe = gaussian_pipeline()
    kept = [
        (2 * image_to_image(pipe, gaussian_images, t, min(t + 1, 100), seed=1, output_type="pt") - 1 - gaussian_images)
        .std()
        .item()
        for t in (0, 50, 999)
    ]
    assert kept == sorted(kept) and kept[0] < 0.02
    assert kept[-1] == pytest.approx(math.sqrt(2) * STD, rel=0.2)  # from pure noise: an unrelated image


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("strength", [0.05, 0.2, 0.3, 0.5, 0.99, 1.0])
def test_strength_runs_the_timesteps_that_diffusers_runs(tiny_pipeline, scheduler_config, photos, steps, strength):
    stock = SimpleNamespace(scheduler=DDPMScheduler(**scheduler_config, timestep_spacing="trailing"))
    stock.scheduler.set_timesteps(steps)
    expected = StableDiffusionImg2ImgPipeline.get_timesteps(stock, steps, strength, "cpu")[0].tolist()
    visited = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda module, args: visited.append(int(args[1])))
    if not expected:
        with pytest.raises(ValueError, match="strength must leave a step to run, at least"):
            image_to_image(tiny_pipeline, photos, strength=strength, num_inference_steps=steps, seed=0)
        return
    image_to_image(tiny_pipeline, photos, strength=strength, num_inference_steps=steps, seed=0)
    assert visited == expected
    interpolate(tiny_pipeline, photos, photos, None, [0.5], steps, strength=strength)
    assert visited == 2 * expected


# ---------------------------------------------------------------------- denoising


def test_one_step_gives_the_posterior_mean_of_a_noisy_image(gaussian_images):
    std = 0.3
    noisy = gaussian_images + std * torch.randn(gaussian_images.shape, generator=torch.Generator().manual_seed(9))
    clean = 2 * denoise_image(gaussian_pipeline(), noisy, std, 1, seed=0, output_type="pt") - 1
    expected = MEAN + STD**2 / (STD**2 + std**2) * (noisy - MEAN)
    # The noise level of the timestep is up to 2 % higher; the difference is added as noise.
    assert (clean - expected.clamp(-1, 1)).std() < 0.03
    assert (clean - gaussian_images).std() < 0.6 * std


def test_denoised_samples_have_the_datas_variance_at_the_right_level(gaussian_images):
    pipe, std = gaussian_pipeline(), 0.3
    noisy = gaussian_images + std * torch.randn(gaussian_images.shape, generator=torch.Generator().manual_seed(9))
    for level, factor in ((std, 1.0), (std / 3, None)):
        x = 2 * denoise_image(pipe, noisy, level, seed=0, output_type="pt") - 1
        if factor is not None:
            assert x.std().item() == pytest.approx(STD, rel=0.05)
        else:
            assert x.std() > 1.2 * STD


def test_any_noise_can_be_removed_with_zero_terminal_snr(make_pipeline, scheduler_config, photos):
    pipe = make_pipeline(DDPMSchedulerCustom(**scheduler_config, rescale_betas_zero_snr=True))
    levels = pipe.scheduler.diffusion.sqrt_recipm1_alphas_cumprod
    assert levels[-1].isinf()
    noisy = 2 * levels[-2].item() * torch.randn_like(photos)
    assert denoise_image(pipe, noisy, 2 * levels[-2].item(), 3, seed=0, output_type="np").min() >= 0  # false for NaN


# ---------------------------------------------------------------------- inpainting


@pytest.mark.parametrize("jumps", [(1, 1), (3, 2)])
def test_inpainting_changes_only_the_masked_pixels(tiny_pipeline, photos, jumps):
    mask = torch.zeros(8, 8)
    mask[2:5, 3:] = 1
    result = inpaint(tiny_pipeline, photos, mask, 7, *jumps, seed=0, output_type="pt")
    known = (mask == 0).expand_as(photos)
    assert torch.equal(result[known], to_unit(photos)[known])
    assert (result[~known] - to_unit(photos)[~known]).abs().mean() > 0.02
    alone = inpaint(tiny_pipeline, photos[:1], mask, 7, *jumps, seed=0, output_type="pt")
    torch.testing.assert_close(alone[0], result[0], rtol=0, atol=ROUNDING)


def test_inpainted_pixels_have_the_moments_of_the_data(gaussian_images):
    """Pixels of this data are independent, so the known pixels must not influence the new ones."""
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    black = torch.full_like(gaussian_images, -1)
    new = 2 * inpaint(gaussian_pipeline(), black, mask, 100, 10, 2, seed=0, output_type="pt")[..., 32:] - 1
    assert new.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert new.std().item() == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize("jumps, step", [((1, 1), "3 of 5"), ((2, 2), "7 of 13")])
def test_editing_names_the_step_at_which_images_became_nan(tiny_pipeline, photos, jumps, step):
    """5 timesteps: 19 15 11 7 3, levels 4 to 0. Timestep 11 is first left for level 1 after 4 3 2, or after 4 3 2 3 4 3 2."""
    spoil(tiny_pipeline.unet, float("nan"), from_timestep=11, images=(1,))
    mask = torch.ones(8, 8)
    message = rf"in 1 of 2 images \(number 1 of the batch\), from step {step} on \(timestep 11\)"
    with pytest.raises(ValueError, match=message):
        inpaint(tiny_pipeline, photos, mask, 5, *jumps, seed=0)
    with pytest.raises(ValueError, match=r"from step 5 of 16 on \(timestep 11\)"):
        image_to_image(tiny_pipeline, photos, 15, seed=0)


def test_inpainting_with_an_empty_or_a_full_mask(tiny_pipeline, photos):
    result = inpaint(tiny_pipeline, photos, torch.zeros(8, 8), 3, 1, 1, seed=0, output_type="pt")
    assert torch.equal(result, to_unit(photos))
    other = inpaint(tiny_pipeline, -photos, torch.ones(8, 8), 3, 1, 1, seed=0, output_type="pt")
    assert torch.equal(other, inpaint(tiny_pipeline, photos, torch.ones(8, 8), 3, 1, 1, seed=0, output_type="pt"))


def test_repaint_levels_repeat_each_stretch_as_often_as_asked():
    assert list(repaint_levels(5, 1, 1)) == [4, 3, 2, 1, 0, -1]
    assert list(repaint_levels(4, 2, 2)) == [3, 2, 1, 0, 1, 2, 1, 0, -1]
    levels = list(repaint_levels(250, 10, 10))
    assert levels[0] == 249 and levels[-1] == -1
    assert all(abs(a - b) == 1 for a, b in zip(levels, levels[1:]))
    # Each of the 24 jumps is made 9 times, 10 steps up and 10 down.
    assert len(levels) == 251 + 24 * 9 * 20


# ---------------------------------------------------------------------- all functions, those of inversion included


CALLS = edits(9, 3, 2, (3, 1, 1))


each = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each
def test_results_do_not_depend_on_the_class_of_the_scheduler(make_pipeline, photos, call):
    pipe = make_pipeline()
    expected = call(pipe, photos, output_type="pt")
    pipe.scheduler = make_sampler("dpmsolver++", pipe.scheduler)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    torch.testing.assert_close(call(pipe, photos, output_type="pt"), expected, rtol=0, atol=ROUNDING)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler) and not pipe.unet.training


@each
def test_labels_and_output_types_are_those_of_a_call(make_pipeline, photos, call):
    pipe = make_pipeline(num_class_embeds=4)
    one, other = (call(pipe, photos, output_type="np", class_labels=label) for label in (0, 2))
    assert one.shape == (2, 8, 8, 3) and abs(one - other).max() > 1e-4
    assert call(pipe, photos, class_labels=[0, 1])[1].size == (8, 8)
    with pytest.raises(ValueError, match="class_labels"):
        call(pipe, photos)


@each
@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda x: (x * 127.5).round().to(torch.int16), TypeError, "int16"),
        (lambda x: x[0], ValueError, r"\(B, 3, H, W\)"),
        (lambda x: x[:, :1], ValueError, r"\(2, 1, 8, 8\)"),
        (lambda x: x[..., :7], ValueError, "multiples of 2"),
        (lambda x: x[:0], ValueError, r"\(0, 3, 8, 8\)"),
    ],
)
def test_wrong_images_are_refused_before_the_first_step(tiny_pipeline, photos, call, change, kind, named):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(kind, match=named):
        call(tiny_pipeline, change(photos))
    with pytest.raises(ValueError, match="output_type"):
        call(tiny_pipeline, photos, output_type="jpeg")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda p, x: image_to_image(p, x * 100, 3), r"images must lie in \[-1, 1\]"),
        (lambda p, x: image_to_image(p, x, 20), "timestep.*0..19.*20"),
        (lambda p, x: image_to_image(p, x, 3, 5), "num_inference_steps.*1..4.*5"),
        (lambda p, x: image_to_image(p, x, 3, generator=[torch.Generator()]), "generator"),
        (lambda p, x: image_to_image(p, x), "give one of timestep and strength"),
        (lambda p, x: image_to_image(p, x, 3, strength=0.5), "give one of timestep and strength"),
        (lambda p, x: image_to_image(p, x, strength=1.5), r"strength.*\(0, 1\].*1.5"),
        (lambda p, x: interpolate(p, x, x, strength="a"), "strength"),
        (lambda p, x: interpolate(p, x, x[:1], 3), "others"),
        (lambda p, x: interpolate(p, x, x, 3, [1.5]), "weights"),
        (lambda p, x: interpolate_seeds(p, 0, -1), "seeds"),
        (lambda p, x: denoise_image(p, x, 0.0), "noise_std"),
        (lambda p, x: denoise_image(p, x, 1e9), "noise_std"),
        (lambda p, x: inpaint(p, x, torch.ones(4, 4)), "mask"),
        (lambda p, x: inpaint(p, x, torch.full((8, 8), 0.5)), "mask"),
        (lambda p, x: inpaint(p, x, torch.ones(8, 8), jump_length=0), "jump_length"),
        (lambda p, x: encode(p, x, iterations=0), "iterations"),
        (lambda p, x: decode(p, x[0]), "latents"),
    ],
)
def test_other_wrong_arguments_are_refused_by_name(tiny_pipeline, photos, call, named):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=named):
        call(tiny_pipeline, photos)
