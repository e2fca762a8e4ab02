"""The denoising loop: one call of the network and one of the scheduler per step, eager or compiled."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.pipelines.arguments import SamplingInputs, check_same_form
from ddpm_hf.pipelines.guidance import Denoiser
from ddpm_hf.schedulers.base import ChainScheduler

MAX_LISTED = 10  # images listed in an error


@dataclass
class DenoisingStep:
    """The result of one step. Assigning to `x` changes what the next step starts from.

    Attributes:
        t: the timestep that the step started from.
        x: x_{t−1}, (B, C, H, W) in [-1, 1].
        x_0: the image predicted at t, same shape; None if the scheduler does not return it.
    """

    t: int | torch.Tensor
    x: torch.Tensor
    x_0: torch.Tensor | None


class DenoisingIterator(Iterator[DenoisingStep]):
    """An iterator over denoising steps; `len()` is the number of steps of the whole chain."""

    def __init__(self, steps: Iterator[DenoisingStep], length: int):
        self._steps, self._length = steps, length

    def __next__(self) -> DenoisingStep:
        return next(self._steps)

    def __len__(self) -> int:
        return self._length


class NonFiniteSamples(ValueError):
    """Samples with NaN or infinite values."""


class RecordedSteps:
    """What a sampling loop keeps of each step, to say at which one the samples stopped being finite.

    Nothing is read from the device before `check_finite`, so that the host does not wait for it in the loop.
    """

    def __init__(self):
        self._timesteps, self._extremes = [], []

    def add(self, t: int | torch.Tensor, x: torch.Tensor) -> None:
        """Record x, (B, C, H, W), as it is after the step from timestep t."""
        self._timesteps.append(t)
        self._extremes += torch.aminmax(x)  # one kernel; NaN and infinities come through

    def check_finite(self, x: torch.Tensor) -> None:
        """Raise NonFiniteSamples if x, (B, C, H, W), is not finite. The message says which images, and at which of the
        recorded steps it began."""
        bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if not bad:
            return
        listed = ", ".join(map(str, bad[:MAX_LISTED])) + (", ..." if len(bad) > MAX_LISTED else "")
        found = f"NaN or infinite values in {len(bad)} of {len(x)} images (number {listed} of the batch)"
        finite = torch.stack(self._extremes).isfinite().view(-1, 2).all(1).tolist() if self._extremes else []
        # A callback may have replaced bad values of earlier steps.
        last_finite = max((step for step, is_finite in enumerate(finite, start=1) if is_finite), default=0)
        if last_finite < len(finite):
            t = float(self._timesteps[last_finite])
            found += f", from step {last_finite + 1} of {len(finite)} on (timestep {t:g})"
        causes = "weights of a training that diverged, overflow in float16, latents that are not finite"
        raise NonFiniteSamples(f"samples must be finite, got {found}. Likely causes: {causes}.")


@contextmanager
def eval_mode(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Put the modules of a network in eval mode, then give each of them the mode that it had."""
    in_training = [m for m in modules if m.training]
    for m in in_training:
        m.training = False
    try:
        yield
    finally:
        for m in in_training:
            m.training = True


def predict(denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return denoiser(x, t)


def reverse_step(denoiser: Denoiser, scheduler: ChainScheduler, t: torch.Tensor, x, noise, options: dict):
    """Network and scheduler in one function of tensors. The caller draws the noise, since `torch.compile` cannot
    trace generators. Returns x_{t−1} and the predicted x_0."""
    return scheduler.step(denoiser(x, t), t, x, variance_noise=noise, return_dict=False, **options)


@dataclass
class StepFunctions:
    """The functions that a step calls: `reverse_step`, for this package's scheduler and if not None, else `predict`
    followed by `scheduler.step`."""

    predict: Callable = predict
    reverse_step: Callable | None = None

    @classmethod
    def compiled(cls, **options) -> "StepFunctions":
        """Both functions compiled; `options` are those of `torch.compile`."""
        return cls(*(_clone_outputs(torch.compile(f, **options)) for f in (predict, reverse_step)))


def denoising_loop(inputs: SamplingInputs, x: torch.Tensor, functions: StepFunctions) -> Iterator[DenoisingStep]:
    """Sample along the scheduler's timesteps, starting from x_T: (B, C, H, W), float32, scaled by `init_noise_sigma`.

    The network is in eval mode while a step runs.
    """
    denoiser, scheduler, generator = inputs.denoiser, inputs.scheduler, inputs.generator
    is_own = isinstance(scheduler, ChainScheduler)
    options = {name: value for name, value in inputs.step_options.items() if name != "generator"}
    # An int saves this package's scheduler a table lookup on the device; others expect their own tensors.
    timesteps = scheduler.timesteps.tolist() if is_own else scheduler.timesteps
    modules = list(denoiser.unet.modules())  # once: to walk through a network takes as long as several of its layers
    for i, (t, t_model) in enumerate(zip(timesteps, scheduler.timesteps)):
        with torch.no_grad(), eval_mode(modules):
            if is_own and functions.reverse_step is not None:
                # Noise is drawn where eager mode draws it, so that a generator ends in the same state.
                is_drawn = i < len(timesteps) - 1 and scheduler.adds_noise(**options)
                noise = randn_tensor(x.shape, generator, x.device, x.dtype) if is_drawn else torch.zeros_like(x)
                x, x_0 = functions.reverse_step(denoiser, scheduler, t_model, x, noise, options)
            else:
                output = functions.predict(denoiser, scheduler.scale_model_input(x, t), t_model)
                result = scheduler.step(output, t, x, **inputs.step_options)
                x, x_0 = result.prev_sample, getattr(result, "pred_original_sample", None)
        step = DenoisingStep(t, x, x_0)
        yield step
        if step.x is not x:
            check_same_form("x of a DenoisingStep", step.x, x)
            x = step.x


def _clone_outputs(function: Callable) -> Callable:
    """Wrap a compiled function so that its results outlive the next call: CUDA graphs overwrite their outputs."""

    def call(*arguments):
        torch.compiler.cudagraph_mark_step_begin()
        result = function(*arguments)
        return result.clone() if isinstance(result, torch.Tensor) else tuple(output.clone() for output in result)

    return call
