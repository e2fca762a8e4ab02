"""DDPM (Ho, Jain and Abbeel 2020) for the Hugging Face ecosystem."""

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.models.unet import UNet2DModelCustom
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom

__version__ = "0.1.0"
__all__ = ["DDPMPipelineCustom", "DDPMSchedulerCustom", "GaussianDiffusion", "UNet2DModelCustom", "__version__"]
