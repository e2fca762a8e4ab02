"""Means over the training steps between two rows of the log."""

import torch
from accelerate import Accelerator

from ddpm_hf.training.step import StepReport

QUARTILES = 4


class StepStatistics:
    """Sums over steps that were not skipped, kept on the device: reading them makes the host wait for it.

    Args:
        num_train_timesteps: T; losses are also averaged by quartile of t in 0..T−1.
        state: `state()` of the checkpoint that the run resumes from; None at the start.
    """

    def __init__(self, num_train_timesteps: int, accelerator: Accelerator, state: dict | None = None):
        self.num_train_timesteps, self.accelerator, self.steps = num_train_timesteps, accelerator, 0
        # For each quartile of t the sum of losses, then their number; the sum of the objective, of gradient norms, and of steps.
        self._sums = torch.zeros(2 * QUARTILES + 3, device=accelerator.device)
        if state is not None:
            self.steps = state["steps"]
            if accelerator.is_main_process:
                self._sums += torch.tensor(state["sums"], device=accelerator.device)

    def add(self, report: StepReport) -> None:
        """Add a step of this process, without reading a value from the device."""
        quartile = report.t * QUARTILES // self.num_train_timesteps
        losses, objective = report.losses.detach().float(), report.objective.detach().float()
        counts = report.skipped == 0
        member = (quartile[:, None] == torch.arange(QUARTILES, device=quartile.device)) & counts
        loss_sums = torch.where(member, losses[:, None], 0.0).sum(0)
        objective_sum = torch.where(counts, objective, 0.0).sum()
        # The gradient norm is the same on all processes: the main process adds it.
        steps = counts.float() * self.accelerator.is_main_process
        grad_norm = torch.where(steps > 0, report.grad_norm.detach().float(), 0.0)
        self._sums += torch.hstack([loss_sums, member.sum(0), objective_sum, grad_norm, steps])
        self.steps += 1

    def state(self) -> dict:
        """The sums over all processes, for a checkpoint (JSON-able). Every process must call this."""
        return {"steps": self.steps, "sums": self.accelerator.reduce(self._sums.clone(), "sum").tolist()}

    def read(self) -> dict:
        """The means over all processes as entries of a row, and start again. Every process must call this."""
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        losses, counts = sums[:QUARTILES], sums[QUARTILES : 2 * QUARTILES]
        objective, grad_norm, steps = sums[2 * QUARTILES :]
        row = {
            "loss": sum(losses) / sum(counts) if steps else None,
            "objective": objective / sum(counts) if steps else None,
            "loss_by_t_quartile": [loss / count if count else None for loss, count in zip(losses, counts)],
            "grad_norm": grad_norm / steps if steps else None,
        }
        if steps < self.steps:
            row["skipped_steps"] = self.steps - int(steps)
        self._sums, self.steps = torch.zeros_like(self._sums), 0
        return row
