"""DDPMSchedulerCustom: ancestral sampling of DDPM."""

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from ddpm_hf.diffusion.timesteps import Timestep, to_index_device
from ddpm_hf.schedulers.base import ChainScheduler, Generators, check_noise_arguments


class DDPMSchedulerCustom(ChainScheduler):
    """Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2), and the noising of training images.

    Arguments, defaults and methods are those of `diffusers.DDPMScheduler`. The tables are float64 (`diffusion`), every
    set of timesteps is a chain of its own whose last step adds no noise, and samples are computed in at least float32.

    Args:
        num_train_timesteps: T, the length of the chain that the model was trained on.
        beta_start, beta_end, beta_schedule: the β schedule; a name in `schedules.BETA_SCHEDULES`.
        trained_betas: T numbers to use instead of a schedule.
        variance_type: "fixed_small" (β̃_t), "fixed_large" (β_t), their "_log" forms, "learned", "learned_range", or
            "analytic", the optimal variance of Analytic-DPM (Bao et al. 2022) for the network with these moments.
        clip_sample, clip_sample_range: clamp the predicted x_0 to [-range, range].
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x_0 (Imagen) instead of
            clamping.
        timestep_spacing, steps_offset: which timesteps `set_timesteps(n)` picks (Lin et al. 2023, table 2).
        rescale_betas_zero_snr: make ᾱ_T zero.
        analytic_moments: T numbers Γ_t from `analytic.estimate_analytic_moments`, for variance_type="analytic".
        analytic_trained_betas: where the configuration of an analytic scheduler keeps `trained_betas`; not for users.

    To convert an analytic scheduler to one of diffusers, use
    `from_config(config, variance_type="fixed_small", analytic_moments=None)` first.

    Raises ValueError or TypeError that names the argument. Logs a warning if x_T would not be pure noise.
    """

    stock_class = DDPMScheduler

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
        self._set_up(variance_type)
        self.variance_type = variance_type

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timestep,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draw x_{t−1} from p_θ(x_{t−1} | x_t) (eq. 11), where t−1 is the next timestep of the chain.

        Args:
            model_output: the network's output at (x_t, t): (B, C, H, W), or (B, 2C, H, W) for a learned variance.
            timestep: t, an int, a 0-d tensor or a tensor (B,).
            sample: x_t, (B, C, H, W).
            generator: of the noise z: one, or a list with one per sample. `torch.compile` does not support generators.
            variance_noise: z, shape of `sample`, instead of a generator.

        Returns `DDPMSchedulerOutput(prev_sample, pred_original_sample)` in the dtype of `sample`, or a tuple of the two.
        Raises ValueError or TypeError that names the argument.
        """
        generator = check_noise_arguments(sample, generator, variance_noise)
        step = self._chain.p_mean_std(model_output, sample, to_index_device(timestep, sample), self.clip)
        prev_sample, x_0 = self._draw(step, sample, generator, variance_noise)
        return DDPMSchedulerOutput(prev_sample, x_0) if return_dict else (prev_sample, x_0)
