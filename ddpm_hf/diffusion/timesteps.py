"""Timesteps: the spacing of a sub-chain, and checks of the forms in which functions take timesteps."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.checks import ArgumentTypeError, check_choice, check_int, shown

Timestep = int | Tensor
MAX_TIMESTEPS = 100_000  # of a chain: its tables are lists of floats, too
MAX_DIGITS = 100  # Python refuses to read integers of more than 4300
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


def spaced_timesteps(T: int, n: int, spacing: str, offset: int = 0) -> Tensor:
    """n of the timesteps 0..T−1 with the spacing of diffusers (Lin et al. 2023, table 2): int64 (n,), descending.

    "linspace" includes both ends, "leading" counts up from `offset` in steps of T // n, "trailing" counts down from
    T−1. Operations and rounding are those of diffusers (NumPy), so that the results agree. Raises ValueError if n is not
    in 1..T, for an unknown spacing, and if the offset leads beyond T−1.
    """
    T, offset = check_int("T", T, 1, MAX_TIMESTEPS), check_int("offset", offset, 0)
    n = check_int("n", n, 1, T, "the chain's T")
    check_choice("spacing", spacing, TIMESTEP_SPACINGS)
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    if spacing == "linspace":
        return (i * ((T - 1) / max(n - 1, 1))).round().to(torch.int64).flip(0)
    if spacing == "trailing":
        # diffusers counts down to 0, and rounding gives it n ± 1 timesteps for some n.
        return (T + i * ((T - T / n) - T)).round().to(torch.int64) - 1
    timesteps = torch.arange(n - 1, -1, -1, device="cpu") * (T // n) + offset
    if timesteps[0] >= T:
        reached = f"steps_offset={offset} with {n} leading steps reaches timestep {int(timesteps[0])}"
        raise ValueError(f"{reached}: it must be at most T - 1 = {T - 1}.")
    return timesteps


def parse_timesteps(text: str, T: int) -> list[int]:
    """The timesteps, descending, that a text names: "ddimN", the N multiples of the smallest stride that gives N of them
    (as in improved-diffusion), or a list such as "900,500,100,0". Raises ValueError for other texts and for timesteps
    beyond T−1."""
    check_int("T", T, 1, MAX_TIMESTEPS)
    if not isinstance(text, str) or max(map(len, text.split(","))) > MAX_DIGITS:
        raise ValueError(
            f"timesteps must be text, a descending list in 0..T−1 = {T - 1}, or 'ddimN', got {shown(text)}."
        )
    if text.startswith("ddim") and text[4:].isdecimal():
        lengths = {len(range(0, T, stride)): stride for stride in range(T, 0, -1)}
        if (n := int(text[4:])) not in lengths:
            near = sorted(lengths, key=lambda length: abs(length - n))[:2]
            raise ValueError(
                f"timesteps={text!r}: no stride gives {n} of T = {T} timesteps; {sorted(near)} are possible."
            )
        return list(range(0, T, lengths[n]))[::-1]
    words = text.split(",")
    timesteps = [int(word) for word in words if word.strip().isdecimal()]
    if len(timesteps) < len(words) or timesteps != sorted({*timesteps}, reverse=True) or timesteps[0] >= T:
        raise ValueError(f"timesteps must be a descending list in 0..T−1 = {T - 1}, or 'ddimN', got {shown(text)}.")
    return timesteps


def to_index_device(t: Timestep, like: Tensor) -> Timestep:
    """t in a form that indexes tables on the device of `like` without a synchronization.

    A single number on the host becomes an int, which is fastest (outside a compiled graph). Other tensors are moved to
    the device of `like`.
    """
    if not isinstance(t, Tensor):
        return int(t) if isinstance(t, np.integer) else t
    is_integer = not t.is_floating_point() and t.dtype != torch.bool
    if t.ndim == 0 and t.device.type == "cpu" and is_integer and not torch.compiler.is_compiling():
        return int(t)
    return t if t.device == like.device else t.to(like.device)


def as_timesteps(timesteps: Sequence[int] | Tensor) -> Tensor:
    """`timesteps` as an int64 tensor on the CPU. Raises ValueError unless they are a non-empty list of integers."""
    try:
        chosen = timesteps if isinstance(timesteps, Tensor) else torch.tensor(list(timesteps), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    is_integer = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if chosen.ndim != 1 or not chosen.numel() or not is_integer or isinstance(timesteps, (dict, set)):
        raise ValueError(f"timesteps must be a non-empty list of integers, got {shown(timesteps)}.")
    return chosen.to(device="cpu", dtype=torch.int64)


def check_timestep(t: Timestep, T: int, like: Tensor) -> None:
    """Raise TypeError or ValueError if t is not a timestep, or timesteps (B,) for `like`, of a chain of length T.

    Values on a device or inside a compiled graph are not checked: reading them would stall the device or break the graph.
    """
    if isinstance(t, Tensor):
        if t.is_floating_point() or t.dtype == torch.bool:
            raise ArgumentTypeError(f"timesteps must be integers, got a tensor of {t.dtype}.")
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, like.shape[0])):
            raise ValueError(f"timesteps must be one, or one per sample ({like.shape[0]}), got shape {tuple(t.shape)}.")
        if torch.compiler.is_compiling() or t.device.type != "cpu" or t.numel() == 0:
            return
        low, high = t.min().item(), t.max().item()
    elif type(t) is int or isinstance(t, np.integer):  # not check_int: its message would break a compiled graph
        low = high = t
    else:
        raise ArgumentTypeError(f"a timestep must be an int or an integer tensor, got {t!r} of {type(t).__name__}.")
    if low < 0 or high >= T:
        raise ValueError(f"timesteps must lie in 0..{T - 1}, got {low if low == high else f'{low}..{high}'}.")
