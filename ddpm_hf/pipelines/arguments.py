"""Check and prepare the arguments of sampling and editing before the first step.

Every function raises ValueError or TypeError that names the argument, its value and what is accepted.
"""

import copy
import inspect
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor, unwrap_module

from ddpm_hf.checks import ArgumentTypeError, check_choice, check_float, check_int, check_list, shown
from ddpm_hf.diffusion.timesteps import spaced_timesteps
from ddpm_hf.models.builders import image_size
from ddpm_hf.pipelines.function_guidance import GRADIENTS, GuidanceFunction, GuidedDenoiser
from ddpm_hf.pipelines.guidance import Denoiser
from ddpm_hf.schedulers.compatibility import check_scheduler, output_channels, set_timesteps
from ddpm_hf.schedulers.samplers import as_ddpm, default_steps
from ddpm_hf.seeds import image_generators, seed_generators

OUTPUT_TYPES = ("pil", "np", "pt")
Generators = torch.Generator | Sequence[torch.Generator] | None


class SamplingInputs(NamedTuple):
    """What the sampling loop needs. `latents` is None where x_T is to be drawn; `step_options` go to
    `scheduler.step`, and the scheduler is a copy whose timesteps are set."""

    denoiser: Denoiser | GuidedDenoiser
    scheduler: SchedulerMixin
    shape: tuple[int, ...]
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    step_options: dict


def prepare_inputs(
    pipe: DiffusionPipeline,
    batch_size: int = 1,
    generator: Generators = None,
    num_inference_steps: int | None = None,
    *,
    timesteps: Sequence[int] | None = None,
    latents: torch.Tensor | None = None,
    eta: float | None = None,
    seeds: Sequence[int] | None = None,
    seed: int | None = None,
    first_index: int = 0,
    **condition,
) -> SamplingInputs:
    """Check and prepare the arguments of a pipeline call, which documents them. `condition`: see `prepare_denoiser`."""
    batch_size, generator = check_batch(batch_size, generator, seeds, seed, first_index)
    shape = check_shape(pipe.unet, batch_size, latents)
    denoiser = prepare_denoiser(pipe, batch_size, **condition)
    if isinstance(denoiser, GuidedDenoiser) and pipe._step_functions.reverse_step is not None:
        raise ValueError("guidance by a function cannot be compiled: use a pipeline on which compile() was not called.")
    options = prepare_step_options(pipe.scheduler, generator, eta)
    scheduler = prepare_scheduler(pipe.scheduler, num_inference_steps, timesteps, pipe._execution_device)
    return SamplingInputs(denoiser, scheduler, shape, generator, latents, options)


def prepare_denoiser(
    pipe: DiffusionPipeline,
    batch_size: int,
    *,
    guidance: GuidanceFunction | None = None,
    guidance_gradient: str = "network",
    **condition,
) -> Denoiser | GuidedDenoiser:
    """The network with `class_labels`, `guidance_scale` and `null_class`, and with guidance by a function.

    The scheduler must have the betas that the network was trained with, and a variance type that fits its output. One
    that does not use a learned variance is not given it.
    """
    check_scheduler(pipe.scheduler)
    name, config, net = type(pipe.scheduler).__name__, pipe.scheduler.config, pipe.unet.config
    T = net.get("num_train_timesteps") or pipe._trained_T
    if config.num_train_timesteps != T:
        raise ValueError(
            f"{name} has num_train_timesteps={config.num_train_timesteps}, but the model was trained on {T}: "
            f"make it from the model's own, {name}.from_config(pipe.scheduler.config)."
        )
    bars = pipe.scheduler.alphas_cumprod
    if not torch.allclose(bars.cpu(), pipe._trained_alphas_cumprod, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{name} has other betas than the model was trained with: make it from the model's own scheduler, "
            f"{name}.from_config(pipe.scheduler.config). If it is right, make a new pipeline with it."
        )
    possible, taken = output_channels(pipe.scheduler, net.in_channels)
    if net.out_channels not in possible:
        kind = f"{name} with variance_type={config.get('variance_type')!r}"
        needed = " or ".join(map(str, possible))
        raise ValueError(f"{kind} needs {needed} output channels, got {net.out_channels}.")
    check_choice("guidance_gradient", guidance_gradient, GRADIENTS)
    device = pipe._execution_device
    denoiser = Denoiser(pipe.unet, batch_size, device, channels=taken, **condition)
    if guidance is None:
        if guidance_gradient != "network":
            raise ValueError(f"guidance_gradient={guidance_gradient!r} needs guidance, a function.")
        return denoiser
    return GuidedDenoiser(denoiser, as_ddpm(pipe.scheduler).diffusion, device, guidance, guidance_gradient)


