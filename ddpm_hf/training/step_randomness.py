"""The random numbers of a training step: they depend on (seed, step, position in the global batch) alone."""

from typing import NamedTuple

import torch

from ddpm_hf.diffusion.timestep_samplers import UniformTimesteps, make_timestep_sampler
from ddpm_hf.seeds import make_generator
from ddpm_hf.training.config import TrainingConfig


class Draws(NamedTuple):
    """The random numbers of a step, one row per example.

    Timesteps (B,), and the weight that the loss has at each (B,); the noise that the target is made of, and the noise
    that x_t is made of, (B, C, H, W); whether the image is mirrored (B,), and whether it goes without its label (B,).
    """

    t: torch.Tensor
    weight: torch.Tensor
    noise: torch.Tensor
    input_noise: torch.Tensor
    flip: torch.Tensor
    drop_label: torch.Tensor


def draw(
    config: TrainingConfig,
    step: int,
    positions: range,
    device: torch.device,
    sampler: UniformTimesteps | None = None,
) -> Draws:
    """The draws of a step for `positions` of the global batch.

    They are made for the whole global batch and then cut, so that they depend on (seed, step, position) alone, however
    many processes share the batch (and on the losses before, for a `sampler` that learns from them). Making too many
    normal numbers is cheap beside a network.
    """
    B, share = config.batch_size, slice(positions.start, positions.stop)

    def random(purpose: str, draw=torch.rand, shape: tuple[int, ...] = (B,)) -> torch.Tensor:
        return draw(shape, generator=make_generator(device, config.seed, purpose, step), device=device)[share]

    t, weight = (sampler or stateless_sampler(config))(B, make_generator(device, config.seed, "timesteps", step))
    noise = random("noise", torch.randn, (B, config.channels, *config.resolution))
    if config.offset_noise:
        # Noise that a whole channel of an image shares (Guttenberg 2023): z + s·z_c.
        noise = noise + config.offset_noise * random("offset noise", torch.randn, (B, config.channels, 1, 1))
    input_noise = noise
    if config.input_perturbation:
        # Ning et al. 2023, algorithm 1: x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·(z + γ·ξ), with z for the target.
        input_noise = noise + config.input_perturbation * random(
            "input perturbation", torch.randn, (B, *noise.shape[1:])
        )
    drop_label = random("label dropout") < config.label_dropout
    return Draws(t[share], weight[share], noise, input_noise, random("flip") < 0.5, drop_label)


def stateless_sampler(config: TrainingConfig) -> UniformTimesteps:
    """The timestep sampler of a configuration, if it needs none of a run's history."""
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
    if sampler.uses_losses:
        raise ValueError(f"sampler must be given: timestep_sampler={config.timestep_sampler!r} learns from the losses.")
    return sampler
