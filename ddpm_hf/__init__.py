"""DDPM (Ho, Jain and Abbeel 2020) for the Hugging Face ecosystem."""

from .gaussian import GaussianDiffusion
from .pipeline import DDPMPipelineCustom
from .scheduler import DDPMSchedulerCustom
from .unet import UNet2DModelCustom

__version__ = "0.1.0"
__all__ = ["DDPMPipelineCustom", "DDPMSchedulerCustom", "GaussianDiffusion", "UNet2DModelCustom", "__version__"]
