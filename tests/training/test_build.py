"""The U-Net and the scheduler that a configuration describes."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_hf.pipelines.guidance import null_class_of
from ddpm_hf.training.build import build, build_unet
from ddpm_hf.training.presets import parse_config
from tests.conftest import TINY_TRAINING, flags


def make_config(*options):
    return parse_config([*flags(**TINY_TRAINING, total_images=192), *options])


@pytest.mark.parametrize(("weighting", "clips"), [("simple", True), ("vlb", False)])
def test_the_chain_of_the_bound_does_not_clip(weighting, clips):
    assert build(make_config("--loss_weighting", weighting))[1].config.clip_sample is clips


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_the_output_has_the_shape_of_the_images_and_starts_at_zero(variance_type):
    options = ["--resolution", "16", "8", "--channels", "3", "--variance_type", variance_type]
    unet, scheduler = build(make_config(*options))
    output = unet(torch.randn(2, 3, 16, 8), torch.tensor([0, 999])).sample
    assert output.shape == (2, 6 if variance_type == "learned_range" else 3, 16, 8) and not output.any()
    assert scheduler.config.variance_type == variance_type
    assert unet.config.sample_size == (16, 8)


def test_only_outputs_of_blocks_and_network_are_zero_initialized():
    unet = build_unet(make_config())
    zero = {name.rsplit(".", 2)[-2] for name, p in unet.named_parameters() if name.endswith("weight") and not p.any()}
    assert zero == {"conv2", "0", "conv_out"}  # of residual blocks, of attention (to_out.0), of the network


def test_the_scheduler_has_the_options_of_the_configuration():
    options = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    _, scheduler = build(make_config(*flags(**options)))
    assert {name: scheduler.config[name] for name in options} == options


@pytest.mark.parametrize(
    "options",
    [
        {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0},
        {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    ],
)
def test_the_network_has_the_conventions_of_the_configuration(options):
    unet = build_unet(make_config(*flags(**options)))
    assert {name: unet.config[name] for name in options} == options


def test_a_freq_shift_without_frequencies_left_is_refused():
    with pytest.raises(ValueError, match="freq_shift must be less than half of block_out_channels"):
        make_config("--freq_shift", "4")


def test_the_range_of_a_schedule_and_betas_themselves_are_options():
    betas = [0.1, 0.2, 0.5, 0.9]
    chain = ["--num_train_timesteps", "4", "--sample_steps", "4"]
    _, scheduler = build(make_config(*chain, "--trained_betas", *map(str, betas)))
    assert scheduler.diffusion.betas.tolist() == betas
    _, scheduler = build(make_config(*chain, "--beta_start", "0.1", "--beta_end", "0.4"))
    torch.testing.assert_close(scheduler.diffusion.betas, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))


def test_betas_must_be_as_many_as_the_steps_of_the_chain():
    with pytest.raises(ValueError, match="trained_betas.*4"):
        make_config("--num_train_timesteps", "4", "--sample_steps", "4", "--trained_betas", "0.1", "0.2")


def test_rescaled_betas_end_the_chain_in_pure_noise():
    _, scheduler = build(make_config("--rescale_betas_zero_snr", "--prediction_type", "v_prediction"))
    stock = DDPMScheduler(rescale_betas_zero_snr=True)
    assert scheduler.diffusion.alphas_cumprod[-1] == 0 and scheduler.config.rescale_betas_zero_snr
    torch.testing.assert_close(scheduler.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-6)


def test_the_null_class_follows_the_classes_if_labels_are_dropped():
    labels = ["--label_column", "label", "--num_classes", "10"]
    with_null = build_unet(make_config(*labels, "--label_dropout", "0.1"))
    assert (with_null.config.num_class_embeds, null_class_of(with_null)) == (11, 10)
    without = build_unet(make_config(*labels))
    assert (without.config.num_class_embeds, null_class_of(without)) == (10, None)


@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_attention_is_normalized_with_either_time_embedding(shift):
    options = ["--down_block_types", "AttnDownBlock2D", "DownBlock2D", "--up_block_types", "UpBlock2D", "AttnUpBlock2D"]
    options += ["--norm_num_groups", "4", "--resnet_time_scale_shift", shift]
    attention = [m for m in build_unet(make_config(*options)).modules() if hasattr(m, "to_q")]
    assert attention and all(m.group_norm.num_groups == 4 for m in attention)
