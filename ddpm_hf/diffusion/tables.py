"""The tables that follow from a chain's β, and their values at a timestep."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_hf.checks import shown
from ddpm_hf.diffusion.schedules import as_float64
from ddpm_hf.diffusion.timesteps import Timestep, to_index_device

# (source, target): target = table·x_t ± table·source, for every pair of ε, x_0 and v.
CONVERSIONS = {
    ("epsilon", "sample"): ("sqrt_recip_alphas_cumprod", -1, "sqrt_recipm1_alphas_cumprod"),
    ("v_prediction", "sample"): ("sqrt_alphas_cumprod", -1, "sqrt_one_minus_alphas_cumprod"),
    ("sample", "epsilon"): ("sqrt_recip_one_minus_alphas_cumprod", -1, "sqrt_snr"),
    ("v_prediction", "epsilon"): ("sqrt_one_minus_alphas_cumprod", 1, "sqrt_alphas_cumprod"),
    ("sample", "v_prediction"): ("sqrt_snr", -1, "sqrt_recip_one_minus_alphas_cumprod"),
    ("epsilon", "v_prediction"): ("minus_sqrt_recipm1_alphas_cumprod", 1, "sqrt_recip_alphas_cumprod"),
}


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sample arithmetic: the widest of the tensors' own, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class TableLookup:
    """Values of tables at timesteps, rounded once to at least float32, without copies between host and device.

    Args:
        tables: float64 tensors on the CPU, whose first dimension is T.
    """

    def __init__(self, tables: dict[str, Tensor]):
        self._tables = tables
        self._floats: dict[str, list] = {}
        self._rounded: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        self.cache_tables(torch.device("cpu"))

    def cache_tables(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Copy the tables to `device`, rounded to `dtype`, ahead of the first lookup on it."""
        if (device, dtype) not in self._rounded:
            self._rounded[device, dtype] = {name: table.to(device, dtype) for name, table in self._tables.items()}

    def __call__(self, name: str, t: Timestep, like: Tensor) -> Tensor | float | list[float]:
        """Table `name` at t, to broadcast against `like` (batch first).

        For a table (T,): a float for an int t, and a tensor (B, 1, 1, ...) for a tensor t. For a table (T, n): n of
        them, as a list or along the first dimension.
        """
        t = to_index_device(t, like)
        if isinstance(t, int) and not torch.compiler.is_compiling():
            if name not in self._floats:
                self._floats[name] = self._tables[name].tolist()
            return self._floats[name][t]
        dtype = working_dtype(like)
        self.cache_tables(like.device, dtype)
        table = self._rounded[like.device, dtype][name]
        if isinstance(t, int):
            return table[t]
        # Indexing with a 0-d tensor would read it back to the host; with a tensor of length 1 it does not.
        rows = table[t.reshape(-1)].movedim(0, -1)
        return rows.reshape(*rows.shape, *[1] * (like.ndim - 1))


