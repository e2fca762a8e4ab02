"""One optimizer step."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ddpm_hf.data.batches import process_positions
from ddpm_hf.data.decoding import to_signed
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.losses import Loss
from ddpm_hf.diffusion.timestep_samplers import UniformTimesteps
from ddpm_hf.seeds import seed_dropout
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.nonfinite import nan_unless_finite, step_unless_skipped
from ddpm_hf.training.sharding import full_tensor
from ddpm_hf.training.step_randomness import Draws, draw


class StepReport(NamedTuple):
    """What a step found on this process's share (b,) of the batch; tensors on the device, read rarely: that waits.

    `t`, `losses` and `objective` (b,) are by example, in order of position; `grad_norm` is of the whole batch, before
    clipping. `losses` is L_simple in terms of the target, not weighted, whatever is minimized, so that runs of
    different objectives and timestep samplers can be compared, t by t. `objective` is what is minimized (`Objective`)
    times the weight of importance sampling: its mean estimates the objective under uniform timesteps. `skipped` is 1, on
    every process alike, where a loss or the gradient is not finite, and 0 otherwise.
    """

    t: torch.Tensor
    losses: torch.Tensor
    grad_norm: torch.Tensor
    objective: torch.Tensor
    skipped: torch.Tensor


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    diffusion: GaussianDiffusion,
    config: TrainingConfig,
    step: int,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    sampler: UniformTimesteps | None = None,
) -> StepReport:
    """One optimizer step (DDPM, algorithm 1) on this process's share of the global batch of `step`.

    `micro_batches` yields dicts of "images", uint8 or uint16 (B, C, H, W), and "labels" (B,) with a `label_column`, as
    many as `config.micro_batches` says. `sampler` is the run's timestep sampler; None will do for one without state.
    Where a loss or the gradient is not finite, weights and optimizer stay as they are.
    """
    positions = process_positions(config.batch_size, accelerator.process_index, accelerator.num_processes)
    draws = draw(config, step, positions, accelerator.device, sampler)
    parts, objective = config.micro_batches(accelerator.num_processes), config.objective
    size = len(draws.t) // parts
    losses = []
    for i, batch in enumerate(micro_batches):
        part = Draws(*(values[i * size : (i + 1) * size] for values in draws))
        x_0 = to_signed(batch["images"].to(accelerator.device, non_blocking=True))
        if config.random_flip:
            x_0 = torch.where(part.flip[:, None, None, None], x_0.flip(-1), x_0)
        labels = None
        if config.label_column is not None:
            labels = batch["labels"].to(accelerator.device, non_blocking=True)
            # The null class comes after the classes (`build`).
            labels = torch.where(part.drop_label, config.num_classes, labels)
        if config.dropout:
            seed_dropout(config.seed, step, positions.start + i * size)
        # Gradients are exchanged once a step, with the last part.
        with accelerator.no_sync(model) if i < parts - 1 else nullcontext():
            loss = objective(model, diffusion, x_0, part.t, part.noise, labels, part.input_noise)
            accelerator.backward((loss.objective * part.weight).mean() / parts * nan_unless_finite(loss.objective))
        losses.append(Loss(loss.objective.detach(), loss.simple.detach()))
    grad_norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    skipped = 1 - grad_norm.isfinite().float()
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    step_unless_skipped(optimizer, skipped)
    optimizer.zero_grad()
    loss = Loss(*map(torch.cat, zip(*losses)))
    if sampler is not None and sampler.uses_losses:
        # Processes have the positions in order of rank, so that this is the global batch in order of position.
        sampler.update(accelerator.gather(draws.t), accelerator.gather(loss.objective))
    return StepReport(draws.t, loss.simple, grad_norm, loss.objective * draws.weight, skipped)
