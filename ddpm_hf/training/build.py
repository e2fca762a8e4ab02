"""The U-Net and the scheduler of a training run."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.diffusion.distillation import DistillationObjective
from ddpm_hf.diffusion.losses import Loss
from ddpm_hf.pipelines.guidance import mark_null_class
from ddpm_hf.pipelines.loading import load_unet
from ddpm_hf.schedulers.samplers import distilled_sampler
from ddpm_hf.training.base_model import DIFFUSION, NETWORK, base_folder, network_arguments, scheduler_arguments
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.run_data import with_num_classes


def build(config: TrainingConfig) -> tuple[UNet2DModelCustom, DDPMSchedulerCustom | DDIMSchedulerCustom]:
    """The U-Net and the scheduler that a configuration describes."""
    return build_unet(config), build_scheduler(config)


def check_builds(config: TrainingConfig) -> None:
    """Build the network without memory, and the scheduler. Raises ValueError, naming the option, if that is not possible."""
    build_scheduler(config)
    with torch.device("meta"):
        unet = build_unet(with_num_classes(config, None))
    if config.distill_steps is not None:
        teacher = network_arguments(config.init_from)
        for name in ("class_embed_type", "num_class_embeds"):
            if (mine := unet.config[name]) != teacher[name]:
                labels = f"label_column = {config.label_column!r}, label_dropout = {config.label_dropout} and {name} = {mine}"
                raise ValueError(
                    f"a teacher must know the labels of the run: it has {name} = {teacher[name]}, got {labels}."
                )


def build_scheduler(config: TrainingConfig) -> DDPMSchedulerCustom | DDIMSchedulerCustom:
    """The scheduler with the chain of a run: of a distilled model, DDIM with the number of its steps.

    The bound is trained without clipping the predicted x_0, which would have no gradient, so its chain does not clip either:
    the lowest and highest level of the decoder L_0 extend to infinity, and a prediction beyond them is the better one.
    """
    base = {} if config.init_from is None else scheduler_arguments(config.init_from)
    if config.loss_weighting == "vlb":
        base = base | {"clip_sample": False}
    scheduler = DDPMSchedulerCustom(**base | {name: getattr(config, name) for name in DIFFUSION})
    return scheduler if config.distill_steps is None else distilled_sampler(scheduler, config.distill_steps)


def build_loss_function(
    config: TrainingConfig, accelerator: Accelerator, scheduler: DDPMSchedulerCustom | DDIMSchedulerCustom
) -> Callable[..., Loss]:
    """The loss to minimize. That of distillation holds the teacher, on the device and in the precision of the run."""
    if config.distill_steps is None:
        return config.objective
    teacher = load_unet(base_folder(config.init_from), config.init_from).eval().requires_grad_(False)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    return DistillationObjective(teacher, scheduler.diffusion, config.distill_steps, scheduler.clip)


def build_unet(config: TrainingConfig) -> UNet2DModelCustom:
    """A U-Net with torch's default initialization, except for DDPM's zero-initialized outputs.

    If labels are dropped in training, the class after the data set's classes is marked as the null class.
    """
    height, width = config.resolution
    # With "scale_shift", diffusers omits the normalization before attention by default; Improved DDPM has it.
    normalizes = config.resnet_time_scale_shift == "scale_shift"
    own = {"attn_norm_num_groups": config.norm_num_groups if normalizes else None}
    base = own if config.init_from is None else network_arguments(config.init_from)
    arguments = {name: getattr(config, name) for name in NETWORK} | {
        "sample_size": height if height == width else (height, width),
        "in_channels": config.channels,
        "out_channels": config.channels * (2 if config.variance_type == "learned_range" else 1),
        "dropout": config.dropout,
        "num_class_embeds": config.num_class_embeds,
        "zero_init_output": True,
    }
    unet = UNet2DModelCustom(**base | arguments)
    if config.label_dropout:
        mark_null_class(unet)
    return unet
