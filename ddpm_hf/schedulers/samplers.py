"""Schedulers of diffusers by the names people know, made for a trained model: same chain, fewer steps."""

import diffusers
from diffusers import SchedulerMixin

from ddpm_hf.interop import stock_config
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom

# Trailing spacing starts where the model's own chain starts, at pure noise (Lin et al. 2023, table 2).
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
    """The scheduler called `name`, a key of `SAMPLERS`, on the chain that `scheduler` was trained with.

    "ddpm" is `scheduler` itself where it is one. Raises ValueError for another name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"scheduler must be one of {list(SAMPLERS)}, got {name!r}.")
    class_name, options = SAMPLERS[name]
    if name == "ddpm":
        return as_ddpm(scheduler)
    return getattr(diffusers, class_name).from_config(stock_config(scheduler), **options)


def as_ddpm(scheduler: SchedulerMixin) -> DDPMSchedulerCustom:
    """Ancestral sampling on the chain of any scheduler: this package's class, with its tables and formulas."""
    if isinstance(scheduler, DDPMSchedulerCustom):
        return scheduler
    config = stock_config(scheduler)
    # Solvers without a variance have None or another word there.
    variance_type = config.get("variance_type") or "fixed_small"
    return DDPMSchedulerCustom.from_config({**config, "variance_type": variance_type})
