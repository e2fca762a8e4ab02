"""Analytic-DPM (Bao et al. 2022): the moments of a network's noise that tell the optimal variance of its reverse steps."""

from collections.abc import Callable, Iterable

import torch

from ddpm_hf.diffusion.gaussian import GaussianDiffusion, working_dtype


@torch.no_grad()
def estimate_analytic_moments(
    diffusion: GaussianDiffusion,
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Γ_t = E‖ε_θ(x_t, t)‖²/d for every t of the chain (Analytic-DPM, eq. 8, in terms of ε), for `analytic_moments`.

    Args:
        model: called as `model(x_t, t)` with x_t (B, C, H, W) and the network's own timesteps t, int64 (B,); returns
            what `diffusion.prediction_type` says (channels beyond C, a learned variance's, are left aside).
        batches: x_0, each (B, C, H, W) in [-1, 1], on the model's device. The model runs T times on each batch;
            a hundred images in all are enough, since Γ_t is an average over every pixel too.
        generator: of the noise, on the batches' device.

    Returns float64 (T,) on the CPU. Raises ValueError where `batches` is empty.
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
