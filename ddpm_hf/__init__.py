"""DDPM (Ho, Jain and Abbeel 2020) for the Hugging Face ecosystem."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_hf.diffusion.gaussian import GaussianDiffusion
    from ddpm_hf.models.unet import UNet2DModelCustom
    from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
    from ddpm_hf.pipelines.grids import image_grid
    from ddpm_hf.schedulers.ddim import DDIMSchedulerCustom
    from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom

__version__ = "0.2.0"
__all__ = [
    "DDIMSchedulerCustom",
    "DDPMPipelineCustom",
    "DDPMSchedulerCustom",
    "GaussianDiffusion",
    "UNet2DModelCustom",
    "__version__",
    "image_grid",
]
_MODULES = {
    "DDIMSchedulerCustom": "ddpm_hf.schedulers.ddim",
    "DDPMPipelineCustom": "ddpm_hf.pipelines.ddpm",
    "DDPMSchedulerCustom": "ddpm_hf.schedulers.ddpm",
    "GaussianDiffusion": "ddpm_hf.diffusion.gaussian",
    "UNet2DModelCustom": "ddpm_hf.models.unet",
    "image_grid": "ddpm_hf.pipelines.grids",
}


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562): the commands parse their options before torch is imported, which takes seconds.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
