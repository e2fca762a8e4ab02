"""Deterministic DDIM (η = 0): encode images as latents, decode latents to images, interpolate between seeds.

These functions take a pipeline. Images are tensors (B, C, H, W) in [-1, 1] on input, and on output what a call of
the pipeline returns (`output_type`). Sampling uses the betas of the pipeline's scheduler, whichever class that is.

`condition` are `class_labels`, `guidance_scale` and `null_class`, as for a pipeline call. ValueError or TypeError is
raised before the first step.
"""

import math
from collections.abc import Sequence

import torch

from ddpm_hf.checks import check_int
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.pipelines import arguments
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.denoising import eval_mode
from ddpm_hf.pipelines.guidance import Denoiser
from ddpm_hf.schedulers.samplers import as_ddpm
from ddpm_hf.seeds import seed_generators


@torch.no_grad()
def encode(
    pipe: DDPMPipelineCustom,
    images: torch.Tensor,
    num_inference_steps: int | None = None,
    iterations: int = 3,
    **condition,
) -> torch.Tensor:
    """DDIM inversion (Song et al. 2021, section 4.3): the x_T, (B, C, H, W), from which `decode` gives the images.

    The DDIM step from x_s to x_t, x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε with x_0 and ε those of the network at (x_s, s), is
    solved for x_s by fixed-point iteration, starting with ε at (x_t, s). One iteration is the usual inversion. Each
    further one costs a call of the network per step, and brings `decode(encode(images))` closer to the images.
    """
    arguments.check_images(pipe, "images", images)
    iterations = check_int("iterations", iterations, 1)
    denoiser, diffusion, timesteps, x = _prepare(pipe, images, num_inference_steps, condition)
    bar_t, rest_t = 1.0, 0.0  # √ᾱ and √(1−ᾱ) of the image itself
    with eval_mode(pipe.unet):
        for s in timesteps[::-1]:
            bar_s, rest_s = diffusion.sqrt_alphas_cumprod[s].item(), diffusion.sqrt_one_minus_alphas_cumprod[s].item()
            x_s = x
            for _ in range(iterations):
                _, epsilon = _x_0_and_epsilon(denoiser, diffusion, x_s, s)
                x_s = bar_s / bar_t * x + (rest_s - bar_s / bar_t * rest_t) * epsilon
            x, bar_t, rest_t = x_s, bar_s, rest_s
    pipe.maybe_free_model_hooks()
    return x


@torch.no_grad()
def decode(
    pipe: DDPMPipelineCustom,
    latents: torch.Tensor,
    num_inference_steps: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """The images that DDIM with η = 0 and no clipping makes of x_T, (B, C, H, W)."""
    arguments.check_images(pipe, "latents", latents, in_range=False)
    arguments.check_output_type(output_type, latents.shape[1])
    denoiser, diffusion, timesteps, x = _prepare(pipe, latents, num_inference_steps, condition)
    with eval_mode(pipe.unet), pipe.progress_bar(total=len(timesteps)) as bar:
        for s, t in zip(timesteps, [*timesteps[1:], None]):
            x_0, epsilon = _x_0_and_epsilon(denoiser, diffusion, x, s)
            x = x_0 if t is None else diffusion.q_sample(x_0, t, epsilon)
            bar.update()
    pipe.maybe_free_model_hooks()
    return pipe.to_images(x, output_type)


def reconstruct(
    pipe: DDPMPipelineCustom,
    images: torch.Tensor,
    num_inference_steps: int | None = None,
    iterations: int = 3,
    output_type: str = "pil",
    **condition,
):
    """`decode(encode(images))`, which shows how much of the images the latents keep."""
    arguments.check_output_type(output_type, pipe.unet.config.in_channels)
    latents = encode(pipe, images, num_inference_steps, iterations, **condition)
    return decode(pipe, latents, num_inference_steps, output_type, **condition)


def interpolate_seeds(
    pipe: DDPMPipelineCustom,
    seed: int,
    other: int,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_inference_steps: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """DDIM from latents between the x_T of two seeds (spherical interpolation): one image for each weight."""
    weights = arguments.check_weights(weights)
    shape = arguments.check_shape(pipe.unet, 1, None)
    ends = [torch.randn(shape, generator=g) for g in seed_generators([seed, other])]
    return decode(pipe, torch.cat([slerp(*ends, w) for w in weights]), num_inference_steps, output_type, **condition)


def slerp(x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    """Spherical interpolation, sin((1−w)θ)/sin θ·x + sin(wθ)/sin θ·y, where θ is the angle between x and y,
    (1, C, H, W), as vectors. It keeps the norm of a Gaussian sample, which linear interpolation does not."""
    cosine = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0).double().clamp(-1, 1)
    theta = torch.arccos(cosine).item()
    if math.sin(theta) < 1e-4:  # (anti)parallel: the circle is undefined, or the same as the line
        return (1 - weight) * x + weight * y
    return (math.sin((1 - weight) * theta) * x + math.sin(weight * theta) * y) / math.sin(theta)


def _prepare(
    pipe: DDPMPipelineCustom, x: torch.Tensor, num_inference_steps: int | None, condition: dict
) -> tuple[Denoiser, GaussianDiffusion, list[int], torch.Tensor]:
    """The network, the formulas, the timesteps (descending), and x as the network's device wants it."""
    denoiser = arguments.prepare_denoiser(pipe, len(x), **condition)
    diffusion = as_ddpm(pipe.scheduler).diffusion
    timesteps = arguments.timesteps_from(pipe, len(diffusion) - 1, num_inference_steps)
    return denoiser, diffusion, timesteps, x.to(pipe._execution_device, torch.float32)


def _x_0_and_epsilon(
    denoiser: Denoiser, diffusion: GaussianDiffusion, x: torch.Tensor, t: int
) -> tuple[torch.Tensor, torch.Tensor]:
    output = denoiser(x, torch.tensor(t, device=x.device))[:, : x.shape[1]]
    return diffusion.predict_x_0(output, x, t), diffusion.predict_epsilon(output, x, t)
