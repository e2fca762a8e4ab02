"""The diffusion process: forward process, posterior, learned reverse process, and sub-chains. Pure PyTorch.

Timesteps are those of diffusers: index t is the paper's t + 1, `alphas_cumprod[0]` is ᾱ₁, and the step at t = 0
gives x_0. Equation numbers are those of docs/derivation.md.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_hf.checks import ArgumentTypeError, check_choice
from ddpm_hf.diffusion.schedules import as_float64, check_alphas, check_betas
from ddpm_hf.diffusion.tables import (
    CONVERSIONS,
    TableLookup,
    chain_tables,
    check_moments,
    reverse_step_table,
    working_dtype,
)
from ddpm_hf.diffusion.timesteps import Timestep, as_timesteps, check_timestep, to_index_device

Clip = Callable[[Tensor], Tensor]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# The tables of σ_t (0 at the last step) and of log σ_t². "_log" variants are the same variances: the names come from
# code that stored their logarithms.
_SMALL = ("sampling_std_posterior_variance", "posterior_log_variance_clipped")
_LARGE = ("sampling_std_betas", "log_variance_betas")
FIXED_VARIANCES = {
    "fixed_small": _SMALL,
    "fixed_small_log": _SMALL,
    "fixed_large": _LARGE,
    "fixed_large_log": _LARGE,
    "analytic": ("sampling_std_analytic_variance", "log_variance_analytic"),
}
LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = (*FIXED_VARIANCES, *LEARNED_VARIANCES)


class ReverseStep(NamedTuple):
    """p_θ(x_{t−1} | x_t) for sampling.

    `mean` and `x_0`, the predicted image, have the shape of x_t. `std`, the standard deviation of the noise to add,
    broadcasts against it and is 0 at the last step.
    """

    mean: Tensor
    std: Tensor | float
    x_0: Tensor


class ReverseDistribution(NamedTuple):
    """p_θ(x_{t−1} | x_t) as a density. `log_variance` broadcasts against `mean`."""

    mean: Tensor
    log_variance: Tensor | float
    x_0: Tensor


class GaussianDiffusion:
    """A Markov chain of T steps that add noise with variances β, and its learned reversal (DDPM).

    Args:
        betas: float64 (T,), each in (0, 1); the last may be 1 (zero terminal SNR).
        prediction_type: what the network predicts: "epsilon", "sample" (x_0) or "v_prediction".
        variance_type: the variance of the reverse step: β̃_t ("fixed_small"), β_t ("fixed_large"), the optimal variance
            of Analytic-DPM ("analytic"), or predicted by the network in additional channels, as the variance itself
            ("learned") or as a point between β̃_t and β_t ("learned_range").
        timesteps: int64 (T,), the timestep that the network receives at each index: 0..T−1, except for a sub-chain.
        analytic_moments: (T,) Γ_t = E‖ε_θ(x_t, t)‖²/d from `estimate_analytic_moments`; for "analytic" only.
        alphas: float64 (T,), for β so near 1 that 1 − β would lose its digits, as in sub-chains of few steps.

    The tables (`betas`, `alphas_cumprod`, `posterior_variance`, ...) are float64 on the CPU. `lookup(name, t, like)`
    gives a table at t, rounded once to at least float32. A timestep is an int, a 0-d tensor, or a tensor (B,), on any
    device. It is never copied to the host, so that values out of range raise an error on the CPU only.

    Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        betas: Tensor,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        timesteps: Tensor | None = None,
        analytic_moments: Tensor | Sequence[float] | None = None,
        *,
        alphas: Tensor | None = None,
    ):
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        if (variance_type == "analytic") != (analytic_moments is not None):
            given = "missing" if analytic_moments is None else "given"
            raise ValueError(f"analytic_moments go with variance_type='analytic': {given} with {variance_type=}.")
        self.prediction_type, self.variance_type = prediction_type, variance_type
        betas = as_float64("betas", betas)
        check_betas(betas, one_is_last=alphas is None)
        if alphas is not None:
            alphas = check_alphas(alphas, len(betas))
        self.timesteps = torch.arange(len(betas), device="cpu") if timesteps is None else as_timesteps(timesteps)
        if self.timesteps.shape != betas.shape:
            raise ValueError(f"timesteps must have shape {tuple(betas.shape)}, got {tuple(self.timesteps.shape)}.")
        self.analytic_moments = None if analytic_moments is None else check_moments(analytic_moments, len(betas))
        tables = chain_tables(betas, alphas, self.analytic_moments)
        std = FIXED_VARIANCES[variance_type][0] if variance_type in FIXED_VARIANCES else "is_not_last_step"
        tables["reverse_step"] = reverse_step_table(tables, prediction_type, std)
        self._set_tables(tables)
        last = self.alphas_cumprod[-1]
        if variance_type == "analytic" and last == 0:
            raise ValueError("variance_type='analytic' needs ᾱ_T above 0, got 0 (zero terminal SNR).")
        if prediction_type == "epsilon" and not self.sqrt_recip_alphas_cumprod[-1] < torch.finfo(torch.float32).max:
            advice = "use 'v_prediction' or 'sample'"
            raise ValueError(f"prediction_type='epsilon' cannot have ᾱ_T = {last:g} (zero terminal SNR): {advice}.")

    def _set_tables(self, tables: dict[str, Tensor]) -> None:
        self.tables, self.lookup = tables, TableLookup(tables)
        vars(self).update(tables)

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    def _check(self, x: Tensor, y: Tensor, t: Timestep) -> None:
        if x.shape != y.shape:
            raise ValueError(f"images and noise must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
        if not (x.is_floating_point() and y.is_floating_point()):
            raise ArgumentTypeError(f"images and noise must be floating point, got {x.dtype} and {y.dtype}.")
        check_timestep(t, len(self), x)

    def _combine(self, a: str, x: Tensor, sign: int, b: str, y: Tensor, t: Timestep) -> Tensor:
        """a_t·x ± b_t·y for tables `a` and `b`, in at least float32."""
        self._check(x, y, t)
        x = x.to(working_dtype(x, y))
        y, t = y.to(x.dtype), to_index_device(t, x)
        return add_scaled_(self.lookup(a, t, x) * x, self.lookup(b, t, x), y, sign)

    # ------------------------------------------------------------------ forward process (eqs. 1 and 2)

    def q_step(self, x_prev: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """x_t = √(1−β_t)·x_{t−1} + √β_t·z (eq. 1). Shapes: all as `x_prev`."""
        return self._combine("sqrt_alphas", x_prev, 1, "sqrt_betas", noise, t)

    def q_mean_variance(self, x_0: Tensor, t: Timestep) -> tuple[Tensor, Tensor | float]:
        """Mean √ᾱ_t·x_0 and variance 1−ᾱ_t of q(x_t | x_0) (eq. 2)."""
        check_timestep(t, len(self), x_0)
        x_0 = x_0.to(working_dtype(x_0))
        return self.lookup("sqrt_alphas_cumprod", t, x_0) * x_0, self.lookup("one_minus_alphas_cumprod", t, x_0)

    def q_sample(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·z (eq. 2). Shapes: all as `x_0`; computed in at least float32."""
        return self._combine("sqrt_alphas_cumprod", x_0, 1, "sqrt_one_minus_alphas_cumprod", noise, t)

    def velocity(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """v_t = √ᾱ_t·z − √(1−ᾱ_t)·x_0 (Salimans and Ho 2022, section 4)."""
        return self._combine("sqrt_alphas_cumprod", noise, -1, "sqrt_one_minus_alphas_cumprod", x_0, t)

    # ------------------------------------------------------------------ posterior (eqs. 7 and 8)

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Timestep) -> tuple[Tensor, Tensor | float]:
        """Mean μ̃_t and variance β̃_t of q(x_{t−1} | x_t, x_0) (eqs. 7 and 8)."""
        mean = self._combine("posterior_mean_coef_x_0", x_0, 1, "posterior_mean_coef_x_t", x_t, t)
        return mean, self.lookup("posterior_variance", t, mean)

    # ------------------------------------------------------------------ conversion of predictions (eq. 9)

    def convert(self, value: Tensor, x_t: Tensor, t: Timestep, source: str, target: str) -> Tensor:
        """Convert a prediction at (x_t, t) from `source` to `target`, each a prediction type or "score".

        x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (eq. 2), v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0, and the score ∇ log q(x_t) = −ε/√(1−ᾱ_t).
        Shapes: all as `x_t`. If ᾱ_t is 0, x_0 and v cannot be computed from ε or the score: the result is not finite.
        """
        check_choice("source", source, (*PREDICTION_TYPES, "score"))
        check_choice("target", target, (*PREDICTION_TYPES, "score"))
        self._check(x_t, value, t)
        value = value.to(working_dtype(value, x_t))
        if source == target:
            return value
        if source == "score":
            epsilon = -self.lookup("sqrt_one_minus_alphas_cumprod", t, value) * value
            return self.convert(epsilon, x_t, t, "epsilon", target)
        if target == "score":
            epsilon = self.convert(value, x_t, t, source, "epsilon")
            return -self.lookup("sqrt_recip_one_minus_alphas_cumprod", t, value) * epsilon
        a, sign, b = CONVERSIONS[source, target]
        return self._combine(a, x_t, sign, b, value, t)

    def predict_x_0(self, model_output: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """x_0 from the network's output, by `prediction_type`. Shapes: all as `x_t`."""
        return self.convert(model_output, x_t, t, self.prediction_type, "sample")

    def predict_epsilon(self, model_output: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """ε from the network's output, by `prediction_type`. Shapes: all as `x_t`."""
        return self.convert(model_output, x_t, t, self.prediction_type, "epsilon")

    def predict_x_0_from_epsilon(self, epsilon: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """x_0 = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t (eq. 9)."""
        return self.convert(epsilon, x_t, t, "epsilon", "sample")

    def posterior_mean_from_epsilon(self, epsilon: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """μ = (x_t − β_t/√(1−ᾱ_t)·ε)/√α_t (eqs. 10 and 11): the mean of `q_posterior` at the x_0 of eq. 9."""
        return self._combine("epsilon_mean_coef_x_t", x_t, -1, "epsilon_mean_coef_epsilon", epsilon, t)

    # ------------------------------------------------------------------ reverse process (eqs. 3 and 11)

    def p_mean_std(self, model_output: Tensor, x_t: Tensor, t: Timestep, clip: Clip | None = None) -> ReverseStep:
        """p_θ(x_{t−1} | x_t) for sampling (eqs. 3 and 11), from the network's output at (x_t, t).

        Args:
            model_output: shape of `x_t`, (B, C, H, W), or (B, 2C, H, W) for a learned variance.
            clip: maps the predicted x_0 before the mean is computed from it; may work in place.
        """
        mean, std, x_0, variance_output = self._p_mean(model_output, x_t, t, clip)
        is_last_step = isinstance(std, float) and std == 0.0
        if variance_output is not None and not is_last_step:
            learned_std = torch.exp(self._learned_log_variance(variance_output, t) / 2)
            # Not a product: the last step's variance is not used, and may be NaN.
            std = learned_std if isinstance(std, float) else torch.where(std != 0, learned_std, 0.0)
        return ReverseStep(mean, std, x_0)

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Timestep, clip: Clip | None = None
    ) -> ReverseDistribution:
        """p_θ(x_{t−1} | x_t) as a density, for likelihoods (eqs. 3 and 11). Arguments as for `p_mean_std`.

        At index 0 the fixed variances are β̃ of index 1 (as in the original code): sampling adds no noise there, but
        the discretized decoder needs a variance above 0.
        """
        mean, _, x_0, variance_output = self._p_mean(model_output, x_t, t, clip)
        if variance_output is None:
            log_variance = self.lookup(FIXED_VARIANCES[self.variance_type][1], t, mean)
        else:
            log_variance = self._learned_log_variance(variance_output, t)
        return ReverseDistribution(mean, log_variance, x_0)

    def _p_mean(self, model_output: Tensor, x_t: Tensor, t: Timestep, clip: Clip | None) -> tuple:
        """Mean, σ_t (or whether to add noise, for a learned variance), x_0, and the channels of a learned variance."""
        x_t, prediction, variance_output = self._split_output(model_output, x_t, t)
        a, b, c, d, std, *_ = self.lookup("reverse_step", to_index_device(t, x_t), x_t)
        x_0 = add_scaled_(a * x_t, b, prediction)
        if clip is not None:
            x_0 = clip(x_0)
        mean = add_scaled_(c * x_0, d, x_t)
        return mean, std, x_0, variance_output

    def _split_output(self, model_output: Tensor, x_t: Tensor, t: Timestep) -> tuple[Tensor, Tensor, Tensor | None]:
        """x_t, the prediction, and the channels of a learned variance, all of one dtype; checked."""
        shape, learned = tuple(x_t.shape), self.variance_type in LEARNED_VARIANCES
        expected = (*shape[:1], 2 * shape[1], *shape[2:]) if learned else shape
        if model_output.shape != expected:
            given = f"variance_type={self.variance_type!r} and a sample of shape {shape}"
            raise ValueError(f"{given} need a model's output of shape {expected}, got {tuple(model_output.shape)}.")
        dtype = working_dtype(x_t, model_output)
        prediction, variance_output = model_output.chunk(2, 1) if learned else (model_output, None)
        self._check(x_t, prediction, t)
        return x_t.to(dtype), prediction.to(dtype), variance_output.to(dtype) if learned else None

    # ------------------------------------------------------------------ DDIM (Song et al. 2021)

    def ddim_mean_std(
        self,
        model_output: Tensor,
        x_t: Tensor,
        t: Timestep,
        eta: float = 0.0,
        clip: Clip | None = None,
        use_clipped_model_output: bool = False,
    ) -> ReverseStep:
        """The step of DDIM (eq. 12): x_{t−1} = √ᾱ_{t−1}·x_0 + √(1−ᾱ_{t−1}−σ²)·ε + σ·z with σ² = η²·β̃_t (eq. 16).

        η = 0 is deterministic, and η = 1 is `p_mean_std` with the variance β̃_t. With "analytic", σ² is the optimal
        variance for this mean, η²·β̃_t + (coefficient of x_0)²·Var(x_0 | x_t) (Analytic-DPM, theorem 1).

        Args:
            model_output: the network's prediction, shape of `x_t`.
            eta: η, in [0, 1].
            clip: maps the predicted x_0; may work in place.
            use_clipped_model_output: compute ε from the clipped x_0, not from the model's output.
        """
        x_t, prediction, _ = self._split_output(model_output, x_t, t)
        row = self.lookup("reverse_step", to_index_device(t, x_t), x_t)
        a, b, c, d, _, free, sqrt_alpha, variance, x_0_variance, sqrt_bar_prev, noise_x_t, noise_output = row
        # With ε = (x_t − √ᾱ_t·x_0)/√(1−ᾱ_t), eq. 12 is a sum of x_0 and x_t like eq. 11. Its coefficients are written in
        # those of eq. 11, which have η = 1: as sums of positive terms, in which no digits cancel.
        of_x_t = (d**2 + (1 - eta**2) * free) ** 0.5
        of_x_0 = c * (1 + eta**2 * sqrt_alpha * d) / (1 + sqrt_alpha * of_x_t)
        x_0 = add_scaled_(a * x_t, b, prediction)
        if clip is not None:
            x_0 = clip(x_0)
        if clip is None or use_clipped_model_output:
            mean = add_scaled_(of_x_0 * x_0, of_x_t, x_t)
        else:  # eq. 12 as it stands: ε is that of the prediction, not of the clipped x_0
            mean = add_scaled_(sqrt_bar_prev * x_0, of_x_t * noise_output, prediction)
            if self.prediction_type != "epsilon":
                mean = add_scaled_(mean, of_x_t * noise_x_t, x_t)
        is_deterministic = eta == 0 and self.variance_type != "analytic"
        std = 0.0 if is_deterministic else (eta**2 * variance + of_x_0**2 * x_0_variance) ** 0.5
        return ReverseStep(mean, std, x_0)

    def _learned_log_variance(self, variance_output: Tensor, t: Timestep) -> Tensor:
        """The log of the output, or v·log β_t + (1−v)·log β̃_t with v = (output + 1)/2 (Improved DDPM, eq. 15)."""
        if self.variance_type == "learned":
            return variance_output.log()
        low, high = (self.lookup(n, t, variance_output) for n in ("posterior_log_variance_clipped", "log_betas"))
        return low + (variance_output + 1) / 2 * (high - low)

    # ------------------------------------------------------------------ sub-chains

    def respace(self, timesteps: Sequence[int] | Tensor) -> "GaussianDiffusion":
        """The sub-chain of `timesteps`: indices of this chain, in any order, without duplicates.

        Its β follow from the ratios of ᾱ: β' = 1 − ᾱ_t/ᾱ_s, computed as 1 − ∏(1−β) over the steps between. Every formula
        of the full chain holds for it, and its last step gives x_0 without noise.
        """
        kept = as_timesteps(timesteps).sort().values
        if kept[0] < 0 or kept[-1] >= len(self) or (kept.diff() == 0).any():
            raise ValueError(f"timesteps must be different integers in 0..{len(self) - 1}, got {kept.tolist()}.")
        log_alphas = self.log_alphas[: kept[-1] + 1]
        segment = torch.searchsorted(kept, torch.arange(len(log_alphas), device="cpu"))
        log_ratio = torch.zeros(len(kept), dtype=torch.float64, device="cpu").index_add_(0, segment, log_alphas)
        moments = None if self.analytic_moments is None else self.analytic_moments[kept]
        arguments = (self.prediction_type, self.variance_type, self.timesteps[kept], moments)
        return GaussianDiffusion(-torch.expm1(log_ratio), *arguments, alphas=log_ratio.exp())

    def strided(self, timesteps: Sequence[int] | Tensor) -> "GaussianDiffusion":
        """`respace` with the full chain's indices: the step at each of `timesteps` goes to the next lower one of them
        (to x_0 from the lowest). The steps at all other timesteps stay as they are."""
        chain = self.respace(timesteps)
        index = as_timesteps(timesteps).sort().values
        return self._with_tables({n: table.index_copy(0, index, chain.tables[n]) for n, table in self.tables.items()})

    def ending_at_timestep_0(self) -> "GaussianDiffusion":
        """The chain whose step at index 0 does not go on to x_0: `ddim_mean_std` returns x_t, with x_0 as predicted."""
        table = self.tables["reverse_step"].clone()
        table[0, 2:9] = torch.tensor([0, 1, 0, 0, 1, 0, 0], dtype=table.dtype)
        table[0, 9] = self.tables["sqrt_alphas_cumprod"][0]
        return self._with_tables(self.tables | {"reverse_step": table})

    def _with_tables(self, tables: dict[str, Tensor]) -> "GaussianDiffusion":
        changed = copy.copy(self)
        changed._set_tables(tables)
        return changed


def add_scaled_(x: Tensor, factor: Tensor | float, y: Tensor, sign: int = 1) -> Tensor:
    """x ± factor·y in place of x, which must be a temporary of the caller: its memory is in the cache."""
    return x.add_(y, alpha=sign * factor) if isinstance(factor, float) else x.addcmul_(factor, y, value=sign)
