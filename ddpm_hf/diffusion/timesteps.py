"""Timesteps: which ones a shorter chain visits, and the forms in which a function is given them."""

from collections.abc import Sequence

import torch

Timestep = int | torch.Tensor


def spaced_timesteps(T: int, n: int, spacing: str, offset: int = 0) -> torch.Tensor:
    """n of the timesteps 0..T−1, descending, as diffusers spaces them (int64, exactly n of them).

    "linspace" has both ends, "leading" counts up from `offset` in whole steps, "trailing" counts down from T−1. The
    sums and their rounding are those of diffusers (NumPy's), so that halves fall to the same side.
    Raises ValueError where the offset would leave the chain.
    """
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    if spacing == "linspace":
        return (i * ((T - 1) / max(n - 1, 1))).round().to(torch.int64).flip(0)
    if spacing == "trailing":
        # diffusers counts until 0 is reached, which rounding puts off by one step for some n.
        return (T + i * ((T - T / n) - T)).round().to(torch.int64) - 1
    timesteps = torch.arange(n - 1, -1, -1, device="cpu") * (T // n) + offset
    if timesteps[0] >= T:
        raise ValueError(
            f"steps_offset={offset} with {n} leading steps reaches timestep {int(timesteps[0])}; "
            f"the model's last is {T - 1}."
        )
    return timesteps


def to_index_device(t: Timestep, like: torch.Tensor) -> Timestep:
    """t where it can be used with `like` without a sync: as an int where it is one number on the host (outside a
    compiled graph), which is the fastest, else on its device."""
    if not isinstance(t, torch.Tensor):
        return t
    is_integer = not t.is_floating_point() and t.dtype != torch.bool
    if t.ndim == 0 and t.device.type == "cpu" and is_integer and not torch.compiler.is_compiling():
        return int(t)
    return t if t.device == like.device else t.to(like.device)


def as_timesteps(timesteps: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """`timesteps` as an int64 tensor on the CPU; ValueError where they are no non-empty list of integers."""
    try:
        chosen = timesteps if isinstance(timesteps, torch.Tensor) else torch.tensor(list(timesteps), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    if chosen.ndim != 1 or not chosen.numel() or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps!r}.")
    return chosen.to(device="cpu", dtype=torch.int64)


def check_timestep(t: Timestep, T: int, like: torch.Tensor) -> None:
    """Raises TypeError or ValueError for a t that is no timestep of a chain of length T (values on a device and inside a
    compiled graph are not looked at: that would stall both)."""
    if isinstance(t, torch.Tensor):
        if t.is_floating_point() or t.dtype == torch.bool:
            raise TypeError(f"timesteps must be integers, got a tensor of {t.dtype}.")
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, like.shape[0])):
            raise ValueError(
                f"timesteps must be one number or one per sample ({like.shape[0]}), got shape {tuple(t.shape)}."
            )
        if torch.compiler.is_compiling() or t.device.type != "cpu" or t.numel() == 0:
            return
        low, high = t.min().item(), t.max().item()
    elif isinstance(t, int) and not isinstance(t, bool):
        low = high = t
    else:
        raise TypeError(f"a timestep must be an int or an integer tensor, got {t!r} of {type(t).__name__}.")
    if low < 0 or high >= T:
        raise ValueError(f"timesteps must lie in 0..{T - 1}, got {low if low == high else f'{low}..{high}'}.")
