"""ChainScheduler: what the schedulers of this package share. `GaussianDiffusion` with the interface of diffusers."""

import inspect
import logging
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.checks import check_bool, check_choice, check_float, check_int
from ddpm_hf.diffusion.gaussian import GaussianDiffusion, ReverseStep, add_scaled_
from ddpm_hf.diffusion.schedules import make_betas, rescale_zero_terminal_snr
from ddpm_hf.diffusion.timesteps import TIMESTEP_SPACINGS, Timestep, as_timesteps, spaced_timesteps
from ddpm_hf.interop import SavesAsStock

logger = logging.getLogger(__name__)

FLAGS = ("clip_sample", "thresholding", "rescale_betas_zero_snr")
# The schedules that every diffusers scheduler knows by name. All others are saved as trained_betas.
STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Appended to beta_schedule in the configuration of an analytic scheduler. Stock schedulers would silently treat
# variance_type="analytic" as "fixed_small", but they raise NotImplementedError for a beta_schedule they do not know, and
# this suffix makes the error say why.
ANALYTIC_MARK = " with the analytic variance of ddpm_hf"
# At √ᾱ_T = 0.1 a tenth of an image's amplitude is left at the timestep where sampling starts from pure noise.
MAX_TERMINAL_ALPHA_CUMPROD = 0.01

Generators = torch.Generator | Sequence[torch.Generator] | None


