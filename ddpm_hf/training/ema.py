"""Exponential moving averages of the weights: what is sampled from is the average, not the last iterate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ddpm_hf.training.sharding import copy_full, reshard, to_local


class EMA:
    """Average of a model's parameters, float32 whatever the model's dtype: in bf16 it would stand still.

    Its length is either `halflife_images`, after which the weight of the past has halved, or `decay`, the factor that
    the past keeps at every step (0.9999 in DDPM, appendix B). Early in a run the past is mostly the random start, so
    that with `warmup` the length grows with the run: the half-life is at most 5 % of the images seen so far (Karras et
    al. 2022, EDM), the decay of step s = 0, 1, ... at most (1 + s)/(10 + s).

    Args:
        model: whose parameters are followed; the average starts as a copy of them.
        halflife_images: in images, not steps, so that it means the same at any batch size.
        decay: in (0, 1), per step; in place of a half-life.
        warmup: False for a constant length.

    Raises ValueError for a length out of range, and unless just one is given.
    """

    RAMPUP_RATIO = 0.05

    def __init__(
        self,
        model: nn.Module,
        halflife_images: float | None = None,
        *,
        decay: float | None = None,
        warmup: bool = True,
    ):
        if (halflife_images is None) == (decay is None):
            raise ValueError(
                f"either halflife_images or decay must be given, got halflife_images={halflife_images!r} and decay={decay!r}."
            )
        if halflife_images is not None and not halflife_images > 0:
            raise ValueError(f"halflife_images must be positive, got {halflife_images!r}.")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay!r}.")
        self.halflife_images, self.fixed_decay, self.warmup = halflife_images, decay, warmup
        self._names = [name for name, _ in model.named_parameters()]
        self._average = [p.detach().float().clone() for p in model.parameters()]

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The factor kept of the average at a step of `batch_size` images that ends at `images_seen`."""
        if self.fixed_decay is not None:
            step = images_seen // batch_size - 1
            return min(self.fixed_decay, (1 + step) / (10 + step)) if self.warmup else self.fixed_decay
        halflife = self.halflife_images
        if self.warmup:
            halflife = min(halflife, images_seen * self.RAMPUP_RATIO)
        return 0.5 ** (batch_size / halflife)

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int, skipped: torch.Tensor | None = None) -> None:
        """Move the average towards the model's parameters, after an optimizer step.

        `skipped`: 0-d on the parameters' device, 1 where the step was skipped; the average then stays, bit for bit.
        """
        lerp_parameters(self._average, model, 1 - self.decay(images_seen, batch_size), skipped)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged parameters under the model's own names, float32."""
        return dict(zip(self._names, self._average))

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over averages saved by `state_dict`. Raises ValueError for other names or shapes."""
        load_averages(self.state_dict(), state)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model's parameters, in their dtype."""
        for parameter, average in zip(model.parameters(), self._average):
            parameter.copy_(average)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The average as the model's parameters for a while; afterwards they are what they were, bit for bit."""
        kept = [p.detach().clone() for p in model.parameters()]
        self.copy_to(model)
        try:
            yield
        finally:
            reshard(model)
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), kept):
                    parameter.copy_(value)


def lerp_parameters(
    average: list[torch.Tensor], model: nn.Module, share: float, skipped: torch.Tensor | None = None
) -> None:
    """average += share · (parameters − average), in the average's float32; nothing at all where `skipped` is 1."""
    average, parameters = [to_local(a) for a in average], [to_local(p).detach().float() for p in model.parameters()]
    if skipped is not None:
        # A list of tensors, since a number would have to come from the device first.
        share = [(1 - skipped) * share] * len(average)
    torch._foreach_lerp_(average, parameters, share)


@torch.no_grad()
def load_averages(mine: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy saved averages into `mine`. Raises ValueError for other names or shapes."""
    if set(state) != set(mine):
        raise ValueError(f"the saved average has other parameters: {sorted(set(state) ^ set(mine))[:5]} ...")
    for name, average in mine.items():
        if state[name].shape != average.shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(average.shape)}.")
        copy_full(average, state[name])
