"""Chains, images, the exact denoiser of Gaussian data, and the bound of batches of images."""

import torch

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.likelihood import BoundSums
from ddpm_hf.diffusion.schedules import make_betas

T = 1000


def linear_chain(T=T, **arguments) -> GaussianDiffusion:
    return GaussianDiffusion(make_betas("linear", T), **arguments)


def random_images(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape or (2, 3, 4, 4), generator=generator, dtype=dtype)


def gaussian_denoiser(diffusion, mean, variance):
    """The optimal noise prediction for data N(mean, variance), from (x_t, the network's timesteps)."""
    index = {t: i for i, t in enumerate(diffusion.timesteps.tolist())}

    def model(x_t, t):
        t = torch.tensor([index[number] for number in t.tolist()])
        bar = diffusion.lookup("alphas_cumprod", t, x_t)
        return (1 - bar).sqrt() * (x_t - bar.sqrt() * mean) / (bar * variance + 1 - bar)

    return model


def gaussian_moments(diffusion, variance):
    """Γ_t = E[ε*²] of that denoiser."""
    return diffusion.one_minus_alphas_cumprod / (
        diffusion.alphas_cumprod * variance + diffusion.one_minus_alphas_cumprod
    )


def variational_bound(diffusion, model, batches, generator=None, *, stride=1, clip=None):
    """The bound of batches of images; with `stride` the i-th image has offset i modulo stride."""
    sums, done = BoundSums(len(diffusion), stride), 0
    for x_0 in batches:
        sums.add(diffusion, model, x_0, generator, torch.arange(done, done + len(x_0)) % stride, clip)
        done += len(x_0)
    return sums.result(diffusion)
