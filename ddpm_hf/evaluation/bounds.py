"""The variational bound of a model on real images. The work is spread over the processes."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate.utils import gather_object

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, GaussianDiffusion
from ddpm_hf.data.decoding import to_signed
from ddpm_hf.data.images import Images
from ddpm_hf.diffusion.analytic import estimate_analytic_moments
from ddpm_hf.diffusion.likelihood import BoundSums, VariationalBound
from ddpm_hf.diffusion.timesteps import spaced_timesteps
from ddpm_hf.evaluation.best_timesteps import best_timesteps_table, timesteps_in_table
from ddpm_hf.evaluation.measures import process_share, random_indices
from ddpm_hf.schedulers.samplers import as_ddpm
from ddpm_hf.seeds import make_generator

Measure = Callable[[GaussianDiffusion, Images, str], VariationalBound]  # of a chain; the text is part of the seed


def load_batch(images: Images, indices: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x_0 in [-1, 1] and the labels of a class-conditional model."""
    batch = images[indices]
    labels = batch["labels"].to(device) if "labels" in batch else None
    return to_signed(batch["images"].to(device)), labels


def predict(pipe: DDPMPipelineCustom, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None):
    return pipe.unet(x_t, t, labels).sample


def with_variance(
    pipe: DDPMPipelineCustom, ddpm: DDPMSchedulerCustom, variance_type: str, images: Images, num_images: int, seed: int
) -> DDPMSchedulerCustom:
    """A scheduler with another variance. The moments of "analytic" come from `num_images` of the images, unless it has them."""
    if variance_type == ddpm.config.variance_type:
        return ddpm
    moments = None
    if variance_type == "analytic":
        device = pipe.unet.device
        x_0, labels = load_batch(images, random_indices(images, seed, "moments")[:num_images], device)
        model, generator = partial(predict, pipe, labels=labels), make_generator(device, seed, "moments", 1)
        moments = estimate_analytic_moments(ddpm.diffusion, model, [x_0], generator).tolist()
    return DDPMSchedulerCustom.from_config(ddpm.config, variance_type=variance_type, analytic_moments=moments)


def measure_bound(
    pipe: DDPMPipelineCustom,
    chain: GaussianDiffusion,
    images: Images,
    limit: int,
    stride: int,
    seed: int,
    purpose: str,
    batch_size: int,
) -> VariationalBound:
    """The variational bound of a chain on at most `limit` random images, each at every `stride`-th timestep, or more often
    if they are fewer than two for each timestep.

    `purpose` is part of the seed. Raises ValueError for a scheduler with thresholding, which has no bound.
    """
    config = as_ddpm(pipe.scheduler).config
    if config.thresholding:
        raise ValueError("thresholding=True has no bound: what it does to a pixel depends on all others.")
    edge = config.clip_sample_range
    clip = (lambda x_0: x_0.clamp(-edge, edge)) if config.clip_sample else None
    chosen = random_indices(images, seed, purpose)[:limit]
    stride = max(1, min(stride, len(chosen) // 2))
    sums, share = BoundSums(len(chain), stride), process_share(len(chosen))
    for start in range(0, len(share), batch_size):
        positions = share[start : start + batch_size]
        x_0, labels = load_batch(images, [chosen[p] for p in positions], pipe.unet.device)
        generators = [make_generator("cpu", seed, purpose, 1 + p) for p in positions]
        sums.add(chain, partial(predict, pipe), x_0, generators, torch.tensor(positions) % stride, clip, labels)
    sums.values.copy_(sum(gather_object([sums.values])))
    return sums.result(chain)


def measure_bounds(
    measure: Measure, ddpm: DDPMSchedulerCustom, training: Images, validation: Images | None, steps: Sequence[int]
) -> tuple[dict[str, VariationalBound], dict | None]:
    """The bounds of a chain by name, and the table of best timesteps.

    They are the full chain's on training and validation images and, on the latter, those of the chains of `steps` evenly
    spaced timesteps, and of as many best timesteps as the first of `steps`.
    """
    full = ddpm.diffusion
    bounds = {f"training, {len(full)} steps": measure(full, training, "training bound")}
    if validation is None:
        return bounds, None
    bounds[f"validation, {len(full)} steps"] = measure(full, validation, "validation bound")
    table = best_timesteps_table(full, *bounds.values(), steps[0])
    for n in steps:
        if n < len(full):
            bounds[f"validation, {n} steps"] = measure(evenly_spaced(ddpm, n), validation, "validation bound")
    if best := timesteps_in_table(table, steps[0]):
        bounds[f"validation, best {steps[0]} steps"] = measure(full.respace(best), validation, "validation bound")
    return bounds, table


def evenly_spaced(ddpm: DDPMSchedulerCustom, steps: int) -> GaussianDiffusion:
    """The chain of the timesteps that the scheduler has for a number of steps."""
    config, T = ddpm.config, len(ddpm.diffusion)
    return ddpm.diffusion.respace(spaced_timesteps(T, steps, config.timestep_spacing, config.steps_offset))
