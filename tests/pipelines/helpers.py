"""Shared by the tests of the pipelines: schedulers of 20 timesteps, seeded generators, images within their range."""

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.pipelines.editing import denoise_image, image_to_image, inpaint, interpolate
from ddpm_hf.pipelines.inversion import reconstruct
from tests.conftest import TINY_SCHEDULER

# Tolerance for images in [0, 1] that differ only in the order of float32 sums.
ROUNDING = 1e-5
SHORT = TINY_SCHEDULER
SCHEDULERS = {
    "DDPM of this package": DDPMSchedulerCustom(**SHORT),
    "DDIM of this package": DDIMSchedulerCustom(**SHORT),
    "DDPM": DDPMScheduler(**SHORT),
    "DDIM": DDIMScheduler(**SHORT),
    "DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler(**SHORT),
    "DPM-Solver++ 2M SDE": diffusers.DPMSolverMultistepScheduler(**SHORT, algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++ single step": diffusers.DPMSolverSinglestepScheduler(**SHORT),
    "UniPC": diffusers.UniPCMultistepScheduler(**SHORT),
    "Euler": diffusers.EulerDiscreteScheduler(**SHORT),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(**SHORT),
    "Heun": diffusers.HeunDiscreteScheduler(**SHORT | {"beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.3}),
    "PNDM": diffusers.PNDMScheduler(**SHORT),
    "LMS": diffusers.LMSDiscreteScheduler(**SHORT),
    "DEIS": diffusers.DEISMultistepScheduler(**SHORT),
    "KDPM2": diffusers.KDPM2DiscreteScheduler(**SHORT),
}


def edits(timestep: int, steps: int, denoising_steps: int, inpainting: tuple[int, ...]) -> dict:
    """A small call of each function that edits images x, from (pipe, x) and its options to a tensor."""
    return {
        "image_to_image": lambda pipe, x, **options: image_to_image(pipe, x, timestep, steps, seed=0, **options),
        "interpolate": lambda pipe, x, **options: interpolate(pipe, x, x.flip(0), timestep, [0.5], steps, **options)[0],
        "denoise_image": lambda pipe, x, **options: denoise_image(pipe, x, 0.3, denoising_steps, seed=0, **options),
        "inpaint": lambda pipe, x, **options: inpaint(pipe, x, torch.ones(x.shape[2:]), *inpainting, seed=0, **options),
        "reconstruct": lambda pipe, x, **options: reconstruct(pipe, x, steps, **options),
    }


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe, **kwargs) -> torch.Tensor:
    """Images of a call, in [0, 1]; fails if nearly all values are clamped, which would hide differences."""
    result = pipe(**{"output_type": "pt", **kwargs}).images
    inside = ((result > 0) & (result < 1)).float().mean()
    assert inside > 0.05
    return result


def to_unit(x: torch.Tensor) -> torch.Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


def spoil(unet: torch.nn.Module, value: float, from_timestep: int, images: tuple[int, ...] = ()) -> None:
    """Let the network return `value` for these images of a batch (all if none are given) from this timestep on."""

    def hook(module, args, output):
        x, t = args
        chosen = [not images or i in images for i in range(len(x))]
        bad = torch.tensor(chosen).reshape(-1, 1, 1, 1) & (torch.as_tensor(t) <= from_timestep)
        return UNet2DOutput(torch.where(bad, value, output.sample))

    unet.register_forward_hook(hook)


def stock_unet(unet: UNet2DModelCustom) -> UNet2DModel:
    """A UNet2DModel with the same configuration and weights."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_") and k != "zero_init_output"}
    stock = UNet2DModel(**config).eval()
    stock.load_state_dict(unet.state_dict())
    return stock
