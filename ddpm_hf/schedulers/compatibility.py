"""Which schedulers of diffusers sample from a DDPM, and at which numbers of steps: found by trying them on known data.

If the data are Gaussian, the network and the right result of sampling are known in closed form. A scheduler that does
not turn noise into these data does not turn it into images either.
"""

import copy
import functools
import inspect
import itertools
import json
import math
from collections.abc import Iterator, Sequence

import torch
from diffusers import SchedulerMixin

from ddpm_hf.checks import ArgumentTypeError
from ddpm_hf.diffusion.gaussian import LEARNED_VARIANCES
from ddpm_hf.diffusion.timesteps import as_timesteps, spaced_timesteps
from ddpm_hf.interop import stock_config
from ddpm_hf.schedulers.base import ChainScheduler, warn_of_early_start
from ddpm_hf.schedulers.ddim import DDIMSchedulerCustom

# They claim to be compatible, but add noise instead of removing it, or change the noise schedule.
NOT_FOR_DDPM = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DPMSolverMultistepInverseScheduler")
MEAN, STD = 0.6, 0.2  # of the data
# What a result may differ by. At few steps every solver makes the spread smaller; some make it larger, and images noise.
MAX_SHIFT = STD / 4
MAX_SPREAD = 2.0  # times the right one
MIN_SPREAD = 0.5  # times that of DDIM with as many steps
MAX_INPUT = 1.2  # times the spread that the network's input should have
PIXELS = 1000
Choice = int | tuple[int, ...]  # a number of steps, or timesteps
SEARCHED, MAX_TRIALS = 20, 4  # for another number of steps to name in an error message


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise ValueError, or TypeError for what is no scheduler, unless it samples from the chain of a DDPM."""
    if not isinstance(scheduler, SchedulerMixin):
        given = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else f"a {type(scheduler).__name__}"
        raise ArgumentTypeError(f"scheduler must be one of this package or of diffusers, got {given}.")
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if "DDPMScheduler" not in getattr(scheduler, "_compatibles", ()) or names & set(NOT_FOR_DDPM):
        name = type(scheduler).__name__
        raise ValueError(f"{name} cannot sample from a DDPM: use one of make_sampler's, such as DDIMSchedulerCustom.")


def output_channels(scheduler: SchedulerMixin, channels: int) -> tuple[tuple[int, ...], int]:
    """The numbers of channels that the network may have for images of `channels`, and how many of them `step` takes.

    A scheduler that draws from p_θ(x_{t−1} | x_t) takes the channels of a learned variance; all others need it without.
    """
    if hasattr(scheduler, "previous_timestep") and not isinstance(scheduler, DDIMSchedulerCustom):
        needed = channels * (2 if scheduler.config.variance_type in LEARNED_VARIANCES else 1)
        return (needed,), needed
    return (channels, 2 * channels), channels


def set_timesteps(scheduler: SchedulerMixin, device, steps: int | None, timesteps: Sequence[int] | None) -> None:
    """`scheduler.set_timesteps` of one of the two. Raises ValueError if sampling would be wrong; the message names
    numbers of steps that are right."""
    if isinstance(scheduler, ChainScheduler):
        scheduler.set_timesteps(steps, device, timesteps)
        return
    choice = steps if timesteps is None else tuple(as_timesteps(timesteps).tolist())
    if (problem := _problem(scheduler, choice, device)) is None:
        if timesteps is None:
            warn_of_early_start(scheduler, int(torch.as_tensor(scheduler.timesteps)[0]), steps)
        return
    name, spacing = type(scheduler).__name__, scheduler.config.get("timestep_spacing")
    near = [] if steps is None else [str(n) for n in _right_numbers_near(scheduler, steps)]
    given = "these timesteps do" if steps is None else f"num_inference_steps={steps} does"
    advice = f"{' or '.join(near)} steps, or " if near else ""
    raise ValueError(
        f"{given} not work with {name} (timestep_spacing={spacing!r}): {problem}. "
        f"Use {advice}'ddim' or 'ddpm' of make_sampler, which are right on any timesteps."
    )


def _right_numbers_near(scheduler: SchedulerMixin, steps: int) -> Iterator[int]:
    """The nearest right number of steps below `steps` and above, of those within SEARCHED and the divisors of T."""
    scheduler, T = copy.deepcopy(scheduler), scheduler.config.num_train_timesteps
    numbers = [n for n in range(1, T + 1) if abs(n - steps) <= SEARCHED or T % n == 0]
    for side in ([n for n in reversed(numbers) if n < steps], [n for n in numbers if n > steps]):
        looks_right = (n for n in side if _problem_of_setting(scheduler, n) is None)
        tried = itertools.islice(looks_right, MAX_TRIALS)
        yield from itertools.islice((n for n in tried if _problem(scheduler, n) is None), 1)


def _problem(scheduler: SchedulerMixin, choice: Choice, device=None) -> str | None:
    """Set the timesteps. Returns what is wrong with them, as the end of a sentence."""
    found = _problem_of_setting(scheduler, choice, device)
    return found or _problem_of_samples(type(scheduler), json.dumps(stock_config(scheduler)), choice)


def _problem_of_setting(scheduler: SchedulerMixin, choice: Choice, device=None) -> str | None:
    try:
        if isinstance(choice, int):
            scheduler.set_timesteps(choice, device=device)
        else:
            scheduler.set_timesteps(timesteps=list(choice), device=device)
    except Exception as error:  # of any kind: diffusers does not check for what leads to it
        return f"it fails ({type(error).__name__}: {error})"
    return _problem_of_levels(scheduler, choice)


def _problem_of_levels(scheduler: SchedulerMixin, choice: Choice) -> str | None:
    """A problem that the timesteps and noise levels show."""
    timesteps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64, device="cpu")
    if not (timesteps >= 0).all():
        return f"it visits the timestep {timesteps[~(timesteps >= 0)][0]:g}"
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        # A step of order 2 may stay at a level, and so may the very last step.
        sigmas = torch.as_tensor(sigmas, device="cpu")
        falls = sigmas.diff() < 0 if scheduler.order == 1 else sigmas.diff() <= 0
        if not sigmas.isfinite().all() or not falls[:-1].all() or not sigmas[-1] < sigmas[0]:
            return "its noise levels are not finite, or do not fall at every step"
    elif hasattr(scheduler, "previous_timestep"):
        if timesteps[-1] > 0 and not scheduler.config.variance_type.startswith("fixed_small"):
            return f"its last step, from timestep {timesteps[-1]:g}, adds noise"
    elif isinstance(choice, int):
        stride = scheduler.config.num_train_timesteps // choice
        # PNDM's own list, without the half steps that it runs too (seen in diffusers 0.42).
        visited = torch.as_tensor(getattr(scheduler, "_timesteps", timesteps)).unique()
        if (visited.diff() != stride).any() or visited[0] >= stride:
            return f"every step goes from t to t − {stride}, which is not the next of its timesteps"
    return None


@functools.lru_cache(maxsize=1024)
def _problem_of_samples(cls: type[SchedulerMixin], config: str, choice: Choice) -> str | None:
    """A problem that samples of the Gaussian show. Cached: a pipeline samples many batches with the same scheduler."""
    scheduler = cls.from_config(json.loads(config))
    _problem_of_setting(scheduler, choice)
    first = float(torch.as_tensor(scheduler.timesteps)[0])
    unit = GaussianNetwork(scheduler, 0.0, 1.0)  # of these data every x_t is N(0, 1)
    bar = unit.alpha_bar(first).item()
    # Where sampling starts from pure noise, x_t should have the mean √ᾱ·MEAN and the variance ᾱ·STD² + 1 − ᾱ. A solver
    # without noise keeps the difference, scaled like x; noise in the steps removes it.
    scale = STD / math.sqrt(bar * STD**2 + 1 - bar)
    lowest_mean = MEAN * (1 - math.sqrt(bar) * scale)
    try:
        x = sample_gaussian(scheduler)
        least = _spread_of_ddim(scheduler, choice)
        _problem_of_setting(scheduler, choice)
        sample_gaussian(scheduler, unit)
    except Exception as error:
        return f"it fails ({type(error).__name__}: {error})"
    mean, std = x.mean().item(), x.std(correction=0).item()
    if not (lowest_mean - MAX_SHIFT < mean < MEAN + MAX_SHIFT and MIN_SPREAD * least <= std < MAX_SPREAD * scale):
        return f"it turns data with mean {MEAN} and standard deviation {STD} into {mean:.3g} and {std:.3g}"
    # The network of a Gaussian brings any input back. A trained one has seen none that is wider than a noisy image.
    if unit.widest_input > MAX_INPUT:
        return f"its steps are too large: what they make of noise is {unit.widest_input:.3g} times too wide"
    return None


def _spread_of_ddim(scheduler: SchedulerMixin, choice: Choice) -> float:
    """The standard deviation of DDIM's samples (η = 0): of a number of steps, the least with the scheduler's spacing and
    with the trailing one. Each step scales x, by what eq. 12 of the paper makes of x_0 and ε."""
    bars, spreads = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64, device="cpu"), []
    for spacing in ("trailing", scheduler.config.get("timestep_spacing", "trailing")):
        offset = scheduler.config.get("steps_offset", 0)
        timesteps = spaced_timesteps(len(bars), choice, spacing, offset) if isinstance(choice, int) else list(choice)
        bar = bars[timesteps]
        to = torch.cat([bar[1:], torch.ones(1, dtype=torch.float64)])
        scales = ((to * bar).sqrt() * STD**2 + ((1 - to) * (1 - bar)).sqrt()) / (bar * STD**2 + 1 - bar)
        spreads.append(scales.prod().item())
    return min(spreads)


class GaussianNetwork:
    """The network that is optimal for pixels N(mean, std²), in closed form, for the chain of a scheduler.

    Between timesteps log SNR is interpolated, for schedulers with fractional timesteps. `widest_input` is the largest
    standard deviation of its inputs so far.
    """

    def __init__(self, scheduler: SchedulerMixin, mean: float = MEAN, std: float = STD):
        self.mean, self.std, self.widest_input = mean, std, 0.0
        self.log_snr = torch.logit(torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64, device="cpu"))
        self.prediction_type = scheduler.config.prediction_type
        self.variance_channels = output_channels(scheduler, 1)[1] - 1

    def alpha_bar(self, t) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        low, high = self.log_snr[t.floor().long()], self.log_snr[t.ceil().long()]
        return torch.sigmoid(torch.where(t.frac() == 0, low, torch.lerp(low, high, t.frac())))

    def __call__(self, x: torch.Tensor, t) -> torch.Tensor:
        self.widest_input = max(self.widest_input, x.std(correction=0).item())
        bar = self.alpha_bar(t)
        deviation = x - bar.sqrt() * self.mean
        x_0 = self.mean + bar.sqrt() * self.std**2 / (bar * self.std**2 + 1 - bar) * deviation
        epsilon = (1 - bar).sqrt() / (bar * self.std**2 + 1 - bar) * deviation
        v = bar.sqrt() * epsilon - (1 - bar).sqrt() * x_0
        output = {"sample": x_0, "epsilon": epsilon, "v_prediction": v}[self.prediction_type]
        return torch.cat([output, *[torch.full_like(output, 1e-4)] * self.variance_channels], 1)


def sample_gaussian(scheduler: SchedulerMixin, network: GaussianNetwork | None = None) -> torch.Tensor:
    """Samples of the Gaussian, (1, 1, 1, PIXELS), float64, by the timesteps that were set. x_T are exact quantiles."""
    network = network or GaussianNetwork(scheduler)
    parameters = inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(0)} if "generator" in parameters else {}
    x = torch.special.ndtri((torch.arange(PIXELS, dtype=torch.float64) + 0.5) / PIXELS)
    x = (x / x.std(correction=0)).reshape(1, 1, 1, -1) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x
