"""Exponential moving averages of the weights: what is sampled from is the average, not the last iterate."""

from collections.abc import Mapping

import torch
from torch import nn

from .sharding import copy_whole, local


class EMA:
    """Average of a model's parameters, halving the weight of the past every `halflife_images` training images.

    Early in a run the past is mostly the random start, so the half-life is at most `rampup_ratio` of the images seen
    so far (Karras et al. 2022, EDM). The average is float32 whatever the model's dtype: in bf16 it would stand still.

    Args:
        model: whose parameters are followed; the average starts as a copy of them.
        halflife_images: in images, not steps, so that it means the same at any batch size.
        rampup_ratio: None for a constant half-life.
    """

    def __init__(self, model: nn.Module, halflife_images: float, rampup_ratio: float | None = 0.05):
        if not halflife_images > 0:
            raise ValueError(f"halflife_images must be positive, got {halflife_images!r}.")
        if rampup_ratio is not None and not rampup_ratio > 0:
            raise ValueError(f"rampup_ratio must be positive or None, got {rampup_ratio!r}.")
        self.halflife_images, self.rampup_ratio = halflife_images, rampup_ratio
        self._names = [name for name, _ in model.named_parameters()]
        self._average = [p.detach().float().clone() for p in model.parameters()]

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The factor kept of the average at a step of `batch_size` images that ends at `images_seen`."""
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, images_seen * self.rampup_ratio)
        return 0.5 ** (batch_size / halflife)

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int, skipped: torch.Tensor | None = None) -> None:
        """Move the average towards the model's parameters, after an optimiser step.

        `skipped`: 0-d on the parameters' device, 1 where the step was skipped; the average then stays, bit for bit.
        """
        average = [local(a) for a in self._average]
        parameters = [local(p).detach().float() for p in model.parameters()]
        weight = 1 - self.decay(images_seen, batch_size)
        if skipped is not None:
            # A list of tensors, since a number would have to come from the device first.
            weight = [(1 - skipped) * weight] * len(average)
        torch._foreach_lerp_(average, parameters, weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged parameters under the model's own names, float32."""
        return dict(zip(self._names, self._average))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over averages saved by `state_dict`. Raises ValueError for other names or shapes."""
        if set(state) != set(self._names):
            raise ValueError(f"the saved average has other parameters: {sorted(set(state) ^ set(self._names))[:5]} ...")
        for name, average in zip(self._names, self._average):
            if state[name].shape != average.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(average.shape)}.")
            copy_whole(average, state[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model's parameters, in their dtype."""
        for parameter, average in zip(model.parameters(), self._average):
            parameter.copy_(average)
