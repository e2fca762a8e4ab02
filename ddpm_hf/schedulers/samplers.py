"""Schedulers of diffusers by their common names, created for the chain that a model was trained on."""

import diffusers
from diffusers import SchedulerMixin

from ddpm_hf.checks import check_choice
from ddpm_hf.interop import stock_config
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom

# Trailing spacing starts at T−1, where x_t is pure noise (Lin et al. 2023, table 2).
_TRAILING = {"timestep_spacing": "trailing"}
SAMPLERS = {
    "ddpm": ("DDPMSchedulerCustom", {}),
    "ddim": ("DDIMScheduler", _TRAILING),
    "dpmsolver++": ("DPMSolverMultistepScheduler", _TRAILING),
    "dpmsolver++sde": ("DPMSolverMultistepScheduler", {**_TRAILING, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", _TRAILING),
    "heun": ("HeunDiscreteScheduler", _TRAILING),
    "euler": ("EulerDiscreteScheduler", _TRAILING),
    "lms": ("LMSDiscreteScheduler", _TRAILING),
    "pndm": ("PNDMScheduler", {**_TRAILING, "skip_prk_steps": True}),
    "deis": ("DEISMultistepScheduler", _TRAILING),
}


def make_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler called `name`, a key of `SAMPLERS`, on the chain of `scheduler`.

    "ddpm" gives `as_ddpm(scheduler)`. Raises ValueError for an unknown name.
    """
    check_choice("scheduler", name, SAMPLERS)
    class_name, options = SAMPLERS[name]
    if name == "ddpm":
        return as_ddpm(scheduler)
    return getattr(diffusers, class_name).from_config(stock_config(scheduler), **options)


def as_ddpm(scheduler: SchedulerMixin) -> DDPMSchedulerCustom:
    """`scheduler` itself if it is a DDPMSchedulerCustom, otherwise one with its configuration."""
    if isinstance(scheduler, DDPMSchedulerCustom):
        return scheduler
    config = stock_config(scheduler)
    # DPM-Solver has None there, unless the variance is learned.
    variance_type = config.get("variance_type") or "fixed_small"
    return DDPMSchedulerCustom.from_config({**config, "variance_type": variance_type})
