"""β schedules, the variance β_t of the noise added at step t (DDPM eq. 1), and the tables that follow, in float64.

Every schedule returns a float64 tensor of shape (T,) whose entry i is the paper's β_{i+1}. Formulas are
arranged so that small β keep their relative precision: nothing is computed as 1 minus a number near 1.
"""

import math
from collections.abc import Sequence

import torch


def _linear(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t from `beta_start` to `beta_end` in equal steps (DDPM, section 4)."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64, device="cpu")


def _scaled_linear(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """√β_t in equal steps ("quad" of the original DDPM code, "scaled_linear" of latent diffusion)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64, device="cpu").square()


def _sigmoid(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t along a logistic curve over [-6, 6] (GeoDiff)."""
    return torch.linspace(-6, 6, T, dtype=torch.float64, device="cpu").sigmoid() * (beta_end - beta_start) + beta_start


def _squaredcos_cap_v2(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """ᾱ(u) = cos²((u + 0.008)/1.008 · π/2), β capped at 0.999 (Improved DDPM, eq. 17); the range is not used.

    In angles from π/2, ᾱ = sin²: 1 − sin²b/sin²a = sin(a − b)·sin(a + b)/sin²a does not cancel, and a near 0 is exact.
    """
    angle = torch.arange(T, -1, -1, dtype=torch.float64, device="cpu") / T * (math.pi / 2 / 1.008)
    a, b = angle[:-1], angle[1:]
    betas = math.sin(math.pi / 2 / 1.008 / T) * torch.sin(a + b) / torch.sin(a).square()
    return betas.clamp(max=0.999)


def _laplace(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """diffusers' "laplace", β capped at 0.999; the range is not used.

    There ᾱ(u) = √(s/(1+s)) with s = (2u + ε)^−½ up to u = ½ and s = (2(1−u) + ε)^½ after it, ε = 1e-6. With
    w = √(2u + ε), or √(2(1−u) + ε), ᾱ² is 1/(1+w), or w/(1+w), so that 1 − ᾱ_b²/ᾱ_a² is a difference of neighboring w.
    """
    eps = 1e-6
    i = torch.arange(T + 1, dtype=torch.float64, device="cpu")
    folded = 2 * torch.minimum(i, T - i) / T
    w, gap = (folded + eps).sqrt(), 1 - folded - eps  # gap = 1 − w²
    a, b = w[:-1], w[1:]
    rising, falling = i[1:] <= T / 2, i[:-1] > T / 2
    step = 2 / T / (a + b)  # |b − a|
    # The one step across ½ has 1 − ab = (1 − a²b²)/(1 + ab) in its place.
    across = (gap[:-1] + gap[1:] - gap[:-1] * gap[1:]) / (1 + a * b)
    complement = torch.where(rising, step, torch.where(falling, step / a, across)) / (1 + b)
    return (complement / (1 + (1 - complement).sqrt())).clamp(max=0.999)


def _const(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t = `beta_end` (original DDPM code); `beta_start` is not used."""
    return torch.full((T,), beta_end, dtype=torch.float64, device="cpu")


def _jsd(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t = 1/(T − t + 1), t from 1: 1/T, 1/(T−1), …, 1 (Sohl-Dickstein et al. 2015), so ᾱ_t = 1 − t/T.

    The range is not used. The last β is 1, zero terminal SNR: it cannot be sampled from noise prediction.
    """
    return 1 / torch.arange(T, 0, -1, dtype=torch.float64, device="cpu")


def _warmup(T: int, beta_start: float, beta_end: float, fraction: float) -> torch.Tensor:
    """β_t rises linearly over the first ⌊fraction·T⌋ steps, then stays at `beta_end` (original DDPM code)."""
    rising = int(T * fraction)
    return torch.cat([_linear(rising, beta_start, beta_end), _const(T - rising, beta_start, beta_end)])


def _warmup10(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    return _warmup(T, beta_start, beta_end, 0.1)


def _warmup50(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    return _warmup(T, beta_start, beta_end, 0.5)


BETA_SCHEDULES = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
    "sigmoid": _sigmoid,
    "laplace": _laplace,
    # The original DDPM code's names, and those in full.
    "quad": _scaled_linear,
    "quadratic": _scaled_linear,
    "const": _const,
    "constant": _const,
    "jsd": _jsd,
    "warmup10": _warmup10,
    "warmup50": _warmup50,
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
    Raises TypeError for arguments that are no numbers, ValueError for an unknown schedule, for a count or range that
    makes no chain, and for `trained_betas` of a length other than `num_train_timesteps`.
    """
    _check_count(num_train_timesteps)
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number in (0, 1), got {value!r}.")
        if trained_betas is None and not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {value!r}.")
    if trained_betas is not None:
        try:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64, device="cpu").clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"trained_betas must be a sequence of numbers, got {trained_betas!r}.") from error
        if betas.shape != (num_train_timesteps,):
            raise ValueError(
                f"trained_betas must have num_train_timesteps = {num_train_timesteps} entries, "
                f"got shape {tuple(betas.shape)}."
            )
        check_betas(betas, "trained_betas")
    elif beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {sorted(BETA_SCHEDULES)}, got {beta_schedule!r}.")
    else:
        betas = BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
    return rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas


def check_betas(betas: torch.Tensor, name: str = "betas") -> None:
    """Raises ValueError unless `betas` is (T,), T ≥ 1, with every entry in (0, 1), the last in (0, 1]."""
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"{name} must have shape (T,) with T of at least 1, got shape {tuple(betas.shape)}.")
    if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
        raise ValueError(
            f"every entry of {name} must lie in (0, 1), and only the last may be 1: got values from "
            f"{betas.min().item():g} to {betas.max().item():g}."
        )


def scale_betas_for_timesteps(
    num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> tuple[float, float]:
    """`(beta_start, beta_end)` of a linear schedule of another length that ends at the same noise level.

    The range given is that of T = 1000. Both ends are multiplied by 1000/T (Improved DDPM's code), which keeps Σβ_t and
    so, to first order in β, ᾱ_t at equal t/T: ᾱ_T is 4e-5 rather than the 0.36 of an unscaled range at T = 100. What
    comes back are ordinary arguments, known to every scheduler of diffusers.

    Raises ValueError where `num_train_timesteps` is so small that β would reach 1 (20 for the default range).
    """
    _check_count(num_train_timesteps)
    scale = 1000 / num_train_timesteps
    if max(beta_start, beta_end) * scale >= 1:
        raise ValueError(
            f"num_train_timesteps={num_train_timesteps} is too small for beta_start={beta_start!r}, "
            f"beta_end={beta_end!r} of T = 1000: β would reach {max(beta_start, beta_end) * scale:g}. Use beta_schedule='squaredcos_cap_v2'."
        )
    return beta_start * scale, beta_end * scale


def _check_count(num_train_timesteps: int) -> None:
    if isinstance(num_train_timesteps, bool) or not isinstance(num_train_timesteps, int):
        raise TypeError(f"num_train_timesteps must be an integer of at least 1, got {num_train_timesteps!r}.")
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be an integer of at least 1, got {num_train_timesteps!r}.")


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """β whose chain ends in pure noise, ᾱ_T = 0 (Lin et al. 2023, algorithm 1): √ᾱ is shifted to 0 at T, then
    scaled so that √ᾱ_1 stays. The first β is kept, the last is 1. Raises ValueError for fewer than 2 timesteps."""
    if len(betas) == 1:
        raise ValueError("rescale_betas_zero_snr needs at least 2 timesteps: with one, ᾱ_1 cannot both stay and be 0.")
    root = torch.cumprod(1 - betas, 0).sqrt()
    # √ᾱ_t − √ᾱ_{t+1} as √ᾱ_t·β/(1 + √(1−β)), and √ᾱ_t − √ᾱ_T as a sum of those: no difference of near numbers.
    drop = root[:-1] * betas[1:] / (1 + (1 - betas[1:]).sqrt())
    shifted = torch.cat([drop.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64, device="cpu")])
    # 1 − r²/p² = (p − r)(p + r)/p², in which the common scale cancels.
    later = drop * (shifted[:-1] + shifted[1:]) / shifted[:-1].square()
    later[-1] = 1
    return torch.cat([betas[:1], later])


def chain_tables(
    betas: torch.Tensor, alphas: torch.Tensor | None = None, analytic_moments: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Every table of the chain of `betas`, float64, shape (T,), under the names of `GaussianDiffusion`'s attributes.

    `alphas` is 1 − β unless given; `analytic_moments` are the Γ_t of Analytic-DPM, with which come the tables of its
    variance. Both float64 (T,).
    """
    alphas = 1 - betas if alphas is None else alphas
    alphas_cumprod = torch.cumprod(alphas, 0)
    alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alphas_cumprod[:-1]])
    # 1 − ᾱ_t = Σ ᾱ_{s−1}β_s: a sum of positive terms keeps the relative precision that 1 − ᾱ loses at small t.
    one_minus = torch.cumsum(alphas_cumprod_prev * betas, 0)
    one_minus_prev = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), one_minus[:-1]])
    posterior_variance = one_minus_prev / one_minus * betas
    # β̃ of the first index is 0: its logarithm takes the next one's place (the original code's convention).
    clipped = torch.cat([posterior_variance[1:2] if len(betas) > 1 else betas[:1], posterior_variance[1:]])
    no_noise_last = torch.ones_like(betas)
    no_noise_last[0] = 0
    tables = {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "one_minus_alphas_cumprod": one_minus,
        "snr": alphas_cumprod / one_minus,
        "sqrt_snr": (alphas_cumprod / one_minus).sqrt(),
        "sqrt_betas": betas.sqrt(),
        "sqrt_alphas": alphas.sqrt(),
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": one_minus.sqrt(),
        "sqrt_recip_alphas_cumprod": alphas_cumprod.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (one_minus / alphas_cumprod).sqrt(),
        "minus_sqrt_recipm1_alphas_cumprod": -(one_minus / alphas_cumprod).sqrt(),
        "sqrt_recip_one_minus_alphas_cumprod": one_minus.rsqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": clipped.log(),
        "log_betas": betas.log(),
        "log_variance_betas": torch.cat([clipped[:1], betas[1:]]).log(),
        "posterior_mean_coef_x_0": alphas_cumprod_prev.sqrt() * betas / one_minus,
        "posterior_mean_coef_x_t": alphas.sqrt() * one_minus_prev / one_minus,
        "epsilon_mean_coef_x_t": alphas.rsqrt(),
        "epsilon_mean_coef_epsilon": betas / (one_minus * alphas).sqrt(),
        "sampling_std_posterior_variance": posterior_variance.sqrt(),
        "sampling_std_betas": betas.sqrt() * no_noise_last,
        "is_not_last_step": no_noise_last,
    }
    if analytic_moments is not None:
        # Analytic-DPM, theorem 1, with λ² = β̃: β̃_t + (coefficient of x_0 in μ̃)²·Var(x_0 | x_t), where the variance
        # of x_0 is (1−ᾱ_t)/ᾱ_t·(1 − Γ_t). An estimate Γ_t > 1 would make it negative: it counts as 1 (theorem 2).
        certain = (1 - analytic_moments).clamp(min=0)
        variance_of_x_0 = tables["posterior_mean_coef_x_0"].square() * one_minus / alphas_cumprod * certain
        analytic = posterior_variance + variance_of_x_0
        tables["analytic_variance"] = analytic
        tables["sampling_std_analytic_variance"] = analytic.sqrt() * no_noise_last
        tables["log_variance_analytic"] = torch.where(analytic > 0, analytic, clipped).log()
    return tables
