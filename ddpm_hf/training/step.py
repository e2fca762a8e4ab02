"""One optimizer step."""

from collections.abc import Callable, Iterable
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
from ddpm_hf.training.nonfinite import nan_if_nonfinite, step_if_finite
from ddpm_hf.training.sharding import full_tensor
from ddpm_hf.training.step_randomness import StepRandomness, draw_randomness


class StepReport(NamedTuple):
    """Result of a step for this process's share (b,) of the batch.

    The tensors stay on the device. Reading them waits for the device, so read them rarely.

    Attributes:
        t: timesteps (b,), in order of position.
        losses: unweighted L_simple (b,), whatever is minimized, so that runs with different objectives and timestep
            samplers can be compared at each t.
        grad_norm: norm of the gradient of the whole batch before clipping, 0-d.
        objective: the minimized `Objective` times the importance weight (b,). Its mean estimates the objective under
            uniform timesteps.
        skipped: 0-d, 1.0 if a loss or the gradient is not finite, else 0.0; equal on all processes.
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
    sampler: UniformTimesteps,
    loss_function: Callable[..., Loss] | None = None,
) -> StepReport:
    """One optimizer step (DDPM, algorithm 1) on this process's share of the global batch of `step`.

    If a loss or the gradient is not finite, the weights and the optimizer state do not change.

    Args:
        micro_batches: `config.micro_batches(num_processes)` dicts, accumulated into one gradient, with "images", uint8
            or uint16 (B, C, H, W), and "labels" (B,) or (B, D) if the configuration has a `label_column`.
        sampler: timestep sampler of the run.
        loss_function: called as `Objective` is; None: the configuration's objective.
    """
    positions = process_positions(config.batch_size, accelerator.process_index, accelerator.num_processes)
    accumulation_steps = config.micro_batches(accelerator.num_processes)
    loss_function = loss_function or config.objective
    device, size = accelerator.device, len(positions) // accumulation_steps
    randomness = draw_randomness(config, step, positions, device, sampler)
    losses = []
    for i, batch in enumerate(micro_batches):
        part = StepRandomness(*(values[i * size : (i + 1) * size] for values in randomness))
        x_0 = to_signed(batch["images"].to(device, non_blocking=True))
        if config.random_flip:
            x_0 = torch.where(part.flip[:, None, None, None], x_0.flip(-1), x_0)
        labels = None
        if config.label_column is not None:
            labels = batch["labels"].to(device, non_blocking=True)
            if config.label_dropout:  # the index of the null class is num_classes (see `build_unet`)
                labels = torch.where(part.drop_label, config.num_classes, labels)
        if config.dropout:
            seed_dropout(config.seed, step, positions.start + i * size)
        # Gradients are synchronized once per step, with the last micro-batch.
        with accelerator.no_sync(model) if i < accumulation_steps - 1 else nullcontext():
            loss = loss_function(model, diffusion, x_0, part.t, part.noise, labels, part.input_noise)
            mean = (loss.objective * part.weight).mean() / accumulation_steps
            accelerator.backward(mean * nan_if_nonfinite(loss.objective))
        losses.append((loss.objective.detach(), loss.simple.detach()))
    grad_norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    skipped = step_if_finite(optimizer, grad_norm)
    optimizer.zero_grad()
    objective, simple = map(torch.cat, zip(*losses))
    if sampler.uses_losses:
        # Gathered in order of rank, which is the order of positions.
        sampler.update(accelerator.gather(randomness.t), accelerator.gather(objective))
    return StepReport(randomness.t, simple, grad_norm, objective * randomness.weight, skipped)
