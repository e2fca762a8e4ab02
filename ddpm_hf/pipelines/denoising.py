"""The reverse process as a loop: network, scheduler, network, scheduler, ..., eager or compiled."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.pipelines.guidance import Denoiser
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom


@dataclass
class DenoisingStep:
    """What one reverse step leaves: the timestep t it started from, x_{t−1} and the x_0 predicted at t. Images are
    (B, C, H, W) in [-1, 1]; `x_0` is None for a scheduler that does not tell it. The process goes on from `x`, so
    that assigning to it steers the rest."""

    t: int | torch.Tensor
    x: torch.Tensor
    x_0: torch.Tensor | None


class Steps(Iterator[DenoisingStep]):
    """The steps of a chain, and how many they are."""

    def __init__(self, steps: Iterator[DenoisingStep], length: int):
        self._steps, self._length = steps, length

    def __next__(self) -> DenoisingStep:
        return next(self._steps)

    def __len__(self) -> int:
        return self._length


class eval_mode:
    """Puts a module in eval mode for a block of code, and back as it was."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.training = [m for m in self.module.modules() if m.training]
        for module in self.training:
            module.training = False

    def __exit__(self, *_) -> None:
        for module in self.training:
            module.training = True


def predict(denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network's part of a step."""
    return denoiser(x, t)


def reverse_step(denoiser: Denoiser, scheduler: DDPMSchedulerCustom, t: torch.Tensor, x, noise):
    """A whole step as a function of tensors, the noise being drawn by the caller: `torch.compile` takes no generators."""
    return scheduler.step(denoiser(x, t), t, x, variance_noise=noise)


@dataclass
class StepFunctions:
    """What a step calls. `whole` does all of it for this package's scheduler; None: network and scheduler in turn."""

    predict: Callable = predict
    whole: Callable | None = None


def compiled_step_functions(options: dict) -> StepFunctions:
    """Both compiled, each into one graph; `options` are those of `torch.compile`."""
    return StepFunctions(*(_own_memory(torch.compile(function, **options)) for function in (predict, reverse_step)))


def reverse_process(
    denoiser: Denoiser,
    scheduler: SchedulerMixin,
    x: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
    options: dict,
    functions: StepFunctions,
) -> Iterator[DenoisingStep]:
    """From x_T, (B, C, H, W) float32 and scaled as the scheduler wants it, along the scheduler's timesteps.

    `options` go to `scheduler.step`. The network is in eval mode while a step runs.
    """
    is_own = isinstance(scheduler, DDPMSchedulerCustom)
    # An int spares this package's scheduler a table look-up on the device; others want their own tensors back.
    timesteps = scheduler.timesteps.tolist() if is_own else scheduler.timesteps
    for i, (t, t_model) in enumerate(zip(timesteps, scheduler.timesteps)):
        with torch.no_grad(), eval_mode(denoiser.unet):
            if is_own and functions.whole is not None:
                # None is drawn for the last step, so that generators are left as an eager chain leaves them.
                is_last = i == len(timesteps) - 1
                noise = torch.zeros_like(x) if is_last else randn_tensor(x.shape, generator, x.device, x.dtype)
                result = functions.whole(denoiser, scheduler, t_model, x, noise)
            else:
                output = functions.predict(denoiser, scheduler.scale_model_input(x, t), t_model)
                result = scheduler.step(output, t, x, **options)
        step = DenoisingStep(t, result.prev_sample, getattr(result, "pred_original_sample", None))
        yield step
        x = step.x


def _own_memory(function: Callable) -> Callable:
    """Calls a compiled function so that its results outlive the next call: CUDA graphs write over their outputs."""

    def call(*arguments):
        torch.compiler.cudagraph_mark_step_begin()
        result = function(*arguments)
        if isinstance(result, torch.Tensor):
            return result.clone() if result.is_cuda else result
        if result.prev_sample.is_cuda:
            result = type(result)(result.prev_sample.clone(), result.pred_original_sample.clone())
        return result

    return call
