"""Steps with a nonfinite loss or gradient: skipped on the device, counted and reported when the host reads values."""

import logging
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from ddpm_hf.data.batches import GlobalBatches
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages

logger = logging.getLogger("train")
MAX_LISTED = 10  # images listed in the report of a skipped step


def nan_if_nonfinite(losses: torch.Tensor) -> torch.Tensor:
    """1 (0-d) if all `losses` (b,) are finite, else NaN.

    A loss multiplied by NaN has NaN gradients, and averaging the gradients hands them to every process. All processes
    thus skip the same steps without extra communication.
    """
    return 1 + 0 * losses.detach().sum()


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> torch.Tensor:
    """Call `optimizer.step()` unless `grad_norm` (0-d) is nonfinite. Returns 1.0 if the step is skipped, else 0.0 (0-d).

    A skipped step does not change the weights or the optimizer state. Fused optimizers read `found_inf`, which
    GradScaler sets, on the device (torch 2.13). For other optimizers the host has to wait for the norm.
    """
    skipped = 1 - grad_norm.isfinite().float()
    inner = getattr(optimizer, "optimizer", optimizer)
    is_fused = inner.defaults.get("fused")
    if is_fused:
        inner.found_inf = skipped
    if is_fused or not skipped:
        optimizer.step()
    return skipped


@dataclass
class SkippedSteps:
    """Counts and reports skipped steps, reading from the device only in `too_many_skipped`.

    In fp16, GradScaler skips steps while it lowers its loss scale. Those are not counted while the scale is ≥ 1.

    Args:
        images: the training images, to name those of a skipped step.
        batch_size, seed: of the run, to find the images of a step.
        max_nonfinite_steps: training must stop after this many consecutive skipped steps.
        total: skipped steps of the whole run so far.
        in_a_row: consecutive skipped steps up to now.
    """

    accelerator: Accelerator
    images: Images | StreamedImages
    batch_size: int
    seed: int
    max_nonfinite_steps: int
    total: int = 0
    in_a_row: int = 0
    _pending: list[tuple] = field(default_factory=list, init=False, repr=False)

    def add(self, step: int, t: torch.Tensor, losses: torch.Tensor, skipped: torch.Tensor) -> None:
        """Remember the result of a step without reading it: `t` and `losses` (b,), `skipped` 0-d."""
        self._pending.append((step, t, losses, skipped))

    def too_many_skipped(self) -> bool:
        """Count and report the steps added since the last call. True if `max_nonfinite_steps` in a row were skipped.

        Must be called on every process.
        """
        pending, self._pending = self._pending, []
        flags = torch.stack([skipped for *_, skipped in pending]).tolist() if pending else []
        for (step, t, losses, _), skipped in zip(pending, flags):
            if not skipped:
                self.in_a_row = 0
            elif not self._is_scale_search(losses := self.accelerator.gather(losses)):
                self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
                t = self.accelerator.gather(t)
                if self.accelerator.is_main_process:
                    logger.warning(self._describe(step, t.tolist(), losses))
            if self.in_a_row >= self.max_nonfinite_steps:
                return True
        return False

    def _is_scale_search(self, losses: torch.Tensor) -> bool:
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1 and bool(losses.isfinite().all())

    def _describe(self, step: int, t: list[int], losses: torch.Tensor) -> str:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        reason = f"the loss of {len(bad)} of {len(losses)} images is" if bad else "the gradient is"
        # If all losses are finite, the images with the largest losses are the most likely cause.
        positions = bad or losses.argsort(descending=True).tolist()
        names = self._names(step, positions[:MAX_LISTED])
        lines = [f"Step {step + 1} was skipped: {reason} not finite."]
        lines += [f"  {name}, t = {t[i]}, loss {losses[i].item():.4g}" for name, i in zip(names, positions)]
        if len(positions) > MAX_LISTED:
            lines.append(f"  and {len(positions) - MAX_LISTED} more")
        return "\n".join(lines)

    def _names(self, step: int, positions: list[int]) -> list[str]:
        if isinstance(self.images, StreamedImages):
            return [f"image {i} of the batch" for i in positions]
        batch = GlobalBatches(len(self.images), self.batch_size, self.seed).indices(step).tolist()
        paths = [(batch[i], self.images.describe(batch[i])) for i in positions]
        return [f"image {i}" + ("" if path.startswith("number ") else f" ({path})") for i, path in paths]
