"""Schedulers of diffusers by their common names, created for the chain that a model was trained on."""

import inspect

import diffusers
from diffusers import SchedulerMixin

from ddpm_hf.checks import check_choice, check_int
from ddpm_hf.interop import stock_config
from ddpm_hf.schedulers.base import TIMESTEP_SPACINGS
from ddpm_hf.schedulers.compatibility import check_scheduler
from ddpm_hf.schedulers.ddim import DDIMSchedulerCustom
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom

OWN = {"ddpm": DDPMSchedulerCustom, "ddim": DDIMSchedulerCustom}
SAMPLERS = {
    "ddpm": ("DDPMSchedulerCustom", {}),
    "ddim": ("DDIMSchedulerCustom", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "deis": ("DEISMultistepScheduler", {}),
}
RECOMMENDED_STEPS = {"unipc": 20, "ddpm": 100}  # docs/fewer-steps.md
LEAST_SIGNAL = 1e-6  # ᾱ_T below which ε hardly says anything about x_0: 4e-5 of the linear schedule, 2e-9 of the cosine


def make_sampler(name: str, scheduler: SchedulerMixin, spacing: str | None = None) -> SchedulerMixin:
    """The scheduler called `name`, a key of `SAMPLERS`, on the chain of `scheduler`.

    Args:
        spacing: of the timesteps, "trailing", "leading" or "linspace". None: that of `scheduler` for "ddpm", which is
            then returned itself if it is a DDPMSchedulerCustom, and "trailing" for the others, which starts at T−1, where
            x_t is pure noise (Lin et al. 2023, table 2).

    Raises ValueError for an unknown name or spacing, and for a scheduler that cannot sample from a DDPM.
    """
    check_choice("scheduler", name, SAMPLERS)
    if spacing is not None:
        check_choice("spacing", spacing, TIMESTEP_SPACINGS)
    if name == "ddpm":
        ddpm = as_ddpm(scheduler)
        same = spacing in (None, ddpm.config.timestep_spacing)
        return ddpm if same else DDPMSchedulerCustom.from_config(ddpm.config, timestep_spacing=spacing)
    check_scheduler(scheduler)
    class_name, options = SAMPLERS[name]
    cls, config = OWN.get(name) or getattr(diffusers, class_name), stock_config(scheduler)
    options = {**options, "timestep_spacing": spacing or "trailing"}
    can_rescale = name not in OWN and "rescale_betas_zero_snr" in inspect.signature(cls).parameters
    if can_rescale and scheduler.alphas_cumprod[-1] == 0:
        # The β are the same, and diffusers then replaces the infinite noise level at T−1 by 4096.
        options["rescale_betas_zero_snr"] = True
    return cls.from_config(config, **options)


def recommended_sampler(scheduler: SchedulerMixin) -> tuple[str, int]:
    """The name of a sampler for `make_sampler` and its number of steps, for a model with `scheduler`: DDIM for a distilled
    model, otherwise UniPC (Zhao et al. 2023), which has the best images in few steps.

    A model that predicts ε on a chain that ends in pure noise gets DDPM. Of x_T, x̂_0 has the error of ε̂ times
    √((1 − ᾱ_T)/ᾱ_T), 20,000 on the cosine schedule. A solver of the ODE keeps that error to the end; the noise of DDPM
    forgets it.
    """
    if (steps := default_steps(scheduler)) is not None:
        return "ddim", steps
    predicts_nothing = scheduler.config.prediction_type == "epsilon" and scheduler.alphas_cumprod[-1] < LEAST_SIGNAL
    name = "ddpm" if predicts_nothing else "unipc"
    return name, min(RECOMMENDED_STEPS[name], scheduler.config.num_train_timesteps)


def distilled_sampler(scheduler: SchedulerMixin, steps: int) -> DDIMSchedulerCustom:
    """DDIM on the chain of `scheduler` for a model that was distilled to `steps` steps, which its configuration records as
    `_num_inference_steps`. diffusers keeps such an entry, and is told the number of steps by its user."""
    config = make_sampler("ddim", scheduler, "trailing").config
    ddim = DDIMSchedulerCustom(**{name: config[name] for name in inspect.signature(DDIMSchedulerCustom).parameters})
    ddim.register_to_config(_num_inference_steps=steps)
    return ddim


def default_steps(scheduler: SchedulerMixin) -> int | None:
    """The steps that a model was distilled to; None for one that was not.

    Raises ValueError if the configuration records something else than a number of steps.
    """
    steps = scheduler.config.get("_num_inference_steps")
    T = scheduler.config.num_train_timesteps
    return None if steps is None else check_int("_num_inference_steps of the scheduler", steps, 1, T)


def as_ddpm(scheduler: SchedulerMixin) -> DDPMSchedulerCustom:
    """`scheduler` itself if it is a DDPMSchedulerCustom, otherwise one with its configuration."""
    if isinstance(scheduler, DDPMSchedulerCustom):
        return scheduler
    check_scheduler(scheduler)
    config = stock_config(scheduler)
    # DPM-Solver has None there, unless the variance is learned.
    variance_type = config.get("variance_type") or "fixed_small"
    if config.get("analytic_moments") is not None:
        variance_type = "analytic"
    return DDPMSchedulerCustom.from_config({**config, "variance_type": variance_type})
