"""What a sampling call is given, checked before any work: errors name the argument, its value and what is accepted."""

import copy
import inspect
import math
from collections.abc import Sequence
from numbers import Real
from types import NoneType

import torch
from diffusers import SchedulerMixin

from ddpm_hf.diffusion.gaussian import LEARNED_VARIANCES
from ddpm_hf.seeds import check_seed, image_generators, seed_generators

OUTPUT_TYPES = ("pil", "np", "pt")
Generators = torch.Generator | Sequence[torch.Generator] | None


def check_output_type(output_type: str, channels: int) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}.")
    if output_type == "pil" and channels not in (1, 3, 4):
        raise ValueError(f"output_type='pil' needs 1, 3 or 4 channels, the model has {channels}; use 'np' or 'pt'.")


def check_scheduler(unet, scheduler: SchedulerMixin, trained_T: int | None) -> None:
    """ValueError for a scheduler that cannot run the network."""
    T = unet.config.get("num_train_timesteps") or trained_T
    if T is not None and scheduler.config.num_train_timesteps != T:
        raise ValueError(
            f"the scheduler ({type(scheduler).__name__}) has num_train_timesteps="
            f"{scheduler.config.num_train_timesteps}, but the model was trained on {T}: make it from the model's own, "
            f"{type(scheduler).__name__}.from_config(pipe.scheduler.config), or build a new pipeline for another model."
        )
    variance_type = scheduler.config.get("variance_type")
    expected = unet.config.in_channels * (2 if variance_type in LEARNED_VARIANCES else 1)
    if unet.config.out_channels != expected:
        raise ValueError(
            f"variance_type={variance_type!r} needs a U-Net with {expected} output channels, "
            f"this one has {unet.config.out_channels}."
        )


def check_batch(
    batch_size: int, generator: Generators, seeds: Sequence[int] | None, seed: int | None, first_index: int
) -> tuple[int, torch.Generator | list[torch.Generator] | None]:
    """The number of images and the generators of their noise."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    given = {"generator": generator, "seeds": seeds, "seed": seed}
    if len(given := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"give one of generator, seeds and seed, got {' and '.join(given)}.")
    check_seed("first_index", first_index)
    if first_index and seed is None:
        raise ValueError(f"first_index={first_index} counts the images of a seed: give seed as well.")
    if seeds is not None:
        generators = seed_generators(seeds)
        if batch_size not in (1, len(generators)):
            raise ValueError(f"batch_size={batch_size} and seeds of {len(generators)} images contradict each other.")
        return len(generators), generators
    if seed is not None:
        return batch_size, image_generators(seed, range(first_index, first_index + batch_size))
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch_size:
            raise ValueError(f"generator must be one, or {batch_size} (one per image), got {len(generator)}.")
        generator = list(generator)
    for each in generator if isinstance(generator, list) else [generator]:
        if not isinstance(each, (torch.Generator, NoneType)):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {each!r}.")
    return batch_size, generator


def check_shape(unet, batch_size: int, latents: torch.Tensor | None) -> tuple[int, ...]:
    """The shape of x_T, that of `latents` where they are given."""
    config = unet.config
    if latents is not None and not (isinstance(latents, torch.Tensor) and latents.is_floating_point()):
        raise TypeError(f"latents must be a floating-point tensor (B, C, H, W), got {type(latents).__name__}.")
    if config.sample_size is None and latents is None:
        raise ValueError("the U-Net's configuration has no sample_size: give latents, whose size is then used.")
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
    shape = (batch_size, config.in_channels, *(size if config.sample_size is not None else latents.shape[2:]))
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
    check_size("sample_size" if latents is None else "latents", unet, shape)
    return shape


def check_size(name: str, unet, shape: Sequence[int]) -> None:
    """ValueError for images that cannot be halved at every level of the network but the last."""
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    if len(shape) != 4 or shape[-1] % multiple or shape[-2] % multiple or 0 in shape:
        raise ValueError(
            f"{name} must have a height and a width that are multiples of {multiple} for this U-Net of "
            f"{len(unet.config.block_out_channels)} levels, got {'×'.join(map(str, shape[-2:]))}."
        )


def make_chain(
    scheduler: SchedulerMixin, num_inference_steps: int | None, timesteps: Sequence[int] | None, device
) -> SchedulerMixin:
    """A copy of the scheduler set to the chain asked for: the pipeline's own stays usable for training."""
    name = type(scheduler).__name__
    scheduler = copy.deepcopy(scheduler)
    if timesteps is not None:
        if num_inference_steps is not None:
            raise ValueError("give num_inference_steps or timesteps, not both.")
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{name} takes no timesteps of its own: give num_inference_steps.")
        scheduler.set_timesteps(timesteps=timesteps, device=device)
        return scheduler
    T = scheduler.config.num_train_timesteps
    steps = T if num_inference_steps is None else num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be an integer of at least 1, got {steps!r}.")
    if steps > T:
        raise ValueError(f"num_inference_steps must lie in 1..{T}, the model's own T, got {steps}.")
    scheduler.set_timesteps(steps, device=device)
    if (torch.as_tensor(scheduler.timesteps) < 0).any():
        raise ValueError(
            f"num_inference_steps={steps} makes {name} with timestep_spacing={scheduler.config.timestep_spacing!r} "
            "visit timestep -1, by its rounding: give one step more or less."
        )
    # At T steps diffusers' multistep solvers round two timesteps to one, and divide by zero there: all is NaN.
    # (A step of order 2 may stay where it is, and so may the last one of all.)
    sigmas = getattr(scheduler, "sigmas", None)
    if scheduler.order == 1 and sigmas is not None and (torch.as_tensor(sigmas)[:-1].diff() == 0).any():
        raise ValueError(
            f"num_inference_steps={steps} makes {name} visit a noise level twice: give fewer steps (the model has {T})."
        )
    return scheduler


def step_options(scheduler: SchedulerMixin, generator, eta: float | None) -> dict:
    """What `scheduler.step` is to be given by name: the generator where it takes one, and eta."""
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    if eta is not None:
        if isinstance(eta, bool) or not isinstance(eta, Real) or not math.isfinite(eta) or eta < 0:
            raise ValueError(f"eta must be a number of at least 0, got {eta!r}.")
        if "eta" not in takes:
            raise ValueError(
                f"eta={eta!r} is for schedulers whose step takes it, as DDIM; {type(scheduler).__name__} does not."
            )
        options["eta"] = float(eta)
    return options
