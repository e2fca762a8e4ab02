"""Deterministic DDIM (η = 0): encode images as latents, decode latents to images, interpolate between seeds.

These functions take a pipeline. Images are what `ddpm_hf.pipelines.inputs.to_images` takes, and on output what a call of
the pipeline returns (`output_type`). Sampling uses the betas of the pipeline's scheduler, whichever class that is.

`condition` are `class_labels`, `guidance_scale`, `null_class`, `guidance` and `guidance_gradient`, as for a pipeline call. ValueError or TypeError is
raised before the first step.
"""

import copy
import math
from collections.abc import Sequence

import torch

from ddpm_hf.checks import check_int
from ddpm_hf.pipelines import arguments
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.denoising import RecordedSteps, eval_mode
from ddpm_hf.pipelines.inputs import GivenImages, check_images, to_images
from ddpm_hf.schedulers.ddim import DDIMSchedulerCustom
from ddpm_hf.schedulers.samplers import as_ddpm
from ddpm_hf.seeds import seed_generators


@torch.no_grad()
def encode(
    pipe: DDPMPipelineCustom,
    images: GivenImages,
    num_inference_steps: int | None = None,
    iterations: int = 3,
    **condition,
) -> torch.Tensor:
    """DDIM inversion (Song et al. 2021, section 4.3): the x_T, (B, C, H, W), from which `decode` gives the images.

    The DDIM step from x_s to x_t, x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε with x_0 and ε those of the network at (x_s, s), is
    solved for x_s by fixed-point iteration, starting with ε at (x_t, s). One iteration is the usual inversion. Each
    further one costs a call of the network per step, and brings `decode(encode(images))` closer to the images.
    """
    images = to_images(pipe, "images", images)
    iterations = check_int("iterations", iterations, 1)
    denoiser = arguments.prepare_denoiser(pipe, len(images), **condition)
    diffusion, x = as_ddpm(pipe.scheduler).diffusion, images.to(pipe._execution_device, torch.float32)
    timesteps = arguments.timesteps_from(pipe, len(diffusion) - 1, num_inference_steps)
    bar_t, rest_t = 1.0, 0.0  # √ᾱ and √(1−ᾱ) of the image itself
    with eval_mode(pipe.unet.modules()):
        for s in timesteps[::-1]:
            bar_s, rest_s = diffusion.sqrt_alphas_cumprod[s].item(), diffusion.sqrt_one_minus_alphas_cumprod[s].item()
            x_s = x
            for _ in range(iterations):
                output = denoiser(x_s, torch.tensor(s, device=x.device))[:, : x.shape[1]]
                epsilon = diffusion.predict_epsilon(output, x_s, s)
                x_s = bar_s / bar_t * x + (rest_s - bar_s / bar_t * rest_t) * epsilon
            x, bar_t, rest_t = x_s, bar_s, rest_s
    pipe.maybe_free_model_hooks()
    return x


def decode(
    pipe: DDPMPipelineCustom,
    latents: torch.Tensor,
    num_inference_steps: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """The images that DDIM with η = 0 and no clipping makes of x_T, (B, C, H, W)."""
    check_images(pipe, "latents", latents, in_range=False)
    arguments.check_output_type(output_type, latents.shape[1])
    deterministic = copy.copy(pipe)
    deterministic.scheduler = DDIMSchedulerCustom.from_config(
        as_ddpm(pipe.scheduler).config, clip_sample=False, thresholding=False, analytic_moments=None
    )
    denoiser = arguments.prepare_denoiser(deterministic, len(latents), **condition)
    timesteps = arguments.timesteps_from(pipe, len(deterministic.scheduler) - 1, num_inference_steps)
    scheduler = arguments.prepare_scheduler(deterministic.scheduler, None, timesteps, pipe._execution_device)
    # Not a call of the pipeline, which takes latents of the network's sample_size alone.
    inputs, recorded = arguments.SamplingInputs(denoiser, scheduler, latents.shape, None, latents, {}), RecordedSteps()
    with pipe.progress_bar(total=len(timesteps)) as bar:
        for step in deterministic.denoise_inputs(inputs):
            recorded.add(step.t, step.x)
            bar.update()
    return pipe.to_images(step.x, output_type, recorded)


def reconstruct(
    pipe: DDPMPipelineCustom,
    images: GivenImages,
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
