"""Analytic-DPM (Bao et al. 2022): the optimal variance of the reverse steps from moments of the network's prediction."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.tables import working_dtype


@torch.no_grad()
def estimate_analytic_moments(
    diffusion: GaussianDiffusion,
    model: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Tensor],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate Γ_t = E‖ε_θ(x_t, t)‖²/d at every t of the chain (Analytic-DPM, eq. 8, in terms of ε).

    Args:
        model: called as `model(x_t, t)` with x_t (B, C, H, W) and the network's timesteps t (B,), int64; returns a
            prediction by `diffusion.prediction_type`. Channels after the first C (a learned variance) are ignored.
        batches: of x_0, each (B, C, H, W) in [-1, 1], on the model's device. The model runs T times on each batch. A
            hundred images in total are enough, because Γ_t is an average over all pixels as well.
        generator: of the noise, on the device of the batches.

    Returns float64 (T,) on the CPU, for `GaussianDiffusion(analytic_moments=...)`. Raises ValueError if `batches` is
    empty.
    """
    total, count = torch.zeros(len(diffusion), dtype=torch.float64), 0
    for x_0 in batches:
        moments = []
        for t, t_model in enumerate(diffusion.timesteps.tolist()):
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=working_dtype(x_0))
            x_t = diffusion.q_sample(x_0, t, noise)
            output = model(x_t, torch.full((x_0.shape[0],), t_model, device=x_0.device))
            epsilon = diffusion.predict_epsilon(output[:, : x_0.shape[1]], x_t, t)
            moments.append(epsilon.square().mean())
        total += torch.stack(moments).cpu().double() * x_0.shape[0]
        count += x_0.shape[0]
    if not count:
        raise ValueError("batches must hold at least one batch of images, got none.")
    return total / count