def chain_tables(
    betas: Tensor, alphas: Tensor | None = None, analytic_moments: Tensor | None = None
) -> dict[str, Tensor]:
    """Every table of the chain with these `betas`, float64 (T,), named as the attributes of `GaussianDiffusion`.

    Args:
        betas: float64 (T,).
        alphas: float64 (T,), for β so near 1 that 1 − β would lose its digits.
        analytic_moments: float64 (T,), Γ_t of Analytic-DPM; adds the tables of its variance.
    """
    alphas = 1 - betas if alphas is None else alphas
    alphas_cumprod = torch.cumprod(alphas, 0)
    alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alphas_cumprod[:-1]])
    # 1 − ᾱ_t = Σ ᾱ_{s−1}β_s: a sum of positive terms keeps the relative precision that 1 − ᾱ loses at small t.
    one_minus = torch.cumsum(alphas_cumprod_prev * betas, 0)
    one_minus_prev = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), one_minus[:-1]])
    posterior_variance = one_minus_prev / one_minus * betas
    # β̃ is 0 at index 0, so that its logarithm is taken of the next β̃ (as in the original code).
    clipped = torch.cat([posterior_variance[1:2] if len(betas) > 1 else betas[:1], posterior_variance[1:]])
    is_not_last_step = (torch.arange(len(betas), device="cpu") > 0).double()
    tables = {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "one_minus_alphas_cumprod": one_minus,
        "snr": alphas_cumprod / one_minus,
        "sqrt_snr": (alphas_cumprod / one_minus).sqrt(),
        "log_alphas": torch.where(betas < 0.5, torch.log1p(-betas), alphas.log()),
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
        "sampling_std_betas": betas.sqrt() * is_not_last_step,
        "is_not_last_step": is_not_last_step,
    }
    if analytic_moments is not None:
        # Analytic-DPM, theorem 1, with λ² = β̃: β̃_t + (coefficient of x_0 in μ̃)²·Var(x_0 | x_t), and
        # Var(x_0 | x_t) = (1−ᾱ_t)/ᾱ_t·(1 − Γ_t). An estimate Γ_t > 1 would make it negative: clamped (theorem 2).
        tables["x_0_variance"] = one_minus / alphas_cumprod * (1 - analytic_moments).clamp(min=0)
        analytic = posterior_variance + tables["posterior_mean_coef_x_0"].square() * tables["x_0_variance"]
        tables["analytic_variance"] = analytic
        tables["sampling_std_analytic_variance"] = analytic.sqrt() * is_not_last_step
        tables["log_variance_analytic"] = torch.where(analytic > 0, analytic, clipped).log()
    return tables


def reverse_step_table(tables: dict[str, Tensor], prediction_type: str, std: str) -> Tensor:
    """The coefficients of a reverse step in one table (T, 12), so that a step needs a single lookup.

    Columns 0 to 4 are a, b, c, d and σ_t of x_0 = a·x_t + b·output (eq. 9) and x_{t−1} = c·x_0 + d·x_t + σ_t·z (eq. 11).
    The others are for `GaussianDiffusion.ddim_mean_std`.

    Args:
        tables: those of `chain_tables`.
        std: name of the table of σ_t.
    """
    zero, one = torch.zeros_like(tables["betas"]), torch.ones_like(tables["betas"])
    rest = tables["sqrt_one_minus_alphas_cumprod"]
    to_x_0, to_noise = [zero, one], [zero, rest]  # from (x_t, output) to x_0, and to √(1−ᾱ_t)·ε
    if prediction_type != "sample":
        x_t, sign, output = CONVERSIONS[prediction_type, "sample"]
        to_x_0 = [tables[x_t], sign * tables[output]]
    if prediction_type != "epsilon":
        x_t, sign, output = CONVERSIONS[prediction_type, "epsilon"]
        to_noise = [rest * tables[x_t], sign * rest * tables[output]]
    means = [tables["posterior_mean_coef_x_0"], tables["posterior_mean_coef_x_t"]]
    free = tables["posterior_variance"] / tables["one_minus_alphas_cumprod"]
    x_0_variance = tables.get("x_0_variance", zero) * tables["is_not_last_step"]
    ddim = [free, tables["sqrt_alphas"], tables["posterior_variance"], x_0_variance]
    last = [tables["alphas_cumprod_prev"].sqrt(), *to_noise]
    return torch.stack([*to_x_0, *means, tables[std], *ddim, *last], dim=1)


def check_moments(moments: Tensor | Sequence[float], T: int) -> Tensor:
    """`moments` as float64 (T,). Raises ValueError for other shapes, and for numbers that are negative or not finite."""
    moments = as_float64("analytic_moments", moments)
    if moments.shape != (T,) or not bool(((moments >= 0) & moments.isfinite()).all()):
        given = f"shape {tuple(moments.shape)}, {shown(moments.tolist())}"
        raise ValueError(f"analytic_moments must be {T} finite numbers of at least 0, got {given}.")
    return moments
