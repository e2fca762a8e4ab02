"""The network and the scheduler of a run."""

from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.pipelines.guidance import mark_null_class
from ddpm_hf.training.config import TrainingConfig


def build(config: TrainingConfig) -> tuple[UNet2DModelCustom, DDPMSchedulerCustom]:
    """The network and the scheduler that a configuration describes."""
    scheduler = DDPMSchedulerCustom(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
    )
    return build_unet(config), scheduler


def build_unet(config: TrainingConfig) -> UNet2DModelCustom:
    """The network, its output layers initialized to zero as in DDPM. With `label_dropout` its last class is the null class."""
    names = (
        "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim",
        "norm_num_groups", "dropout", "resnet_time_scale_shift",
    )  # fmt: skip
    height, width = config.resolution
    unet = UNet2DModelCustom(
        sample_size=height if height == width else (height, width),
        in_channels=config.channels,
        out_channels=config.channels * (2 if config.variance_type == "learned_range" else 1),
        # Details in which the original code differs from diffusers' defaults.
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        zero_init_output=True,
        # diffusers leaves this norm out with "scale_shift", unless told; no paper's network does.
        attn_norm_num_groups=config.norm_num_groups if config.resnet_time_scale_shift == "scale_shift" else None,
        num_class_embeds=config.num_class_embeds,
        **{name: getattr(config, name) for name in names},
    )
    if config.label_dropout:
        mark_null_class(unet)
    return unet
