"""The optimal network for pixels N(mean, variance) in closed form, to test sampling."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom

MEAN, STD = 0.3, 0.2


class GaussianUNet(ModelMixin, ConfigMixin):
    """E[ε | x_t] for x_0 ~ N(mean, std²), as a network: ε = √(1−ᾱ)·(x_t − √ᾱ·mean)/(ᾱ·std² + 1 − ᾱ).

    log SNR is interpolated between timesteps, for schedulers with fractional timesteps.
    """

    @register_to_config
    def __init__(
        self,
        sample_size=64,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        num_class_embeds=None,
        class_embed_type=None,
        mean=MEAN,
        std=STD,
    ):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))  # determines dtype and device of the network
        self.logits = torch.logit(DDPMSchedulerCustom().diffusion.alphas_cumprod).float()

    def forward(self, sample, timestep, return_dict=True):
        t = torch.as_tensor(timestep, dtype=torch.float32)
        low, high = self.logits[t.floor().long()], self.logits[t.ceil().long()]
        bar = torch.sigmoid(torch.lerp(low, high, t.frac()))
        rest = torch.sigmoid(-torch.lerp(low, high, t.frac()))
        mean, variance = self.config.mean, self.config.std**2
        return UNet2DOutput(sample=self.scale * rest.sqrt() * (sample - bar.sqrt() * mean) / (bar * variance + rest))


def gaussian_pipeline(scheduler=None, **changes) -> DDPMPipelineCustom:
    """A pipeline with this network and the chain of DDPM, T = 1000."""
    pipe = DDPMPipelineCustom(GaussianUNet(**changes), scheduler or DDPMSchedulerCustom(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe
