"""Deterministic randomness of a training step: it depends on (seed, step, position in the global batch) alone."""

from typing import NamedTuple

import torch

from ddpm_hf.diffusion.timestep_samplers import UniformTimesteps
from ddpm_hf.seeds import make_generator
from ddpm_hf.training.config import TrainingConfig

BLOCK = 16  # consecutive positions that share a random generator


class StepRandomness(NamedTuple):
    """The random numbers of a training step, one row per example.

    Attributes:
        t: timesteps (B,), int64.
        weight: weight of the loss at each timestep (B,), float32.
        noise: noise that the training target is made of, (B, C, H, W), float32.
        input_noise: noise that x_t is made of, (B, C, H, W), float32; `noise` unless there is input perturbation.
        flip: whether to flip the image horizontally (B,), bool.
        drop_label: whether to replace the label by the null class (B,), bool.
    """

    t: torch.Tensor
    weight: torch.Tensor
    noise: torch.Tensor
    input_noise: torch.Tensor
    flip: torch.Tensor
    drop_label: torch.Tensor


def draw_randomness(
    config: TrainingConfig, step: int, positions: range, device: torch.device, sampler: UniformTimesteps
) -> StepRandomness:
    """The random numbers of a step for consecutive `positions` of the global batch.

    They are drawn in blocks of `BLOCK` positions, so that the cost follows the number of positions and not the global
    batch size, and the values do not depend on how the batch is divided. Timesteps are the exception: `sampler`, that of
    the run, draws the B numbers of the global batch, because their distribution may depend on the whole batch.
    """
    C, size, share = config.channels, config.resolution, slice(positions.start, positions.stop)

    def random(purpose: str, shape: tuple[int, ...] = (), draw=torch.randn) -> torch.Tensor:
        blocks = range(positions.start // BLOCK, -(-positions.stop // BLOCK))
        generators = (make_generator(device, config.seed, purpose, step, block) for block in blocks)
        drawn = torch.cat([draw((BLOCK, *shape), generator=g, device=device) for g in generators])
        return drawn[positions.start - BLOCK * blocks.start :][: len(positions)]

    def bernoulli(purpose: str, probability: float) -> torch.Tensor:
        if not probability:
            return torch.zeros(len(positions), dtype=torch.bool, device=device)
        return random(purpose, draw=torch.rand) < probability

    t, weight = sampler(config.batch_size, make_generator(device, config.seed, "timesteps", step))
    noise = random("noise", (C, *size))
    if config.offset_noise:
        # Guttenberg 2023: z + s·z_c, where all pixels of a channel share z_c.
        noise = noise + config.offset_noise * random("offset noise", (C, 1, 1))
    input_noise = noise
    if config.input_perturbation:
        # Ning et al. 2023, algorithm 1: x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·(z + γ·ξ), while the target is made of z.
        input_noise = noise + config.input_perturbation * random("input perturbation", (C, *size))
    flip = bernoulli("flip", 0.5 if config.random_flip else 0.0)
    drop_label = bernoulli("label dropout", config.label_dropout)
    return StepRandomness(t[share], weight[share], noise, input_noise, flip, drop_label)
