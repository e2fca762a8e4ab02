"""Exponential moving average (EMA) of the weights. Samples are drawn with the average, not with the last weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpm_hf.checks import ArgumentTypeError, check_bool, check_float, check_int, shown
from ddpm_hf.training.sharding import copy_full, reshard, to_local


class EMA:
    """Exponential moving average of a model's trained parameters, starting from a copy of them.

    The average is float32 whatever the model's dtype: in bf16, small updates would be rounded away. Its length is
    given by exactly one of `halflife_images` and `decay`. With `warmup` the average is shorter early in a run, when
    the past is mostly the random initialization: the half-life is at most 5 % of the images seen (Karras et al. 2022,
    EDM), the decay of step s = 0, 1, ... at most (1 + s)/(10 + s).

    Args:
        model: the model whose parameters are averaged.
        halflife_images: images after which the weight of the past has halved, whatever the batch size; above 0.
        decay: weight of the past at every step, in (0, 1); 0.9999 in DDPM, appendix B.
        warmup: False for a constant length.

    Raises ValueError for a length out of range, and if both or neither are given.
    """

    RAMPUP_RATIO = 0.05

    def __init__(
        self, model: nn.Module, halflife_images: float | None = None, *, decay: float | None = None, warmup: bool = True
    ):
        check_network(model)
        self.warmup = check_bool("warmup", warmup)
        if (halflife_images is None) == (decay is None):
            raise ValueError(f"either halflife_images or decay must be given, got {halflife_images!r} and {decay!r}.")
        if decay is None:
            halflife_images = check_float("halflife_images", halflife_images, "(0, inf)")
        else:
            decay = check_float("decay", decay, "(0, 1)")
        self.halflife_images, self.fixed_decay = halflife_images, decay
        self._average = float32_parameters(model)

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The weight of the past at a step of `batch_size` images that ends at `images_seen` images."""
        batch_size = check_int("batch_size", batch_size, 1)
        images_seen = check_int("images_seen", images_seen, batch_size)
        if self.fixed_decay is not None:
            step = images_seen // batch_size - 1
            return min(self.fixed_decay, (1 + step) / (10 + step)) if self.warmup else self.fixed_decay
        halflife = self.halflife_images
        if self.warmup:
            halflife = min(halflife, images_seen * self.RAMPUP_RATIO)
        return 0.5 ** (batch_size / halflife)

    def update(self, model: nn.Module, images_seen: int, batch_size: int, skipped: Tensor | None = None) -> None:
        """Move the average towards the model's parameters. Call it after each optimizer step.

        `skipped`: 0-d on the parameters' device, 1 if the step was skipped; the average then does not change.
        """
        lerp_parameters(self._average.values(), model, 1 - self.decay(images_seen, batch_size), skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by the model's parameter names, float32."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load averages saved by `state_dict`. Raises ValueError for other names or shapes."""
        load_averages(self._average, state)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model's parameters are the average; afterwards they are restored exactly."""
        kept = [p.detach().clone() for p in trained_parameters(model).values()]
        load_parameters(model, self._average.values())
        try:
            yield
        finally:
            reshard(model)
            load_parameters(model, kept)


def check_network(model: nn.Module) -> None:
    """Raise ArgumentTypeError for what is no network, and so has no parameters."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, got {shown(model)}.")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name: those that training changes, which are all but with LoRA."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def float32_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's trained parameters by name, float32."""
    return {name: parameter.detach().float().clone() for name, parameter in trained_parameters(model).items()}


@torch.no_grad()
def load_parameters(model: nn.Module, values: Iterable[Tensor]) -> None:
    """Copy values into a model's trained parameters, in their order and dtype."""
    for parameter, value in zip(trained_parameters(model).values(), values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def lerp_parameters(average: Iterable[Tensor], model: nn.Module, weight: float, skipped: Tensor | None) -> None:
    """average += weight · (parameters − average), in float32; no change if `skipped` is 1."""
    average = [to_local(a) for a in average]
    parameters = [to_local(p).detach().float() for p in trained_parameters(model).values()]
    if skipped is not None:
        # A list of tensors: a single number would first have to be read from the device.
        weight = [(1 - skipped) * weight] * len(average)
    torch._foreach_lerp_(average, parameters, weight)


def load_averages(averages: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy saved averages into `averages`. Raises ValueError for other names or shapes."""
    saved, expected = ({(name, tuple(t.shape)) for name, t in tensors.items()} for tensors in (state, averages))
    if saved != expected:
        raise ValueError(f"the saved average has other parameters: {sorted(saved ^ expected)[:4]} ...")
    for name, average in averages.items():
        copy_full(average, state[name])
