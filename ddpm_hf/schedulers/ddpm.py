"""DDPMSchedulerCustom: the diffusers face of `GaussianDiffusion`."""

import inspect
import logging
from collections.abc import Sequence
from numbers import Integral

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.diffusion.gaussian import GaussianDiffusion, add_scaled_
from ddpm_hf.diffusion.schedules import make_betas
from ddpm_hf.diffusion.timesteps import Timestep, as_timesteps, spaced_timesteps, to_index_device
from ddpm_hf.interop import SavesAsStock

logger = logging.getLogger(__name__)

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
# The schedules that every scheduler of diffusers has by name; all others are handed on as trained_betas.
STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# diffusers takes any variance_type that it does not know for "fixed_small". It does refuse an unknown beta_schedule,
# and with this at the end of its name says which one it is.
ANALYTIC_MARK = " with the analytic variance of ddpm_hf"
# √ᾱ is then a tenth: that much of an image's amplitude is left where sampling starts from pure noise.
MAX_TERMINAL_ALPHA_CUMPROD = 0.01


class DDPMSchedulerCustom(SavesAsStock, SchedulerMixin, ConfigMixin):
    """Ancestral sampling with a DDPM (Ho et al. 2020, algorithm 2), and the noising that training needs.

    Arguments, defaults and calls are those of `diffusers.DDPMScheduler`. The tables are float64 (`diffusion`), any
    set of timesteps is a chain of its own whose last step adds no noise, and samples are computed in at least float32.

    Args:
        num_train_timesteps: T, the length of the chain that the model was trained on.
        beta_start, beta_end, beta_schedule: the β schedule, a name of `schedules.BETA_SCHEDULES`.
        trained_betas: T numbers in place of a schedule.
        variance_type: "fixed_small" (β̃_t), "fixed_large" (β_t), their "_log" forms, "learned", "learned_range", or
            "analytic", the optimal variance of Analytic-DPM (Bao et al. 2022) for the network that the moments are of.
        clip_sample, clip_sample_range: clamp the predicted x_0 to [-range, range].
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x_0 (Imagen), which
            replaces clamping.
        timestep_spacing, steps_offset: which timesteps `set_timesteps(n)` picks (Lin et al. 2023, table 2).
        rescale_betas_zero_snr: make ᾱ_T zero.
        analytic_moments: T numbers Γ_t of `analytic.estimate_analytic_moments`, for variance_type="analytic".
        analytic_trained_betas: holds `trained_betas` in the configuration of an analytic scheduler; not to be given.

    Own schedules stand in the configuration as `trained_betas` too, so that every scheduler of diffusers can be made
    from it. Analytic variance is beyond all of them: from such a configuration they raise NotImplementedError;
    `from_config(config, variance_type="fixed_small", analytic_moments=None)` is the way back.

    Raises ValueError or TypeError that names the argument. Logs a warning where x_T would not be noise.
    """

    stock_class = DDPMScheduler
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        analytic_moments: Sequence[float] | None = None,
        analytic_trained_betas: Sequence[float] | None = None,
    ):
        if timestep_spacing not in TIMESTEP_SPACINGS:
            raise ValueError(f"timestep_spacing must be one of {TIMESTEP_SPACINGS}, got {timestep_spacing!r}.")
        if isinstance(steps_offset, bool) or not isinstance(steps_offset, int) or steps_offset < 0:
            raise ValueError(f"steps_offset must be an integer of at least 0, got {steps_offset!r}.")
        if clip_sample and not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be above 0, got {clip_sample_range!r}.")
        if thresholding and not (0 <= dynamic_thresholding_ratio <= 1 and sample_max_value >= 1):
            raise ValueError(
                "thresholding needs dynamic_thresholding_ratio in [0, 1] and sample_max_value of at least 1, got "
                f"{dynamic_thresholding_ratio!r} and {sample_max_value!r}."
            )
        beta_schedule = beta_schedule.removesuffix(ANALYTIC_MARK) if isinstance(beta_schedule, str) else beta_schedule
        trained_betas = analytic_trained_betas if trained_betas is None else trained_betas
        schedule = (beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas)
        self.diffusion = GaussianDiffusion(
            make_betas(*schedule, rescale_betas_zero_snr),
            prediction_type,
            variance_type,
            analytic_moments=analytic_moments,
        )
        self._register_for_stock(beta_schedule, None if trained_betas is None else make_betas(*schedule).tolist())
        self.betas = self.diffusion.betas.float()
        self.alphas = self.diffusion.alphas.float()
        self.alphas_cumprod = self.diffusion.alphas_cumprod.float()
        self.init_noise_sigma = 1.0
        self.variance_type = variance_type
        self.num_inference_steps = None
        self.custom_timesteps = False
        self._use_chain(torch.arange(num_train_timesteps - 1, -1, -1, device="cpu"), self.diffusion)
        self._warn_unless_noise(
            num_train_timesteps - 1,
            "Scale the range of a linear schedule by ddpm_hf.diffusion.schedules.scale_betas_for_timesteps, or use "
            "beta_schedule='squaredcos_cap_v2', or rescale_betas_zero_snr=True with prediction_type='v_prediction'.",
        )

    def _register_for_stock(self, beta_schedule: str, trained_betas: list[float] | None) -> None:
        """Put the schedule into the configuration in terms that diffusers takes as they are meant, or refuses."""
        config = self.config
        if self.diffusion.variance_type == "analytic":
            changed = {
                "beta_schedule": beta_schedule + ANALYTIC_MARK,
                "trained_betas": None,
                "analytic_trained_betas": trained_betas,
                "analytic_moments": self.diffusion.analytic_moments.tolist(),
            }
        else:
            if trained_betas is None and beta_schedule not in STOCK_BETA_SCHEDULES:
                T = config.num_train_timesteps
                trained_betas = make_betas(beta_schedule, T, config.beta_start, config.beta_end).tolist()
            changed = {
                "beta_schedule": beta_schedule,
                "trained_betas": trained_betas,
                "analytic_trained_betas": None,
            }
        config = {**config, **changed}
        # from_config leaves out what _use_default_values lists. diffusers puts every argument given by position there,
        # so that it is lost; own arguments belong there even if None was given, or stock warns of them.
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        unchanged = [
            name
            for name in {*config.get("_use_default_values", []), *self.own_arguments}
            if config[name] is defaults[name]
            or (isinstance(config[name], (int, float, str)) and config[name] == defaults[name])
        ]
        self.register_to_config(**changed, _use_default_values=unchanged)

    @property
    def own_arguments(self) -> tuple[str, ...]:
        """Arguments that a saved file leaves out; an analytic scheduler's file is not for diffusers, and keeps them."""
        return () if self.diffusion.variance_type == "analytic" else ("analytic_moments", "analytic_trained_betas")

    def _warn_unless_noise(self, t: int, advice: str) -> None:
        if (left := self.diffusion.alphas_cumprod[t].item()) > MAX_TERMINAL_ALPHA_CUMPROD:
            logger.warning(
                "Sampling starts from pure noise at timestep %d, where %.0f %% of an image's amplitude is left "
                "(ᾱ = %.3g): images will be off. %s",
                t,
                100 * left**0.5,
                left,
                advice,
            )

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------ choosing the chain

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the chain to sample: `num_inference_steps` by the configured spacing, or `timesteps` as given.

        Sets `timesteps`, int64, in descending order, exactly as many as asked for. Raises ValueError unless exactly
        one of the two is given, for a count outside 1..T, and for timesteps that do not descend within 0..T−1.
        `add_noise`, `get_velocity`, and `step` at timesteps that are not on the chain stay those of the full chain.
        """
        T = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "set_timesteps needs exactly one of num_inference_steps and timesteps, got "
                f"num_inference_steps={num_inference_steps!r}, timesteps={timesteps!r}."
            )
        if timesteps is not None:
            chosen = as_timesteps(timesteps)
            if (chosen.diff() >= 0).any():
                raise ValueError(f"timesteps must be in strictly descending order, got {timesteps!r}.")
        elif isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, Integral):
            raise TypeError(f"num_inference_steps must be an int, got {num_inference_steps!r}.")
        elif not 1 <= num_inference_steps <= T:
            raise ValueError(f"num_inference_steps must lie in 1..{T}, the model's own T, got {num_inference_steps}.")
        else:
            spacing = self.config.timestep_spacing
            chosen = spaced_timesteps(T, int(num_inference_steps), spacing, self.config.steps_offset)
            if chosen[0] < T - 1 and self.diffusion.alphas_cumprod[-1] <= MAX_TERMINAL_ALPHA_CUMPROD:
                self._warn_unless_noise(
                    int(chosen[0]), f"Use timestep_spacing='trailing' for {num_inference_steps} steps, not {spacing!r}."
                )
        chain = self.diffusion.strided(chosen)
        self.num_inference_steps = len(chosen)
        self.custom_timesteps = timesteps is not None
        self._use_chain(chosen, chain, device)

    def _use_chain(self, timesteps: torch.Tensor, chain: GaussianDiffusion, device=None) -> None:
        previous = torch.arange(-1, self.config.num_train_timesteps - 1, device="cpu")
        previous[timesteps] = torch.cat([timesteps[1:], torch.tensor([-1], device="cpu")])
        self._previous = previous.tolist()
        self._chain = chain
        self.timesteps = timesteps.to(device)
        # Here rather than in the first step: no copy from the host, nor in a compiled graph a second compilation.
        self._chain.lookup.cache_tables(self.timesteps.device)
        self.diffusion.lookup.cache_tables(self.timesteps.device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """The timestep that `step` goes to from `timestep`; −1 stands for the image."""
        if isinstance(timestep, torch.Tensor):
            return torch.tensor(self._previous, device=timestep.device)[timestep]
        return self._previous[timestep]

    def scale_model_input(self, sample: torch.Tensor, timestep: Timestep | None = None) -> torch.Tensor:
        """The sample itself: DDPM models take x_t as it is."""
        return sample

    # ------------------------------------------------------------------ sampling

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timestep,
        sample: torch.Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draw x_{t−1} from p_θ(x_{t−1} | x_t) (eq. 11), t−1 being the next timestep of the chain.

        Args:
            model_output: the network's output at (x_t, t): shape (B, C, H, W), or (B, 2C, H, W) for a learned variance.
            timestep: t, an int, a 0-d tensor or a tensor (B,).
            sample: x_t, shape (B, C, H, W).
            generator: of the noise z; one, or a list of one per sample. (`torch.compile` takes no generators.)
            variance_noise: z itself, shape of `sample`, in place of drawing it.

        Returns `DDPMSchedulerOutput(prev_sample, pred_original_sample)`, or the tuple of the two; dtype of `sample`.
        Raises ValueError or TypeError for shapes, timesteps and generators that do not fit.
        """
        if isinstance(generator, (list, tuple)):
            if len(generator) != sample.shape[0]:
                raise ValueError(
                    f"generator must be one per sample: got {len(generator)} for a batch of {sample.shape[0]}."
                )
            generator = list(generator)
        if variance_noise is not None and (generator is not None or variance_noise.shape != sample.shape):
            raise ValueError(
                f"variance_noise must have the sample's shape {tuple(sample.shape)} and no generator beside it, got "
                f"shape {tuple(variance_noise.shape)}{' and a generator' if generator is not None else ''}."
            )
        timestep = to_index_device(timestep, sample)
        mean, std, x_0 = self._chain.p_mean_std(model_output, sample, timestep, self._clip)
        if not (isinstance(std, float) and std == 0.0):
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, mean.dtype)
            mean = add_scaled_(mean, std, variance_noise)
        prev_sample, x_0 = mean.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample, x_0) if return_dict else (prev_sample, x_0)

    def _clip(self, x_0: torch.Tensor) -> torch.Tensor:
        if self.config.thresholding:
            return dynamic_threshold(x_0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        if self.config.clip_sample:
            return x_0.clamp_(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0

    # ------------------------------------------------------------------ training

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timestep) -> torch.Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·z (eq. 2), on the full chain; computed in at least float32, dtype of the input."""
        return self.diffusion.q_sample(original_samples, timesteps, noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timestep) -> torch.Tensor:
        """v_t = √ᾱ_t·z − √(1−ᾱ_t)·x_0, the target of v-prediction; dtype of `sample`."""
        return self.diffusion.velocity(sample, timesteps, noise).to(sample.dtype)


def dynamic_threshold(x_0: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Clamp each image to its own `ratio` quantile s of |x_0|, 1 ≤ s ≤ `max_value`, and divide by s (Imagen, 2.3)."""
    magnitude = x_0.flatten(1).abs()
    # torch.quantile refuses large inputs; two order statistics and the line between them are the same number.
    position = ratio * (magnitude.shape[1] - 1)
    low = int(position)
    below, above = (magnitude.kthvalue(min(k, magnitude.shape[1]), dim=1).values for k in (low + 1, low + 2))
    s = torch.lerp(below, above, position - low).clamp(1, max_value)
    s = s.reshape(-1, *[1] * (x_0.ndim - 1))
    return torch.maximum(torch.minimum(x_0, s), -s) / s
