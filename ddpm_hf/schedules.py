"""β schedules: the variance β_t of the noise added at step t (DDPM eq. 1), in float64.

Every function returns a float64 tensor of shape (T,) whose entry i is the paper's β_{i+1}. Formulas are
arranged so that small β keep their relative precision: nothing is computed as 1 minus a number near 1.
"""

import math
from collections.abc import Sequence

import torch


def _linear(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t from `beta_start` to `beta_end` in equal steps (DDPM, section 4)."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


def _scaled_linear(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """√β_t in equal steps (latent diffusion)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64).square()


def _sigmoid(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t along a logistic curve over [-6, 6] (GeoDiff)."""
    return torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start


def _squaredcos_cap_v2(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """ᾱ(u) = cos²((u + 0.008)/1.008 · π/2), β capped at 0.999 (Improved DDPM, eq. 17); the range is not used.

    1 − cos²b/cos²a is computed as sin(b − a)·sin(b + a)/cos²a, which does not cancel.
    """
    angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * (math.pi / 2)
    a, b = angle[:-1], angle[1:]
    betas = math.sin(math.pi / 2 / 1.008 / T) * torch.sin(a + b) / torch.cos(a).square()
    return betas.clamp(max=0.999)


BETA_SCHEDULES = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
    "sigmoid": _sigmoid,
}


def make_betas(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | torch.Tensor | None = None,
    rescale_betas_zero_snr: bool = False,
) -> torch.Tensor:
    """The β of a schedule by name, or `trained_betas` as given, checked.

    Returns a float64 tensor of shape (num_train_timesteps,), every entry in (0, 1), or (0, 1] for the last one.
    Raises ValueError for an unknown schedule, for a count or range that makes no chain, and for `trained_betas`
    of a length other than `num_train_timesteps`.
    """
    if isinstance(num_train_timesteps, bool) or not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be an integer of at least 1, got {num_train_timesteps!r}.")
    if trained_betas is not None:
        betas = torch.as_tensor(trained_betas, dtype=torch.float64).clone()
        if betas.shape != (num_train_timesteps,):
            raise ValueError(
                f"trained_betas must have num_train_timesteps = {num_train_timesteps} entries, "
                f"got shape {tuple(betas.shape)}."
            )
    elif beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {sorted(BETA_SCHEDULES)}, got {beta_schedule!r}.")
    else:
        betas = BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
    if rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
        raise ValueError(
            "every β must lie in (0, 1), and only the last may be 1: got values from "
            f"{betas.min().item():g} to {betas.max().item():g} "
            f"(beta_start={beta_start!r}, beta_end={beta_end!r}, trained_betas {'given' if trained_betas is not None else 'not given'})."
        )
    return betas


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """β whose chain ends in pure noise, ᾱ_T = 0 (Lin et al. 2023, algorithm 1): √ᾱ is shifted to 0 at T, then
    scaled so that √ᾱ_1 stays."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    if len(betas) == 1:
        raise ValueError("rescale_betas_zero_snr needs at least 2 timesteps: with one, ᾱ_1 cannot both stay and be 0.")
    scaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    # 1 − r²/p² as (p − r)(p + r)/p²: differences of neighbours, not of numbers near 1.
    step = (root[:-1] - root[1:]) * (root[0] / (root[0] - root[-1]))
    later = step * (scaled[:-1] + scaled[1:]) / scaled[:-1].square()
    return torch.cat([betas[:1], later])
