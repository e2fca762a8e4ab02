"""What a trained model can do with an image that is there: mix it, fill it in, redo it, clean it.

Functions of a pipeline. Images go in as tensors (B, C, H, W) in [-1, 1] and come out as a call of the pipeline gives
them (`output_type`). They sample
by DDPM's ancestral steps on the chain of the pipeline's scheduler, whichever scheduler that is.

`condition` stands for `class_labels`, `guidance_scale` and `null_class`, as for a call. Noise comes from `generator`
(one, or a list of one per image) or from `seed`: image i of a batch then gets that of image i of the seed. Every
function raises ValueError or TypeError, naming the argument, before the first step.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch

from ddpm_hf.pipelines.arguments import Generators, check_batch, check_output_type
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.denoising import eval_mode
from ddpm_hf.pipelines.editing_arguments import (
    chain_from,
    check_images,
    check_mask,
    check_weights,
    denoiser_of,
    noise_for,
)
from ddpm_hf.schedulers.samplers import as_ddpm


def image_to_image(
    pipe: DDPMPipelineCustom,
    images: torch.Tensor,
    timestep: int,
    num_inference_steps: int | None = None,
    *,
    generator: Generators = None,
    seed: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """Noise the images up to `timestep`, x_t ~ q(x_t | x_0), and sample from there (SDEdit, Meng et al. 2022).

    The larger t, the more is made anew. `num_inference_steps`: of the way from t to the image; all t + 1 if None.
    """
    check_images(pipe, "images", images)
    check_output_type(output_type, images.shape[1])
    _, generator = check_batch(len(images), generator, None, seed, 0)
    chain = chain_from(pipe, timestep, num_inference_steps)
    noise = noise_for(pipe, images, generator)
    x_t = as_ddpm(pipe.scheduler).diffusion.q_sample(images.to(noise), timestep, noise)
    return _sample_from(pipe, x_t, chain, generator, output_type, condition)


def interpolate(
    pipe: DDPMPipelineCustom,
    images: torch.Tensor,
    others: torch.Tensor,
    timestep: int,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_inference_steps: int | None = None,
    *,
    seed: int = 0,
    output_type: str = "pil",
    **condition,
) -> list:
    """Mix pairs of images in the latent of `timestep`, (1−λ)·x_t + λ·x'_t, and sample from there (DDPM, section 4.3).

    Returns one entry for each weight λ: what `image_to_image` returns of the mixed images. Noise is the same for
    every λ and for both images of a pair, so that the mixture has the variance that the network expects, and so that
    λ = 0 and 1 give exactly what `image_to_image` makes of the one and the other with that seed.
    """
    check_images(pipe, "images", images)
    check_images(pipe, "others", others)
    if others.shape != images.shape:
        raise ValueError(f"others must have the shape of images, {tuple(images.shape)}, got {tuple(others.shape)}.")
    weights = check_weights(weights)
    options = {"seed": seed, "output_type": output_type, **condition}
    # The noise being shared, mixing x_t and x'_t is mixing the images.
    return [
        image_to_image(pipe, (1 - w) * images + w * others, timestep, num_inference_steps, **options) for w in weights
    ]


def denoise_image(
    pipe: DDPMPipelineCustom,
    images: torch.Tensor,
    noise_std: float,
    num_inference_steps: int | None = None,
    *,
    generator: Generators = None,
    seed: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """Take Gaussian noise of a known standard deviation (of images in [-1, 1]) off: a sample of p(x_0 | image).

    An image y = x_0 + σ·n is √ᾱ_t·y = x_t for the t with (1−ᾱ_t)/ᾱ_t = σ². The first t at or above σ is taken, and
    what is missing to its noise is added. With `num_inference_steps=1` the result is E[x_0 | x_t], which has the
    least mean squared error; None runs all t + 1 steps, for a sample as sharp as the model's own.
    """
    check_images(pipe, "images", images, in_range=False)
    check_output_type(output_type, images.shape[1])
    diffusion = as_ddpm(pipe.scheduler).diffusion
    levels = diffusion.sqrt_recipm1_alphas_cumprod
    if isinstance(noise_std, bool) or not isinstance(noise_std, (int, float)) or not 0 < noise_std <= levels[-1]:
        raise ValueError(f"noise_std must lie above 0 and at most at {levels[-1]:.4g}, got {noise_std!r}.")
    _, generator = check_batch(len(images), generator, None, seed, 0)
    t = int(torch.searchsorted(levels, torch.tensor(noise_std, dtype=torch.float64)))
    chain = chain_from(pipe, t, num_inference_steps)
    noise = noise_for(pipe, images, generator)
    missing = math.sqrt(max(levels[t].item() ** 2 - noise_std**2, 0.0))
    x_t = diffusion.sqrt_alphas_cumprod[t].item() * (images.to(noise) + missing * noise)
    return _sample_from(pipe, x_t, chain, generator, output_type, condition)


@torch.no_grad()
def inpaint(
    pipe: DDPMPipelineCustom,
    images: torch.Tensor,
    mask: torch.Tensor,
    num_inference_steps: int | None = None,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    *,
    generator: Generators = None,
    seed: int | None = None,
    output_type: str = "pil",
    **condition,
):
    """Fill in what the mask covers, in keeping with the rest (RePaint, Lugmayr et al. 2022, algorithm 1).

    Args:
        mask: 1 or True where pixels are made anew; the others stay exactly as they are. (H, W), or (B, C, H, W)
            where B and C may be 1.
        num_inference_steps: of the chain; the model's own T when left out.
        jump_length, jump_n_sample: each stretch of `jump_length` steps is gone through `jump_n_sample` times, being
            noised back up in between, which brings the new pixels into line with the known ones. 1 and 1: once.
    """
    check_images(pipe, "images", images)
    check_output_type(output_type, images.shape[1])
    mask = check_mask(mask, images)
    for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    _, generator = check_batch(len(images), generator, None, seed, 0)
    denoiser = denoiser_of(pipe, len(images), condition)
    scheduler = copy.deepcopy(as_ddpm(pipe.scheduler))
    T = len(scheduler)
    chain = chain_from(pipe, T - 1, num_inference_steps)
    scheduler.set_timesteps(timesteps=chain, device=pipe._execution_device)
    strided = scheduler.diffusion.strided(chain)

    x = noise_for(pipe, images, generator)
    images, mask = images.to(x), mask.to(x.device)
    ascending = chain[::-1]
    levels = list(repaint_levels(len(chain), jump_length, jump_n_sample))
    with eval_mode(pipe.unet), pipe.progress_bar(total=len(levels) - 1) as bar:
        for level, following in zip(levels, levels[1:]):
            if following > level:
                x = strided.q_step(x, ascending[following], noise_for(pipe, x, generator))
            else:
                t = ascending[level]
                output = denoiser(x, torch.tensor(t, device=x.device))
                made = scheduler.step(output, t, x, generator=generator).prev_sample
                known = images
                if following >= 0:
                    known = scheduler.diffusion.q_sample(images, ascending[following], noise_for(pipe, x, generator))
                x = torch.where(mask, made, known)
            bar.update()
    pipe.maybe_free_model_hooks()
    return pipe.to_images(x, output_type)


def repaint_levels(steps: int, jump_length: int, jump_n_sample: int) -> Iterator[int]:
    """The noise levels that RePaint goes through (its appendix): steps − 1 is that of x_T, −1 is the image. At each
    multiple of `jump_length` it turns back by as much, `jump_n_sample` − 1 times."""
    turns = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    level = steps - 1
    yield level
    while level >= 0:
        level -= 1
        yield level
        if turns.get(level, 0) > 0:
            turns[level] -= 1
            for _ in range(jump_length):
                level += 1
                yield level


def _sample_from(pipe, x_t, chain, generator, output_type, condition):
    ddpm = copy.copy(pipe)
    ddpm.scheduler = as_ddpm(pipe.scheduler)
    steps = ddpm.denoise(len(x_t), generator, timesteps=chain, latents=x_t, **condition)
    with pipe.progress_bar(total=len(steps)) as bar:
        for step in steps:
            x = step.x
            bar.update()
    return pipe.to_images(x, output_type)