class ChainScheduler(SavesAsStock, SchedulerMixin, ConfigMixin):
    """A scheduler whose steps are those of a `GaussianDiffusion`, on any timesteps.

    A subclass registers its arguments, calls `_set_up`, and defines `step`. A schedule that diffusers does not know is
    stored in the configuration as `trained_betas`, so that every diffusers scheduler can be created from it. No diffusers
    scheduler supports the analytic variance: all raise NotImplementedError for such a configuration.
    """

    # Read by diffusers' from_config() and compatibles (seen in diffusers 0.42).
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    _last = -1  # where the last step goes: x_0

    def _set_up(self, variance_type: str) -> None:
        """Check the arguments, which are registered, and compute the tables of the chain."""
        config, T = self.config, self.config.num_train_timesteps
        for name in FLAGS:
            check_bool(name, config[name])
        check_choice("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        check_int("steps_offset", config.steps_offset, 0)
        if config.clip_sample:
            check_float("clip_sample_range", config.clip_sample_range, "(0, inf)")
        if config.thresholding:
            check_float("dynamic_thresholding_ratio", config.dynamic_thresholding_ratio, "[0, 1]")
            check_float("sample_max_value", config.sample_max_value, "[1, inf)")
        schedule = config.beta_schedule
        schedule = schedule.removesuffix(ANALYTIC_MARK) if isinstance(schedule, str) else schedule
        trained_betas = config.analytic_trained_betas if config.trained_betas is None else config.trained_betas
        betas = make_betas(schedule, T, config.beta_start, config.beta_end, trained_betas)
        rescaled = rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas
        moments = config.analytic_moments
        self.diffusion = GaussianDiffusion(rescaled, config.prediction_type, variance_type, analytic_moments=moments)
        self._register_schedule(schedule, betas.tolist(), is_named=trained_betas is None)
        self.betas = self.diffusion.betas.float()
        self.alphas = self.diffusion.alphas.float()
        self.alphas_cumprod = self.diffusion.alphas_cumprod.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.custom_timesteps = False
        self._use_chain(torch.arange(T - 1, -1, -1, device="cpu"))
        warn_unless_noise(
            self,
            T - 1,
            "Scale the range of a linear schedule by ddpm_hf.diffusion.schedules.scale_betas_for_timesteps, or use "
            "beta_schedule='squaredcos_cap_v2', or rescale_betas_zero_snr=True with prediction_type='v_prediction'.",
        )

    def _register_schedule(self, beta_schedule: str, betas: list[float], is_named: bool) -> None:
        """Store the schedule in the configuration such that stock schedulers either compute the same or refuse it."""
        is_analytic = self.diffusion.variance_type == "analytic"
        stored = None if is_named and (is_analytic or beta_schedule in STOCK_BETA_SCHEDULES) else betas
        changed = {
            "beta_schedule": beta_schedule + ANALYTIC_MARK if is_analytic else beta_schedule,
            "trained_betas": None if is_analytic else stored,
            "analytic_trained_betas": stored if is_analytic else None,
        }
        if is_analytic:
            changed["analytic_moments"] = self.diffusion.analytic_moments.tolist()
        # from_config drops the arguments in _use_default_values (seen in diffusers 0.42). diffusers lists every argument
        # given by position there, whose value would be lost. Arguments that stock lacks must be listed if they have
        # their default, even if given as None, or stock logs a warning.
        config = {**self.config, **changed}
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        listed = {*config.get("_use_default_values", []), *self.own_arguments}
        unchanged = [name for name in listed if name in defaults and config[name] == defaults[name]]
        self.register_to_config(**changed, _use_default_values=unchanged)

    @property
    def own_arguments(self) -> tuple[str, ...]:
        """Arguments that are not saved. An analytic scheduler saves them: stock refuses its file in any case."""
        return () if self.diffusion.variance_type == "analytic" else ("analytic_moments", "analytic_trained_betas")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------ choosing the chain

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the sampling timesteps: `num_inference_steps` of them by `timestep_spacing`, or `timesteps` as given.

        Sets `self.timesteps`, int64 (n,), in descending order, with exactly the n asked for. `add_noise`,
        `get_velocity`, and `step` at timesteps not among them keep using the full chain.

        Raises ValueError unless exactly one of the two is given, and ValueError or TypeError for a number of steps
        outside 1..T or timesteps that are not strictly descending in 0..T−1.
        """
        T = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            given = f"{num_inference_steps=}, {timesteps=}"
            raise ValueError(f"exactly one of num_inference_steps and timesteps must be given, got {given}.")
        if timesteps is not None:
            chosen = as_timesteps(timesteps)
            if (chosen.diff() >= 0).any():
                raise ValueError(f"timesteps must be in strictly descending order, got {timesteps!r}.")
        else:
            steps, spacing = check_int("num_inference_steps", num_inference_steps, 1, T), self.config.timestep_spacing
            chosen = spaced_timesteps(T, steps, spacing, self.config.steps_offset)
            warn_of_early_start(self, int(chosen[0]), steps)
        self._use_chain(chosen, device)
        self.num_inference_steps = len(chosen)
        self.custom_timesteps = timesteps is not None

    def _use_chain(self, timesteps: torch.Tensor, device: str | torch.device | None = None) -> None:
        self._chain = self._sub_chain(timesteps)
        previous = torch.arange(-1, self.config.num_train_timesteps - 1, device="cpu")
        previous[timesteps] = torch.cat([timesteps[1:], torch.tensor([-1], device="cpu")])
        self._previous = previous.clamp(min=self._last).tolist()
        self.timesteps = timesteps.to(device)
        # Not in the first step, where this would copy from the host, and recompile a compiled graph.
        self._chain.lookup.cache_tables(self.timesteps.device)
        self.diffusion.lookup.cache_tables(self.timesteps.device)

    def _sub_chain(self, timesteps: torch.Tensor) -> GaussianDiffusion:
        return self.diffusion if len(timesteps) == len(self.diffusion) else self.diffusion.strided(timesteps)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """The timestep that follows `timestep` in sampling; −1 means x_0."""
        if isinstance(timestep, torch.Tensor):
            return torch.tensor(self._previous, device=timestep.device)[timestep]
        return self._previous[timestep]

    def scale_model_input(self, sample: torch.Tensor, timestep: Timestep | None = None) -> torch.Tensor:
        """The sample, unchanged. For the interface of diffusers."""
        return sample

    # ------------------------------------------------------------------ sampling

    def adds_noise(self) -> bool:
        """Whether `step`, called with these options, draws noise in all steps but the last."""
        return True

    def _draw(
        self,
        step: ReverseStep,
        sample: torch.Tensor,
        generator: Generators,
        variance_noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_{t−1} = mean + std·z, and x_0, both in the dtype of `sample`. z is drawn if std is not the number 0."""
        mean, std, x_0 = step
        if not (isinstance(std, float) and std == 0.0):
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, mean.dtype)
            mean = add_scaled_(mean, std, variance_noise)
        return mean.to(sample.dtype), x_0.to(sample.dtype)

    @property
    def clip(self):
        """Maps the predicted x_0, possibly in place; None if it is taken as it is."""
        if self.config.thresholding:
            return self._threshold
        return self._clamp if self.config.clip_sample else None

    def _threshold(self, x_0: torch.Tensor) -> torch.Tensor:
        return dynamic_threshold(x_0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)

    def _clamp(self, x_0: torch.Tensor) -> torch.Tensor:
        return x_0.clamp_(-self.config.clip_sample_range, self.config.clip_sample_range)

    # ------------------------------------------------------------------ training

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timestep) -> torch.Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·z (eq. 2) of the full chain.

        Shapes: all as `original_samples`. Computed in at least float32 and returned in the dtype of `original_samples`.
        """
        return self.diffusion.q_sample(original_samples, timesteps, noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timestep) -> torch.Tensor:
        """v_t = √ᾱ_t·z − √(1−ᾱ_t)·x_0, the target of v-prediction. Shapes: all as `sample`, and its dtype."""
        return self.diffusion.velocity(sample, timesteps, noise).to(sample.dtype)


def warn_unless_noise(scheduler: SchedulerMixin, t: int, advice: str) -> None:
    """Log a warning if x_t is not nearly pure noise, although sampling starts from pure noise there."""
    if (left := float(scheduler.alphas_cumprod[t])) > MAX_TERMINAL_ALPHA_CUMPROD:
        amplitude = f"{100 * left**0.5:.0f} % of an image's amplitude is left there (ᾱ = {left:.3g})"
        start = f"Sampling starts from pure noise at timestep {t}, but {amplitude}: samples will be worse."
        logger.warning("%s %s", start, advice)


def warn_of_early_start(scheduler: SchedulerMixin, t: int, steps: int) -> None:
    """`warn_unless_noise` for the first timestep t of a number of steps. If the whole chain does not end in noise,
    the warning was given when the scheduler was created."""
    is_early = t < scheduler.config.num_train_timesteps - 1
    if is_early and float(scheduler.alphas_cumprod[-1]) <= MAX_TERMINAL_ALPHA_CUMPROD:
        spacing = scheduler.config.get("timestep_spacing")
        warn_unless_noise(scheduler, t, f"Use timestep_spacing='trailing' for {steps} steps, not {spacing!r}.")


def check_noise_arguments(sample: torch.Tensor, generator: Generators, variance_noise: torch.Tensor | None):
    """The generators as diffusers takes them. Raises ValueError for a wrong number of generators or shape of noise."""
    if isinstance(generator, (list, tuple)) and len(generator) != len(sample):
        raise ValueError(f"generator must be one per sample, got {len(generator)} for a batch of {len(sample)}.")
    if variance_noise is not None and (generator is not None or variance_noise.shape != sample.shape):
        given = f"shape {tuple(variance_noise.shape)}, {generator=}"
        raise ValueError(f"variance_noise must have shape {tuple(sample.shape)}, with no generator, got {given}.")
    return list(generator) if isinstance(generator, tuple) else generator


def dynamic_threshold(x_0: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Clamp each image to [-s, s] and divide by s, where s is its `ratio` quantile of |x_0|, clamped to
    [1, `max_value`] (Imagen, section 2.3). Shapes: (B, ...) to the same."""
    magnitude = x_0.flatten(1).abs()
    # torch.quantile refuses large inputs: interpolate between two order statistics.
    position = ratio * (magnitude.shape[1] - 1)
    low = int(position)
    below, above = (magnitude.kthvalue(min(k, magnitude.shape[1]), dim=1).values for k in (low + 1, low + 2))
    s = torch.lerp(below, above, position - low).clamp(1, max_value)
    s = s.reshape(-1, *[1] * (x_0.ndim - 1))
    return torch.maximum(torch.minimum(x_0, s), -s) / s
