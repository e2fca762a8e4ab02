"""Edit images with a trained model: image to image, interpolation, denoising, inpainting.

These functions take a pipeline and images: tensors (B, C, H, W) in [-1, 1], arrays (B, H, W, C) in [0, 1] or of integers,
PIL images, names of files, or a list of these (`ddpm_hf.pipelines.inputs.to_images`). They return images as a call of the
pipeline does (`output_type`). They sample by DDPM's ancestral steps with the betas of the pipeline's scheduler,
whichever class that is.

`options` and `condition` are keyword arguments of a pipeline call: `generator` (one, or a list of one per image) or
`seed` (image i of the batch gets the noise of image i of the seed), `output_type`, and for class-conditional models
`class_labels`, `guidance_scale` and `null_class`, and for all `guidance` and `guidance_gradient`. ValueError or TypeError is raised before the first step; ValueError
after the last one if the result is NaN or infinite, as by a pipeline call.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch

from ddpm_hf.checks import check_float, check_int
from ddpm_hf.pipelines import arguments
from ddpm_hf.pipelines.arguments import Generators
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.denoising import RecordedSteps, eval_mode
from ddpm_hf.pipelines.inputs import GivenImages, to_images, to_mask
from ddpm_hf.schedulers.samplers import as_ddpm


def image_to_image(
    pipe: DDPMPipelineCustom,
    images: GivenImages,
    timestep: int | None = None,
    num_inference_steps: int | None = None,
    *,
    strength: float | None = None,
    **options,
):
    """Noise the images up to a timestep, x_t ~ q(x_t | x_0), and sample from there (SDEdit, Meng et al. 2022).

    Args:
        timestep: t. The larger it is, the more of the image changes.
        num_inference_steps: with `timestep`, the number of steps from t to the image; None runs all t + 1.
        strength: instead of `timestep`, the share of the chain that is run, in (0, 1], as in diffusers: of
            `num_inference_steps` (T for None) steps of the whole chain, the last int(num_inference_steps·strength).
    """
    images = to_images(pipe, "images", images)
    timesteps = arguments.timesteps_from(pipe, timestep, num_inference_steps, strength)
    return _sample_from(pipe, images, 0.0, timesteps, **options)


def interpolate(
    pipe: DDPMPipelineCustom,
    images: GivenImages,
    others: GivenImages,
    timestep: int | None = None,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_inference_steps: int | None = None,
    *,
    strength: float | None = None,
    seed: int = 0,
    **options,
) -> list:
    """Mix pairs of images in the latent space of a timestep, (1−λ)·x_t + λ·x'_t, and sample from there (DDPM,
    section 4.3). `timestep`, `num_inference_steps` and `strength` are those of `image_to_image`.

    Returns one entry for each weight λ: what `image_to_image` returns for the mixed images. Both images of a pair
    and all λ share the noise. The mixture therefore has the variance that the network expects, and λ = 0 and 1 give
    exactly what `image_to_image` gives for the two images with that seed.
    """
    images, others = to_images(pipe, "images", images), to_images(pipe, "others", others)
    if others.shape != images.shape:
        raise ValueError(f"others must have the shape of images, {tuple(images.shape)}, got {tuple(others.shape)}.")
    timesteps = arguments.timesteps_from(pipe, timestep, num_inference_steps, strength)
    # With shared noise, mixing x_t and x'_t is the same as mixing the images.
    return [
        _sample_from(pipe, (1 - w) * images + w * others, 0.0, timesteps, seed=seed, **options)
        for w in arguments.check_weights(weights)
    ]


def denoise_image(
    pipe: DDPMPipelineCustom, images: GivenImages, noise_std: float, num_inference_steps: int | None = None, **options
):
    """Remove Gaussian noise of a known standard deviation (for images in [-1, 1]): a sample of p(x_0 | image).

    An image y = x_0 + σ·n is √ᾱ_t·y = x_t for the t with (1−ᾱ_t)/ᾱ_t = σ². The first t at or above σ is used, and
    the noise that y lacks is added. With `num_inference_steps=1` the result is E[x_0 | x_t], which has the least mean
    squared error; None runs all t + 1 steps, for a sample as sharp as the model's own.
    """
    images = to_images(pipe, "images", images, in_range=False)
    noise_to_signal = as_ddpm(pipe.scheduler).diffusion.sqrt_recipm1_alphas_cumprod
    noise_std = check_float("noise_std", noise_std, f"(0, {noise_to_signal[-1].item()}]")
    t = int(torch.searchsorted(noise_to_signal, torch.tensor(noise_std, dtype=torch.float64)))
    return _sample_from(pipe, images, noise_std, arguments.timesteps_from(pipe, t, num_inference_steps), **options)


@torch.no_grad()
def inpaint(
    pipe: DDPMPipelineCustom,
    images: GivenImages,
    mask: GivenImages,
    num_inference_steps: int | None = None,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    *,
    generator: Generators = None,
    seed: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """Fill in the masked pixels to match the others (RePaint, Lugmayr et al. 2022, algorithm 1).

    Args:
        mask: 1 or True for pixels to fill in; the others keep their exact values. (H, W), or (B, C, H, W) where B and
            C may be 1; or a picture, white where pixels are to be filled in.
        num_inference_steps: number of timesteps; the model's own T for None.
        jump_length, jump_n_sample: every `jump_length` steps the result is noised back up by as many, so that each
            stretch is run `jump_n_sample` times, which makes the new pixels fit the known ones. 1 and 1: no jumps.
    """
    images = to_images(pipe, "images", images)
    arguments.check_output_type(output_type, images.shape[1])
    mask = to_mask(mask, images)
    jump_length, jump_n_sample = check_int("jump_length", jump_length, 1), check_int("jump_n_sample", jump_n_sample, 1)
    _, generator = arguments.check_batch(len(images), generator, seed=seed)
    denoiser = arguments.prepare_denoiser(pipe, len(images), **condition)
    timesteps = arguments.timesteps_from(pipe, pipe.scheduler.config.num_train_timesteps - 1, num_inference_steps)
    scheduler = arguments.prepare_scheduler(as_ddpm(pipe.scheduler), None, timesteps, pipe._execution_device)
    strided = scheduler.diffusion.strided(timesteps)

    x = arguments.draw_noise(pipe, images.shape, generator)
    images, mask = images.to(x), mask.to(x.device)
    ascending = timesteps[::-1]
    levels = list(repaint_levels(len(timesteps), jump_length, jump_n_sample))
    recorded = RecordedSteps()
    with eval_mode(pipe.unet.modules()), pipe.progress_bar(total=len(levels) - 1) as bar:
        for level, next_level in zip(levels, levels[1:]):
            t = ascending[level]
            if next_level > level:
                x = strided.q_step(x, ascending[next_level], arguments.draw_noise(pipe, x.shape, generator))
            else:
                output = denoiser(x, torch.tensor(t, device=x.device))
                generated = scheduler.step(output, t, x, generator=generator).prev_sample
                known = images
                if next_level >= 0:
                    noise = arguments.draw_noise(pipe, x.shape, generator)
                    known = scheduler.diffusion.q_sample(images, ascending[next_level], noise)
                x = torch.where(mask, generated, known)
            recorded.add(t, x)
            bar.update()
    pipe.maybe_free_model_hooks()
    return pipe.to_images(x, output_type, recorded)


def repaint_levels(steps: int, jump_length: int, jump_n_sample: int) -> Iterator[int]:
    """The noise levels that RePaint visits (its appendix): steps − 1 is that of x_T, −1 that of the image. At each
    multiple of `jump_length` it jumps back up by as much, `jump_n_sample` − 1 times."""
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    level = steps - 1
    yield level
    while level >= 0:
        level -= 1
        yield level
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            for _ in range(jump_length):
                level += 1
                yield level


def _sample_from(
    pipe: DDPMPipelineCustom,
    images: torch.Tensor,
    image_std: float,
    timesteps: list[int],
    *,
    generator: Generators = None,
    seed: int | None = None,
    **options,
):
    """Sample along the timesteps from x_t = √ᾱ_t·y + √(1 − ᾱ_t − ᾱ_t·σ²)·z at the first of them, where the images y hold
    noise of standard deviation σ."""
    _, generator = arguments.check_batch(len(images), generator, seed=seed)
    t = timesteps[0]
    ancestral = copy.copy(pipe)
    ancestral.scheduler = as_ddpm(pipe.scheduler)
    diffusion = ancestral.scheduler.diffusion
    signal, total_std = diffusion.sqrt_alphas_cumprod[t].item(), diffusion.sqrt_one_minus_alphas_cumprod[t].item()
    noise = arguments.draw_noise(pipe, images.shape, generator)
    missing_std = math.sqrt(max(total_std**2 - (signal * image_std) ** 2, 0.0))
    x_t = torch.add(signal * images.to(noise), noise, alpha=missing_std)
    return ancestral(len(images), generator, timesteps=timesteps, latents=x_t, **options)[0]
