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
