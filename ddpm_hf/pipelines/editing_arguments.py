"""What the functions on images that are there have in common: their checks, their chains, their noise."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.diffusion.timesteps import spaced_timesteps
from ddpm_hf.pipelines.arguments import Generators, check_scheduler, check_size
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import Denoiser, make_denoiser


def denoiser_of(pipe: DDPMPipelineCustom, batch_size: int, condition: dict) -> Denoiser:
    """The network with labels and guidance, the scheduler being one that can run it."""
    check_scheduler(pipe.unet, pipe.scheduler, pipe._trained_T)
    return make_denoiser(pipe.unet, batch_size, pipe._execution_device, **condition)


def noise_for(pipe: DDPMPipelineCustom, like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """z ~ N(0, 1) of the shape of `like`, float32, where the pipeline computes."""
    return randn_tensor(tuple(like.shape), generator=generator, device=pipe._execution_device, dtype=torch.float32)


def chain_from(pipe: DDPMPipelineCustom, timestep: int, num_inference_steps: int | None) -> list[int]:
    """`num_inference_steps` timesteps from `timestep` down, evenly spaced; all of them for None."""
    T = pipe.scheduler.config.num_train_timesteps
    if isinstance(timestep, bool) or not isinstance(timestep, int) or not 0 <= timestep < T:
        raise ValueError(f"timestep must be an integer in 0..{T - 1}, got {timestep!r}.")
    steps = timestep + 1 if num_inference_steps is None else num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= timestep + 1:
        raise ValueError(
            f"num_inference_steps must be an integer in 1..{timestep + 1} from timestep {timestep}, got {steps!r}."
        )
    return spaced_timesteps(timestep + 1, steps, "trailing").tolist()


def check_images(pipe: DDPMPipelineCustom, name: str, images: torch.Tensor, in_range: bool = True) -> None:
    """Raises TypeError or ValueError for what are no images of the model's, in [-1, 1] unless `in_range` is False."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a floating-point tensor (B, C, H, W) in [-1, 1], got {kind}.")
    channels = pipe.unet.config.in_channels
    if images.ndim != 4 or images.shape[1] != channels or not len(images):
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {tuple(images.shape)}.")
    check_size(name, pipe.unet, images.shape)
    # Written so that NaN is outside.
    if in_range and not images.abs().max() <= 1 + 1e-4:
        raise ValueError(f"{name} must lie in [-1, 1], got {images.min().item():g} to {images.max().item():g}.")


def check_mask(mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The mask as booleans that broadcast against the images."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}.")
    mask = mask.reshape(1, 1, *mask.shape) if mask.ndim == 2 else mask
    if mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, images.shape)):
        raise ValueError(
            f"mask must have shape (H, W) or (B, C, H, W) of images {tuple(images.shape)}, got {tuple(mask.shape)}."
        )
    if mask.shape[2:] != images.shape[2:]:
        raise ValueError(f"mask must have the images' size {tuple(images.shape[2:])}, got {tuple(mask.shape[2:])}.")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold nothing but 0 (known) and 1 (made anew).")
    return mask == 1


def check_weights(weights: Sequence[float]) -> list[float]:
    weights = [float(w) for w in weights]
    if not weights or not all(0 <= w <= 1 for w in weights):
        raise ValueError(f"weights must be numbers in [0, 1], at least one, got {weights}.")
    return weights
