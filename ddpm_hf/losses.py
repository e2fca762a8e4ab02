"""What training minimises, and where in the chain it looks."""

import torch

from .gaussian import GaussianDiffusion, working_dtype


def prediction_target(
    diffusion: GaussianDiffusion, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """What the network should output at t, by `prediction_type`: ε, x_0 or v; shape of `x_0`, at least float32."""
    if diffusion.prediction_type == "epsilon":
        return noise.to(working_dtype(x_0))
    if diffusion.prediction_type == "sample":
        return x_0.to(working_dtype(x_0))
    return diffusion.velocity(x_0, t, noise)


def denoising_loss(
    unet: torch.nn.Module,
    diffusion: GaussianDiffusion,
    x_0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_simple of each example (DDPM eq. 14): the mean over pixels of ‖target − f_θ(x_t, t)‖².

    Args:
        unet: called as unet(x_t, t, class_labels); its output is taken to at least float32.
        x_0: images (B, C, H, W) in [-1, 1], float32.
        t: timesteps (B,), int64. noise: z ~ N(0, I), shape of `x_0`.

    Returns (B,).
    """
    x_t = diffusion.q_sample(x_0, t, noise)
    output = unet(x_t, t, class_labels, return_dict=False)[0]
    target = prediction_target(diffusion, x_0, t, noise)
    return (output.to(target.dtype) - target).square().flatten(1).mean(1)


def uniform_timesteps(batch_size: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) independent timesteps, uniform over 0..T−1 (DDPM, algorithm 1)."""
    return torch.randint(T, (batch_size,), generator=generator, device=generator.device)


def stratified_timesteps(batch_size: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) timesteps, each uniform over 0..T−1, that share the range out evenly: one in each B-th of it.

    The loss has the same expectation and less variance. (The low-discrepancy sampler of variational diffusion
    models, Kingma et al. 2021, appendix I.1, on a finite chain.)
    """
    offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    position = torch.arange(batch_size, device=generator.device, dtype=torch.float64) / batch_size
    return (((position + offset) % 1) * T).long().clamp(max=T - 1)


TIMESTEP_SAMPLERS = {"uniform": uniform_timesteps, "stratified": stratified_timesteps}