def check_network(unet) -> None:
    """The network must be one that is called with x_t and t, and possibly class labels."""
    plain = unwrap_module(unet) if isinstance(unet, torch.nn.Module) else unet
    if not isinstance(plain, torch.nn.Module) or not hasattr(plain, "config"):
        raise ArgumentTypeError(f"unet must be a network such as a UNet2DModelCustom, got {_kind(unet)}.")
    parameters = list(inspect.signature(plain.forward).parameters.values())[2:]
    if needed := [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]:
        name = type(plain).__name__
        raise ValueError(f"unet must need no more than x_t and t, as UNet2DModelCustom: {name} needs {needed} too.")


def _kind(value) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_output_type(output_type: str, channels: int) -> None:
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if output_type == "pil" and channels not in (1, 3, 4):
        raise ValueError(f"output_type='pil' needs 1, 3 or 4 channels, the model has {channels}; use 'np' or 'pt'.")


def check_batch(
    batch_size: int,
    generator: Generators,
    seeds: Sequence[int] | None = None,
    seed: int | None = None,
    first_index: int = 0,
) -> tuple[int, torch.Generator | list[torch.Generator] | None]:
    """The number of images, and the generators of their noise."""
    batch_size = check_int("batch_size", batch_size, 1)
    given = {"generator": generator, "seeds": seeds, "seed": seed}
    if len(given := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"give one of generator, seeds and seed, got {' and '.join(given)}.")
    first_index = check_int("first_index", first_index, 0)
    if first_index and seed is None:
        raise ValueError(f"first_index={first_index} counts the images of a seed: give seed as well.")
    if seeds is not None:
        generators = seed_generators(seeds)
        if batch_size not in (1, len(generators)):
            raise ValueError(f"batch_size={batch_size} and seeds of {len(generators)} images contradict each other.")
        return len(generators), generators
    if seed is not None:
        return batch_size, image_generators(seed, range(first_index, first_index + batch_size))
    is_list = isinstance(generator, (list, tuple))
    if is_list and len(generator) != batch_size:
        raise ValueError(f"generator must be one, or {batch_size} (one per image), got {len(generator)}.")
    for each in generator if is_list else [generator]:
        if not isinstance(each, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {each!r}.")
    return batch_size, list(generator) if is_list else generator


def check_shape(unet, batch_size: int, latents: torch.Tensor | None) -> tuple[int, ...]:
    """The shape of x_T, (B, C, H, W). `latents` must have it, and give H and W if the configuration does not."""
    config, size = unet.config, image_size(unet.config)
    if latents is not None and not (isinstance(latents, torch.Tensor) and latents.is_floating_point()):
        raise TypeError(f"latents must be a floating-point tensor (B, C, H, W), got {type(latents).__name__}.")
    if size is None and latents is None:
        raise ValueError("the U-Net's configuration has no sample_size: give latents, whose size is then used.")
    if latents is not None and size is None and latents.ndim != 4:
        raise ValueError(f"latents must have shape (B, {config.in_channels}, H, W), got {tuple(latents.shape)}.")
    shape = (batch_size, config.in_channels, *(latents.shape[2:] if size is None else size))
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
    check_size("sample_size" if latents is None else "latents", unet, shape)
    if latents is not None and not bool(latents.isfinite().all()):  # once per call, not in the loop
        raise ValueError("latents must be finite, got NaN or infinite values.")
    return shape


def check_callback(callback, tensor_inputs: Sequence[str], known: Sequence[str]) -> None:
    """`callback_on_step_end` must be a function, and `callback_on_step_end_tensor_inputs` a list of known names."""
    if callback is not None and not callable(callback):
        raise ArgumentTypeError(f"callback_on_step_end must be a function, got {shown(callback)}.")
    if isinstance(tensor_inputs, str) or not isinstance(tensor_inputs, Sequence):
        given = shown(tensor_inputs)
        raise ArgumentTypeError(f"callback_on_step_end_tensor_inputs must be a list of {list(known)}, got {given}.")
    for name in tensor_inputs:
        check_choice("callback_on_step_end_tensor_inputs", name, known)


def latents_of(changed, x: torch.Tensor) -> torch.Tensor:
    """The latents that `callback_on_step_end` returned; x, (B, C, H, W), if it returned none. Reads no values of tensors."""
    changed = {} if changed is None else changed
    if not isinstance(changed, dict) or changed.keys() - {"latents"}:
        raise ArgumentTypeError(f"callback_on_step_end must return None or {{'latents': x}}, got {shown(changed)}.")
    latents = changed.get("latents", x)
    check_same_form("the latents that callback_on_step_end returns", latents, x)
    return latents


def check_same_form(name: str, new: torch.Tensor, x: torch.Tensor) -> None:
    """`new` must be a floating-point tensor of the shape of x. Reads no values."""
    if not isinstance(new, torch.Tensor) or not new.is_floating_point():
        raise ArgumentTypeError(f"{name} must be a floating-point tensor, got {_kind(new)}.")
    if new.shape != x.shape:
        raise ValueError(f"{name} must have shape {tuple(x.shape)}, got {tuple(new.shape)}.")


def check_size(name: str, unet, shape: Sequence[int]) -> None:
    """Height and width must be divisible by 2 once for each downsampling of the network."""
    multiple, size = 2 ** (len(unet.config.block_out_channels) - 1), tuple(shape[-2:])
    if len(shape) != 4 or 0 in shape or any(length % multiple for length in size):
        raise ValueError(f"{name} must have a height and width that are multiples of {multiple}, got {size}.")


def prepare_scheduler(
    scheduler: SchedulerMixin, num_inference_steps: int | None, timesteps: Sequence[int] | None, device
) -> SchedulerMixin:
    """A copy of the scheduler with its timesteps set: the pipeline's own stays as it is, for training."""
    name = type(scheduler).__name__
    scheduler = copy.deepcopy(scheduler)
    if timesteps is not None:
        if num_inference_steps is not None:
            raise ValueError("give num_inference_steps or timesteps, not both.")
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"timesteps cannot be given to {name}: give num_inference_steps.")
    else:
        T = scheduler.config.num_train_timesteps
        steps = default_steps(scheduler) or T if num_inference_steps is None else num_inference_steps
        num_inference_steps = check_int("num_inference_steps", steps, 1, T, note="the model's own T")
    set_timesteps(scheduler, device, num_inference_steps, timesteps)
    return scheduler


