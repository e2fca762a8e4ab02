"""There and back without noise: images to latents, latents to images, and the way from one to another (DDIM).

Functions of a pipeline. Images go in as tensors (B, C, H, W) in [-1, 1] and come out as a call of the pipeline gives
them (`output_type`). They run DDIM with η = 0 on the chain
of the pipeline's scheduler, whichever scheduler that is.

`condition` stands for `class_labels`, `guidance_scale` and `null_class`, as for a call. Every
function raises ValueError or TypeError, naming the argument, before the first step.
"""

import math
from collections.abc import Sequence

import torch

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.pipelines.arguments import check_output_type, check_shape
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.denoising import eval_mode
from ddpm_hf.pipelines.editing_arguments import chain_from, check_images, check_weights, denoiser_of
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
    """The x_T, (B, C, H, W), from which `decode` makes the images: DDIM run backwards (Song et al. 2021, section 4.3).

    The DDIM step from x_s to x_t, x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε with x_0 and ε those of the network at (x_s, s), is
    solved for x_s by fixed-point iteration from ε at (x_t, s). One iteration is the usual inversion; each more is
    another call of the network per step, and brings `decode(encode(images))` closer to the images.
    """
    check_images(pipe, "images", images)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations!r}.")
    denoiser = denoiser_of(pipe, len(images), condition)
    diffusion = as_ddpm(pipe.scheduler).diffusion
    x = images.to(device=pipe._execution_device, dtype=torch.float32)
    bar_t, rest_t = 1.0, 0.0  # √ᾱ and √(1−ᾱ) of the image itself
    with eval_mode(pipe.unet):
        for s in chain_from(pipe, len(diffusion) - 1, num_inference_steps)[::-1]:
            bar_s, rest_s = (
                diffusion.tables[n][s].item() for n in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
            )
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
    """The images that DDIM without noise (η = 0, nothing clipped) makes of x_T, (B, C, H, W)."""
    if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
        raise ValueError(f"latents must be a tensor (B, C, H, W), got {getattr(latents, 'shape', latents)!r}.")
    check_shape(pipe.unet, len(latents), latents)
    check_output_type(output_type, latents.shape[1])
    denoiser = denoiser_of(pipe, len(latents), condition)
    diffusion = as_ddpm(pipe.scheduler).diffusion
    chain = chain_from(pipe, len(diffusion) - 1, num_inference_steps)
    x = latents.to(device=pipe._execution_device, dtype=torch.float32)
    with eval_mode(pipe.unet), pipe.progress_bar(total=len(chain)) as bar:
        for s, t in zip(chain, [*chain[1:], None]):
            x_0, epsilon = _x_0_and_epsilon(denoiser, diffusion, x, s)
            x = x_0 if t is None else diffusion.q_sample(x_0, t, epsilon)
            bar.update()
    pipe.maybe_free_model_hooks()
    return pipe.to_images(x, output_type)


def reconstruct(pipe: DDPMPipelineCustom, images: torch.Tensor, num_inference_steps: int | None = None, **options):
    """`decode(encode(images))`: what of the images survives; options as for the two."""
    output_type = options.pop("output_type", "pil")
    check_output_type(output_type, pipe.unet.config.in_channels)
    iterations = options.pop("iterations", 3)
    latents = encode(pipe, images, num_inference_steps, iterations, **options)
    return decode(pipe, latents, num_inference_steps, output_type, **options)


def interpolate_seeds(
    pipe: DDPMPipelineCustom,
    seed: int,
    other: int,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_inference_steps: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """The images on the great circle between x_T of two seeds, by DDIM: one for each weight from 0 to 1."""
    weights = check_weights(weights)
    shape = check_shape(pipe.unet, 1, None)
    ends = [torch.randn(shape, generator=g) for g in seed_generators([seed, other])]
    return decode(pipe, torch.cat([slerp(*ends, w) for w in weights]), num_inference_steps, output_type, **condition)


def slerp(x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    """sin((1−w)θ)/sin θ·x + sin(wθ)/sin θ·y, θ the angle between x and y as vectors, (1, C, H, W): it keeps the
    length of a Gaussian sample, which a straight line does not."""
    cosine = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0).double().clamp(-1, 1)
    theta = torch.arccos(cosine).item()
    if math.sin(theta) < 1e-4:  # along one line: the circle is not determined, or is the chord
        return (1 - weight) * x + weight * y
    return (math.sin((1 - weight) * theta) * x + math.sin(weight * theta) * y) / math.sin(theta)


def _x_0_and_epsilon(
    denoiser: Denoiser, diffusion: GaussianDiffusion, x: torch.Tensor, t: int
) -> tuple[torch.Tensor, torch.Tensor]:
    output = denoiser(x, torch.tensor(t, device=x.device))[:, : x.shape[1]]
    return diffusion.predict_x_0(output, x, t), diffusion.predict_epsilon(output, x, t)
