"""β schedules: the variance β_t of the noise that step t adds (DDPM, eq. 1).

Every schedule returns a float64 tensor of shape (T,) whose entry i is the paper's β_{i+1}. Formulas are
arranged so that small β keep their relative precision: nothing is computed as 1 minus a number near 1.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ddpm_hf.checks import ArgumentTypeError, check_choice, check_float, check_int, shown
from ddpm_hf.diffusion.timesteps import MAX_TIMESTEPS


def _linear(T: int, beta_start: float, beta_end: float) -> Tensor:
    """β_t from `beta_start` to `beta_end` in equal steps (DDPM, section 4)."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64, device="cpu")


def _scaled_linear(T: int, beta_start: float, beta_end: float) -> Tensor:
    """√β_t in equal steps ("quad" of the original DDPM code, "scaled_linear" of latent diffusion)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64, device="cpu").square()


def _sigmoid(T: int, beta_start: float, beta_end: float) -> Tensor:
    """β_t along a logistic curve over [-6, 6] (GeoDiff)."""
    return torch.linspace(-6, 6, T, dtype=torch.float64, device="cpu").sigmoid() * (beta_end - beta_start) + beta_start


def _squaredcos_cap_v2(T: int, beta_start: float, beta_end: float) -> Tensor:
    """ᾱ(u) = cos²((u + 0.008)/1.008 · π/2), β capped at 0.999 (Improved DDPM, eq. 17). The range is not used.

    In angles from π/2, ᾱ = sin²: 1 − sin²b/sin²a = sin(a − b)·sin(a + b)/sin²a does not cancel, and a near 0 is exact.
    """
    angle = torch.arange(T, -1, -1, dtype=torch.float64, device="cpu") / T * (math.pi / 2 / 1.008)
    a, b = angle[:-1], angle[1:]
    betas = math.sin(math.pi / 2 / 1.008 / T) * torch.sin(a + b) / torch.sin(a).square()
    return betas.clamp(max=0.999)


def _laplace(T: int, beta_start: float, beta_end: float) -> Tensor:
    """diffusers' "laplace", β capped at 0.999. The range is not used.

    Its ᾱ(u) = √(s/(1+s)) with s = (2u + ε)^−½ up to u = ½ and s = (2(1−u) + ε)^½ after it, ε = 1e-6. With
    w = √(2u + ε), or √(2(1−u) + ε), ᾱ² is 1/(1+w), or w/(1+w), so that 1 − ᾱ_b²/ᾱ_a² is a difference of neighboring w.
    """
    eps = 1e-6
    i = torch.arange(T + 1, dtype=torch.float64, device="cpu")
    folded = 2 * torch.minimum(i, T - i) / T
    w, gap = (folded + eps).sqrt(), 1 - folded - eps  # gap = 1 − w²
    a, b = w[:-1], w[1:]
    rising, falling = i[1:] <= T / 2, i[:-1] > T / 2
    step = 2 / T / (a + b)  # |b − a|
    # The one step that crosses ½: 1 − ab = (1 − a²b²)/(1 + ab).
    across = (gap[:-1] + gap[1:] - gap[:-1] * gap[1:]) / (1 + a * b)
    complement = torch.where(rising, step, torch.where(falling, step / a, across)) / (1 + b)
    return (complement / (1 + (1 - complement).sqrt())).clamp(max=0.999)


def _const(T: int, beta_start: float, beta_end: float) -> Tensor:
    """β_t = `beta_end` (original DDPM code); `beta_start` is not used."""
    return torch.full((T,), beta_end, dtype=torch.float64, device="cpu")


def _jsd(T: int, beta_start: float, beta_end: float) -> Tensor:
    """β_t = 1/(T − t + 1), t from 1: 1/T, 1/(T−1), …, 1 (Sohl-Dickstein et al. 2015), so ᾱ_t = 1 − t/T.

    The range is not used. The last β is 1 (zero terminal SNR), so that epsilon prediction is not possible.
    """
    return 1 / torch.arange(T, 0, -1, dtype=torch.float64, device="cpu")


def _warmup(T: int, beta_start: float, beta_end: float, fraction: float) -> Tensor:
    """β_t rises linearly over the first ⌊fraction·T⌋ steps, then stays at `beta_end` (original DDPM code)."""
    rising = int(T * fraction)
    return torch.cat([_linear(rising, beta_start, beta_end), _const(T - rising, beta_start, beta_end)])


BETA_SCHEDULES = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
    "sigmoid": _sigmoid,
    "laplace": _laplace,
    # Names of the original DDPM code, and the same spelled out.
    "quad": _scaled_linear,
    "quadratic": _scaled_linear,
    "const": _const,
    "constant": _const,
    "jsd": _jsd,
    "warmup10": partial(_warmup, fraction=0.1),
    "warmup50": partial(_warmup, fraction=0.5),
}


def make_betas(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """The β of a schedule by name, or `trained_betas` as given, checked.

    Args:
        beta_schedule: a key of `BETA_SCHEDULES`.
        num_train_timesteps: T, the number of entries.
        beta_start, beta_end: the range of β, each in (0, 1); some schedules do not use it.
        trained_betas: T numbers to use instead of a schedule.

    Returns a float64 tensor of shape (T,) with every entry in (0, 1); the last may be 1. Raises TypeError or ValueError
    that names the argument.
    """
    check_int("num_train_timesteps", num_train_timesteps, 1, MAX_TIMESTEPS)
    if trained_betas is None:
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_float("beta_start", beta_start, "(0, 1)")
        check_float("beta_end", beta_end, "(0, 1)")
        return BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
    betas = as_float64("trained_betas", trained_betas).clone()
    if betas.shape != (num_train_timesteps,):
        raise ValueError(f"trained_betas must have {num_train_timesteps=} entries, got shape {tuple(betas.shape)}.")
    check_betas(betas, "trained_betas")
    return betas


def as_float64(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """`values` as float64 on the CPU. Raises ArgumentTypeError, naming the argument, if they are not real numbers."""
    try:
        numbers = torch.as_tensor(values, device="cpu")
        if numbers.is_complex() or numbers.dtype == torch.bool:
            raise TypeError(f"{numbers.dtype} is no real number.")
        # Not of `numbers`: those of a list of floats are float32.
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentTypeError(f"{name} must be a sequence of numbers, got {shown(values)}.") from error


def check_betas(betas: Tensor, name: str = "betas", one_is_last: bool = True) -> None:
    """ValueError unless `betas` has shape (T,), T ≥ 1, every entry in (0, 1), and the last in (0, 1]. In float64 a β of a
    sub-chain may be rounded to 1 before the last (`one_is_last=False`)."""
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"{name} must have shape (T,) with T of at least 1, got shape {tuple(betas.shape)}.")
    if not bool(((betas > 0) & (betas <= 1)).all()) or (one_is_last and bool((betas[:-1] == 1).any())):
        raise ValueError(f"{name} must lie in (0, 1), the last in (0, 1], got {betas.min():g} to {betas.max():g}.")


def check_alphas(alphas: Sequence[float] | Tensor, T: int) -> Tensor:
    """`alphas` as float64 (T,). Raises ValueError or TypeError for other shapes, and for numbers outside [0, 1)."""
    alphas = as_float64("alphas", alphas)
    if alphas.shape != (T,) or not bool(((alphas >= 0) & (alphas < 1)).all()):
        given = f"shape {tuple(alphas.shape)}, {shown(alphas.tolist())}"
        raise ValueError(f"alphas must be {T} numbers in [0, 1), got {given}.")
    return alphas


def scale_betas_for_timesteps(
    num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> tuple[float, float]:
    """Scale the range of a linear schedule for T other than 1000, so that it ends at the same noise level.

    Both ends are multiplied by 1000/T (as in Improved DDPM's code). This keeps Σβ_t and therefore, to first order in β,
    ᾱ_t at equal t/T: at T = 100, ᾱ_T is 4e-5, and 0.36 without scaling.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: the range for T = 1000.

    Returns `(beta_start, beta_end)`, which every diffusers scheduler accepts. Raises ValueError where T is so small that
    β would reach 1 (20 for the default range).
    """
    check_int("num_train_timesteps", num_train_timesteps, 1)
    check_float("beta_start", beta_start, "(0, 1)")
    check_float("beta_end", beta_end, "(0, 1)")
    scale = 1000 / num_train_timesteps
    largest, name = max((beta_start, "beta_start"), (beta_end, "beta_end"))
    if largest * scale >= 1:
        raise ValueError(
            f"num_train_timesteps={num_train_timesteps} must be above {1000 * largest:g} for a linear schedule to "
            f"{name}={largest}: β would reach {largest * scale:g}. Use beta_schedule='squaredcos_cap_v2'."
        )
    return beta_start * scale, beta_end * scale


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Change β so that the chain ends in pure noise, ᾱ_T = 0 (Lin et al. 2023, algorithm 1).

    √ᾱ is shifted to 0 at T and then scaled so that √ᾱ_1 keeps its value. Shapes: (T,) to (T,), float64; the first β
    stays and the last becomes 1. Raises ValueError for T = 1.
    """
    if len(betas) == 1:
        raise ValueError("rescale_betas_zero_snr needs num_train_timesteps of at least 2, got 1.")
    root = torch.cumprod(1 - betas, 0).sqrt()
    # √ᾱ_t − √ᾱ_{t+1} as √ᾱ_t·β/(1 + √(1−β)), and √ᾱ_t − √ᾱ_T as a sum of those: no difference of nearly equal numbers.
    drop = root[:-1] * betas[1:] / (1 + (1 - betas[1:]).sqrt())
    shifted = torch.cat([drop.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64, device="cpu")])
    # 1 − r²/p² = (p − r)(p + r)/p²; the common scale cancels.
    later = drop * (shifted[:-1] + shifted[1:]) / shifted[:-1].square()
    later[-1] = 1
    return torch.cat([betas[:1], later])