def prepare_step_options(scheduler: SchedulerMixin, generator, eta: float | None) -> dict:
    """The keyword arguments of `scheduler.step`: the generator, if it takes one, and eta."""
    parameters = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in parameters else {}
    if eta is not None:
        options["eta"] = check_float("eta", eta, "[0, 1]")
        if "eta" not in parameters:
            raise ValueError(
                f"eta={eta!r} needs a scheduler such as DDIMSchedulerCustom, not {type(scheduler).__name__}."
            )
    return options


# ---------------------------------------------------------------------- editing and inversion


def draw_noise(pipe: DiffusionPipeline, shape: Sequence[int], generator: Generators) -> torch.Tensor:
    """Standard Gaussian noise of this shape, float32, on the pipeline's device."""
    return randn_tensor(tuple(shape), generator=generator, device=pipe._execution_device, dtype=torch.float32)


def timesteps_from(
    pipe: DiffusionPipeline, timestep: int | None, num_inference_steps: int | None, strength: float | None = None
) -> list[int]:
    """The timesteps of an edit, descending, of which the first is the one that images are noised up to.

    From a `timestep`: `num_inference_steps` of them down from there, evenly spaced; all timestep + 1 for None. By a
    `strength`, as in diffusers' image to image: the last int(num_inference_steps·strength) of `num_inference_steps`
    (T for None) of the whole chain.
    """
    if (timestep is None) == (strength is None):
        raise ValueError(f"give one of timestep and strength, got {timestep=} and {strength=}.")
    T = pipe.scheduler.config.num_train_timesteps
    if strength is not None:
        strength = check_float("strength", strength, "(0, 1]")
        steps = check_int("num_inference_steps", T if num_inference_steps is None else num_inference_steps, 1, T)
        if not (kept := min(int(steps * strength), steps)):
            least = f"at least {1 / steps:g} of {steps} steps"
            raise ValueError(f"strength must leave a step to run, {least}, got {strength!r}.")
        return spaced_timesteps(T, steps, "trailing").tolist()[-kept:]
    timestep = check_int("timestep", timestep, 0, T - 1)
    steps = timestep + 1 if num_inference_steps is None else num_inference_steps
    steps = check_int("num_inference_steps", steps, 1, timestep + 1, note=f"counted from timestep {timestep}")
    return spaced_timesteps(timestep + 1, steps, "trailing").tolist()


def check_weights(weights: Sequence[float]) -> list[float]:
    return check_list("weights", weights, partial(check_float, interval="[0, 1]"))
