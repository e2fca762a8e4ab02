"""DDIMSchedulerCustom: deterministic sampling, and everything between it and DDPM."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from ddpm_hf.checks import check_bool, check_float
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.timesteps import Timestep, to_index_device
from ddpm_hf.schedulers.base import ChainScheduler, Generators, check_noise_arguments


class DDIMSchedulerCustom(ChainScheduler):
    """DDIM (Song et al. 2021): sampling with any amount of noise per step, from none (η = 0) to that of DDPM (η = 1).

    Arguments, defaults and methods are those of `diffusers.DDIMScheduler`. Every step goes to the next of the timesteps
    that were set, whichever they are. (diffusers' goes to t − T//n, which is another one if n does not divide T.)

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the chain, as
            for `DDPMSchedulerCustom`.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: clamping of the
            predicted x_0, as for `DDPMSchedulerCustom`.
        set_alpha_to_one: end at the image. False: end at x_t of timestep 0, as some latent diffusion models do.
        prediction_type: "epsilon", "sample" or "v_prediction". Channels for a learned variance are not used: σ_t is
            given by η.
        timestep_spacing, steps_offset: which timesteps `set_timesteps(n)` picks (Lin et al. 2023, table 2).
        analytic_moments: T numbers Γ_t from `analytic.estimate_analytic_moments`, for the optimal variance of
            Analytic-DPM (Bao et al. 2022). It is above 0 for η = 0 too.
        analytic_trained_betas: where the configuration of an analytic scheduler keeps `trained_betas`; not for users.

    Raises ValueError or TypeError that names the argument. Logs a warning if x_T would not be pure noise.
    """

    stock_class = DDIMScheduler

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        analytic_moments: Sequence[float] | None = None,
        analytic_trained_betas: Sequence[float] | None = None,
    ):
        self._last = -1 if check_bool("set_alpha_to_one", set_alpha_to_one) else 0
        self._set_up("fixed_small" if analytic_moments is None else "analytic")

    def _sub_chain(self, timesteps: torch.Tensor) -> GaussianDiffusion:
        if self.config.set_alpha_to_one:
            return super()._sub_chain(timesteps)
        return super()._sub_chain(torch.cat([timesteps, timesteps.new_zeros(1)]).unique()).ending_at_timestep_0()

    def adds_noise(self, eta: float = 0.0) -> bool:
        return eta > 0 or self.diffusion.variance_type == "analytic"

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timestep,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x_{t−1} of DDIM (its eqs. 12 and 16), where t−1 is the next timestep of the chain.

        Args:
            model_output: the network's output at (x_t, t): (B, C, H, W), or (B, 2C, H, W), of which C are used.
            timestep: t, an int, a 0-d tensor or a tensor (B,).
            sample: x_t, (B, C, H, W).
            eta: η in [0, 1], the amount of noise.
            use_clipped_model_output: compute ε from the clipped x_0 (as improved-diffusion does), not from the model's
                output. Without clipping the two are the same.
            generator: of the noise z: one, or a list with one per sample. `torch.compile` does not support generators.
            variance_noise: z, shape of `sample`, instead of a generator.

        Returns `DDIMSchedulerOutput(prev_sample, pred_original_sample)` in the dtype of `sample`, or a tuple of the two.
        Raises ValueError or TypeError that names the argument.
        """
        if not (type(eta) is float and 0 <= eta <= 1):  # as in every step of a pipeline, which needs no message
            eta = check_float("eta", eta, "[0, 1]")
        generator = check_noise_arguments(sample, generator, variance_noise)
        if sample.ndim > 1 and model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        t = to_index_device(timestep, sample)
        step = self._chain.ddim_mean_std(model_output, sample, t, eta, self.clip, use_clipped_model_output)
        prev_sample, x_0 = self._draw(step, sample, generator, variance_noise)
        return DDIMSchedulerOutput(prev_sample, x_0) if return_dict else (prev_sample, x_0)
