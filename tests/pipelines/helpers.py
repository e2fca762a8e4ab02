"""What the tests of the pipelines share: schedulers of 20 timesteps, seeded generators, images that are not all clamped."""

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom

# Images in [0, 1] that should be the same up to the order in which float32 sums were taken.
ROUNDING = 1e-5


SHORT = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


SCHEDULERS = {
    "DDPM of this package": DDPMSchedulerCustom(**SHORT),
    "DDPM": DDPMScheduler(**SHORT),
    "DDIM": DDIMScheduler(**SHORT),
    "DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler(**SHORT),
    "DPM-Solver++ 2M SDE": diffusers.DPMSolverMultistepScheduler(**SHORT, algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++ single step": diffusers.DPMSolverSinglestepScheduler(**SHORT),
    "UniPC": diffusers.UniPCMultistepScheduler(**SHORT),
    "Euler": diffusers.EulerDiscreteScheduler(**SHORT),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(**SHORT),
    "Heun": diffusers.HeunDiscreteScheduler(**SHORT),
    "PNDM": diffusers.PNDMScheduler(**SHORT),
    "LMS": diffusers.LMSDiscreteScheduler(**SHORT),
    "DEIS": diffusers.DEISMultistepScheduler(**SHORT),
    "KDPM2": diffusers.KDPM2DiscreteScheduler(**SHORT),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe, **kwargs) -> torch.Tensor:
    result = pipe(**{"output_type": "pt", **kwargs}).images
    inside = ((result > 0) & (result < 1)).float().mean()
    assert inside > 0.05  # an image that is all clamped would hide differences
    return result


def to_unit(x: torch.Tensor) -> torch.Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


def stock_unet(unet: UNet2DModelCustom) -> UNet2DModel:
    """Stock's class with the same configuration and weights."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_") and k != "zero_init_output"}
    stock = UNet2DModel(**config).eval()
    stock.load_state_dict(unet.state_dict())
    return stock
