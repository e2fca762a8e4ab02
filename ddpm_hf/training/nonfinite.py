"""Steps whose loss or gradient is not finite: skipped on the device, found out when the host reads values anyway."""

import logging

import torch
from accelerate import Accelerator

from ddpm_hf.data.batches import GlobalBatches
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.training.config import TrainingConfig

logger = logging.getLogger("train")
NAMED = 10  # images at most that a report names


def nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """1 if every loss (b,) is finite, NaN otherwise. As a factor of the loss it makes every gradient NaN, which
    reaches all processes in the exchange of gradients: they agree without another word."""
    return 1 + 0 * loss.detach().sum()


def step_unless_skipped(optimizer: torch.optim.Optimizer, skipped: torch.Tensor) -> None:
    """`optimizer.step()` if `skipped` (0-d, float) is 0; if it is 1, weights and optimizer stay as they are.

    Fused optimizers look at `found_inf` on the device, as they do for GradScaler. Others need the host to look.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if getattr(inner, "_step_supports_amp_scaling", False):
        inner.found_inf = skipped
        optimizer.step()
    elif not skipped:
        optimizer.step()


class SkippedSteps:
    """Reports of the steps since the last look, and the count of those that were skipped.

    `total` counts skipped steps of the whole run, `in_a_row` those that the run has just made. fp16's search for a
    loss scale that does not overflow is no failure: its steps are skipped, and not counted while the scale is ≥ 1.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, images: Images | StreamedImages):
        self.config, self.accelerator, self.images = config, accelerator, images
        self.total = self.in_a_row = 0
        self._reports = []

    def add(self, step: int, t: torch.Tensor, losses: torch.Tensor, skipped: torch.Tensor) -> None:
        """Keep what a step found; nothing is read yet."""
        self._reports.append((step, t, losses, skipped))

    def too_many_skipped(self) -> bool:
        """Read, count and report. True: `max_nonfinite_steps` in a row, training must stop. Every process must call."""
        reports, self._reports = self._reports, []
        flags = torch.stack([report[3] for report in reports]).tolist() if reports else []
        for (step, t, losses, _), skipped in zip(reports, flags):
            if not skipped:
                self.in_a_row = 0
            elif not self._seeks_scale(losses := self.accelerator.gather(losses)):
                self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
                t = self.accelerator.gather(t)
                if self.accelerator.is_main_process:
                    logger.warning(self._describe(step, t, losses))
            if self.in_a_row >= self.config.max_nonfinite_steps:
                return True
        return False

    def _seeks_scale(self, losses: torch.Tensor) -> bool:
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1 and bool(losses.isfinite().all())

    def _describe(self, step: int, t: torch.Tensor, losses: torch.Tensor) -> str:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        what = f"the loss of {len(bad)} of {len(losses)} images is not finite" if bad else "the gradient is not finite"
        # Finite losses tell nothing for sure; the largest are the likeliest.
        positions = bad or losses.argsort(descending=True).tolist()
        t, losses = t.tolist(), losses.tolist()
        names = self._names(step, positions[:NAMED])
        lines = [f"  {name}, t = {t[i]}, loss {losses[i]:.4g}" for name, i in zip(names, positions)]
        more = [f"  and {len(positions) - NAMED} more"] if len(positions) > NAMED else []
        return "\n".join([f"Step {step + 1} was skipped: {what}.", *lines, *more])

    def _names(self, step: int, positions: list[int]) -> list[str]:
        if isinstance(self.images, StreamedImages):
            return [f"image {i} of the batch" for i in positions]
        indices = GlobalBatches(len(self.images), self.config.batch_size, self.config.seed)(step)
        paths = [self.images.describe(indices[i]) for i in positions]
        return [
            f"image {indices[i]}" + ("" if path.startswith("number ") else f" ({path})")
            for i, path in zip(positions, paths)
        ]
