"""The U-Net and the scheduler of a training run."""

import torch

from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.pipelines.guidance import mark_null_class
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.run_data import with_num_classes


def build(config: TrainingConfig) -> tuple[UNet2DModelCustom, DDPMSchedulerCustom]:
    """The U-Net and the scheduler that a configuration describes."""
    return build_unet(config), build_scheduler(config)


def check_builds(config: TrainingConfig) -> None:
    """Build the network without memory, and the scheduler. Raises ValueError, naming the option, if that is not possible."""
    build_scheduler(config)
    with torch.device("meta"):
        build_unet(with_num_classes(config, None))


def build_scheduler(config: TrainingConfig) -> DDPMSchedulerCustom:
    """The scheduler with the chain of a run."""
    names = ("num_train_timesteps", "beta_schedule", "rescale_betas_zero_snr", "prediction_type", "variance_type")
    return DDPMSchedulerCustom(**{name: getattr(config, name) for name in names})


def build_unet(config: TrainingConfig) -> UNet2DModelCustom:
    """A U-Net with torch's default initialization, except for DDPM's zero-initialized outputs.

    If labels are dropped in training, the class after the data set's classes is marked as the null class.
    """
    names = (
        "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim",
        "norm_num_groups", "dropout", "resnet_time_scale_shift", "class_embed_type", "num_class_embeds",
    )  # fmt: skip
    height, width = config.resolution
    unet = UNet2DModelCustom(
        sample_size=height if height == width else (height, width),
        in_channels=config.channels,
        out_channels=config.channels * (2 if config.variance_type == "learned_range" else 1),
        # The original DDPM code differs from the defaults of diffusers in these.
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        zero_init_output=True,
        # With "scale_shift", diffusers omits the normalization before attention by default; Improved DDPM has it.
        attn_norm_num_groups=config.norm_num_groups if config.resnet_time_scale_shift == "scale_shift" else None,
        **{name: getattr(config, name) for name in names},
    )
    if config.label_dropout:
        mark_null_class(unet)
    return unet
