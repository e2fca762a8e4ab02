"""The derivation: forward process, posterior, learned reverse process and their sub-chains. Pure torch.

Index t of this file is the paper's t + 1 (diffusers' timesteps): `alphas_cumprod[0]` is ᾱ₁, and the step at t = 0
lands on the image. Equation numbers are those of docs/derivation.md.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ddpm_hf.diffusion.schedules import chain_tables, check_betas
from ddpm_hf.diffusion.timesteps import Timestep, as_timesteps, check_timestep, to_index_device

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# The tables of σ_t (0 where x_{t−1} is the image) and log σ_t². The log variants of a variance differ from the plain
# ones only in how other code stored the number.
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

# target = table·x_t ± table·source, for every two of ε, x_0 and v.
_CONVERSIONS = {
    ("epsilon", "sample"): ("sqrt_recip_alphas_cumprod", -1, "sqrt_recipm1_alphas_cumprod"),
    ("v_prediction", "sample"): ("sqrt_alphas_cumprod", -1, "sqrt_one_minus_alphas_cumprod"),
    ("sample", "epsilon"): ("sqrt_recip_one_minus_alphas_cumprod", -1, "sqrt_snr"),
    ("v_prediction", "epsilon"): ("sqrt_one_minus_alphas_cumprod", 1, "sqrt_alphas_cumprod"),
    ("sample", "v_prediction"): ("sqrt_snr", -1, "sqrt_recip_one_minus_alphas_cumprod"),
    ("epsilon", "v_prediction"): ("minus_sqrt_recipm1_alphas_cumprod", 1, "sqrt_recip_alphas_cumprod"),
}


class ReverseStep(NamedTuple):
    """p_θ(x_{t−1} | x_t): its mean, the standard deviation of the noise that sampling adds (0 where x_{t−1} is the
    image) and the x_0 it was made with. `mean` and `x_0` have the image's shape; `std` broadcasts against it."""

    mean: torch.Tensor
    std: torch.Tensor | float
    x_0: torch.Tensor


class ReverseDistribution(NamedTuple):
    """p_θ(x_{t−1} | x_t) as a density; `log_variance` broadcasts against `mean`."""

    mean: torch.Tensor
    log_variance: torch.Tensor | float
    x_0: torch.Tensor


class GaussianDiffusion:
    """A chain of T noising steps with variances β and everything that follows from them.

    Args:
        betas: float64 tensor (T,), each in (0, 1); the last may be 1 (zero terminal SNR).
        prediction_type: what the network's output means: "epsilon", "sample" (x_0) or "v_prediction".
        variance_type: Σ_θ of the reverse step: β̃_t ("fixed_small"), β_t ("fixed_large"), the optimum that the
            network's own second moment tells ("analytic"), or predicted in a second half of the channels, as the
            variance itself ("learned") or between β̃_t and β_t ("learned_range").
        timesteps: (T,) the number that the network is told at each index; 0..T−1 unless this is a sub-chain.
        analytic_moments: (T,) Γ_t = E‖ε_θ(x_t, t)‖²/d, of `estimate_analytic_moments`; with "analytic" only.
        alphas: (T,) float64, 1 − β where the difference would lose it: long strides have β within 1e-16 of 1.

    The tables (`betas`, `alphas_cumprod`, `posterior_variance`, ...) are float64 on the CPU. They are rounded once,
    to at least float32, when a method uses them. A timestep is an int, a 0-d tensor, or one per sample; tensors may
    be on any device and are never read back to the host, so that out-of-range values are noticed on the CPU only.
    """

    def __init__(
        self,
        betas: torch.Tensor,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        timesteps: torch.Tensor | None = None,
        analytic_moments: torch.Tensor | Sequence[float] | None = None,
        *,
        alphas: torch.Tensor | None = None,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type must be one of {VARIANCE_TYPES}, got {variance_type!r}.")
        if (variance_type == "analytic") != (analytic_moments is not None):
            raise ValueError(
                f"variance_type='analytic' and analytic_moments go together: got variance_type={variance_type!r} and "
                f"analytic_moments {'missing' if analytic_moments is None else 'given'}."
            )
        self.prediction_type, self.variance_type = prediction_type, variance_type
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if alphas is None:
            check_betas(betas)
        self.timesteps = torch.arange(len(betas), device="cpu") if timesteps is None else timesteps
        if self.timesteps.shape != betas.shape:
            raise ValueError(f"timesteps must have shape {tuple(betas.shape)}, got {tuple(self.timesteps.shape)}.")
        self.analytic_moments = None if analytic_moments is None else _check_moments(analytic_moments, len(betas))
        tables = chain_tables(betas, alphas, self.analytic_moments)
        tables["reverse_step"] = self._reverse_step_table(tables)
        self._set_tables(tables)
        if variance_type == "analytic" and self.alphas_cumprod[-1] == 0:
            raise ValueError(
                "variance_type='analytic' cannot be used where ᾱ_T is 0 (zero terminal SNR): "
                "the noise tells nothing of x_0."
            )
        if prediction_type == "epsilon" and not self.sqrt_recip_alphas_cumprod[-1] < torch.finfo(torch.float32).max:
            raise ValueError(
                f"prediction_type='epsilon' cannot be used where ᾱ_T is {self.alphas_cumprod[-1].item():g} (zero "
                "terminal SNR): x_T holds no trace of x_0, so x_0 cannot be had from the noise. Use 'v_prediction' or 'sample'."
            )

    def _reverse_step_table(self, tables: dict[str, torch.Tensor]) -> torch.Tensor:
        """(T, 5): a, b, c, d and σ_t of x_0 = a·x_t + b·output and x_{t−1} = c·x_0 + d·x_t + σ_t·z (eqs. 9, 11), so
        that a step looks up one table. σ_t of a learned variance is 0 at the last step and 1 elsewhere."""
        a, b = torch.zeros_like(tables["betas"]), torch.ones_like(tables["betas"])
        if self.prediction_type != "sample":
            x_t, sign, output = _CONVERSIONS[self.prediction_type, "sample"]
            a, b = tables[x_t], sign * tables[output]
        std = FIXED_VARIANCES[self.variance_type][0] if self.variance_type in FIXED_VARIANCES else "is_not_last_step"
        means = (tables["posterior_mean_coef_x_0"], tables["posterior_mean_coef_x_t"])
        return torch.stack([a, b, *means, tables[std]], dim=1)

    def _set_tables(self, tables: dict[str, torch.Tensor]) -> None:
        self.tables = tables
        self._floats: dict[str, list[float]] = {}
        self._rounded: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
        self.cache_tables(torch.device("cpu"))

    def cache_tables(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Copy the tables to `device`, rounded to `dtype`, ahead of the first use there (which would do it itself)."""
        if (device, dtype) not in self._rounded:
            self._rounded[device, dtype] = {name: table.to(device, dtype) for name, table in self.tables.items()}

    def __getattr__(self, name: str) -> torch.Tensor:
        tables = self.__dict__.get("tables", {})
        if name in tables:
            return tables[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    # ------------------------------------------------------------------ reading the tables at t

    def at(self, name: str, t: Timestep, like: torch.Tensor) -> torch.Tensor | float:
        """Table `name` at t, broadcastable against `like` (batch first): a float for an int t, else a tensor."""
        t = to_index_device(t, like)
        if isinstance(t, int) and not torch.compiler.is_compiling():
            if name not in self._floats:
                self._floats[name] = self.tables[name].tolist()
            return self._floats[name][t]
        table = self._rounded_table(name, like)
        # Indexing with a 0-d tensor would read it back to the host; selecting with one of length 1 does not.
        return table[t] if isinstance(t, int) else table[t.reshape(-1)].reshape(-1, *[1] * (like.ndim - 1))

    def _rounded_table(self, name: str, like: torch.Tensor) -> torch.Tensor:
        dtype = working_dtype(like)
        self.cache_tables(like.device, dtype)
        return self._rounded[like.device, dtype][name]

    def _reverse_step_coefficients(self, t: Timestep, like: torch.Tensor) -> Sequence[torch.Tensor | float]:
        """The row of "reverse_step" at t, by the rules of `at`."""
        if isinstance(t, int):
            row = self.at("reverse_step", t, like)
            return row if isinstance(row, list) else row.unbind()
        rows = self._rounded_table("reverse_step", like)[t.reshape(-1)]
        return rows.T.reshape(rows.shape[1], -1, *[1] * (like.ndim - 1)).unbind()

    def _checked_mix(self, a: str, x: torch.Tensor, sign: int, b: str, y: torch.Tensor, t: Timestep) -> torch.Tensor:
        self._check(x, y, t)
        return self._mix(a, x, sign, b, y, t)

    def _check(self, x: torch.Tensor, y: torch.Tensor, t: Timestep) -> None:
        if x.shape != y.shape:
            raise ValueError(
                f"images, noise and predictions must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}."
            )
        if not (x.is_floating_point() and y.is_floating_point()):
            raise TypeError(f"images and noise must be floating point, in [-1, 1], got {x.dtype} and {y.dtype}.")
        check_timestep(t, len(self), x)

    def _mix(self, a: str, x: torch.Tensor, sign: int, b: str, y: torch.Tensor, t: Timestep) -> torch.Tensor:
        """a_t·x ± b_t·y, in at least float32."""
        x = x.to(working_dtype(x, y))
        y, t = y.to(x.dtype), to_index_device(t, x)
        a_t, b_t = self.at(a, t, x), self.at(b, t, x)
        if isinstance(b_t, float):
            return torch.add(a_t * x, y, alpha=sign * b_t)
        return torch.addcmul(a_t * x, b_t, y, value=sign)

    # ------------------------------------------------------------------ forward process (eqs. 1 and 2)

    def q_step(self, x_prev: torch.Tensor, t: Timestep, noise: torch.Tensor) -> torch.Tensor:
        """x_t = √(1−β_t)·x_{t−1} + √β_t·z (eq. 1). Shapes: all as `x_prev`."""
        return self._checked_mix("sqrt_alphas", x_prev, 1, "sqrt_betas", noise, t)

    def q_mean_variance(self, x_0: torch.Tensor, t: Timestep) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Mean √ᾱ_t·x_0 and variance 1−ᾱ_t of q(x_t | x_0) (eq. 2)."""
        check_timestep(t, len(self), x_0)
        x_0 = x_0.to(working_dtype(x_0))
        return self.at("sqrt_alphas_cumprod", t, x_0) * x_0, self.at("one_minus_alphas_cumprod", t, x_0)

    def q_sample(self, x_0: torch.Tensor, t: Timestep, noise: torch.Tensor) -> torch.Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·z (eq. 2). Shapes: all as `x_0`; computed in at least float32."""
        return self._checked_mix("sqrt_alphas_cumprod", x_0, 1, "sqrt_one_minus_alphas_cumprod", noise, t)

    def velocity(self, x_0: torch.Tensor, t: Timestep, noise: torch.Tensor) -> torch.Tensor:
        """v_t = √ᾱ_t·z − √(1−ᾱ_t)·x_0 (Salimans and Ho 2022, section 4)."""
        return self._checked_mix("sqrt_alphas_cumprod", noise, -1, "sqrt_one_minus_alphas_cumprod", x_0, t)

    # ------------------------------------------------------------------ posterior (eqs. 7 and 8)

    def q_posterior(
        self, x_0: torch.Tensor, x_t: torch.Tensor, t: Timestep
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Mean μ̃_t and variance β̃_t of q(x_{t−1} | x_t, x_0) (eqs. 7 and 8)."""
        mean = self._checked_mix("posterior_mean_coef_x_0", x_0, 1, "posterior_mean_coef_x_t", x_t, t)
        return mean, self.at("posterior_variance", t, mean)

    # ------------------------------------------------------------------ what a prediction stands for (eq. 9)

    def convert(self, value: torch.Tensor, x_t: torch.Tensor, t: Timestep, source: str, target: str) -> torch.Tensor:
        """A prediction at (x_t, t) in other terms; `source` and `target` are a prediction type or "score".

        x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (eq. 2), v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0, and the score ∇ log q(x_t) = −ε/√(1−ᾱ_t).
        Shapes: all as `x_t`. Where ᾱ_t is 0 neither ε nor the score tells x_0 or v: the result is not finite.
        """
        if {source, target} - {*PREDICTION_TYPES, "score"}:
            raise ValueError(
                f"source and target must be of {(*PREDICTION_TYPES, 'score')}, got {source!r} and {target!r}."
            )
        self._check(x_t, value, t)
        value = value.to(working_dtype(value, x_t))
        if source == target:
            return value
        if source == "score":
            epsilon = -self.at("sqrt_one_minus_alphas_cumprod", t, value) * value
            return self.convert(epsilon, x_t, t, "epsilon", target)
        if target == "score":
            epsilon = self.convert(value, x_t, t, source, "epsilon")
            return -self.at("sqrt_recip_one_minus_alphas_cumprod", t, value) * epsilon
        a, sign, b = _CONVERSIONS[source, target]
        return self._mix(a, x_t, sign, b, value, t)

    def predict_x_0(self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timestep) -> torch.Tensor:
        """The x_0 that the network's output stands for, by `prediction_type`."""
        return self.convert(model_output, x_t, t, self.prediction_type, "sample")

    def predict_epsilon(self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timestep) -> torch.Tensor:
        """The noise that the network's output stands for, by `prediction_type`."""
        return self.convert(model_output, x_t, t, self.prediction_type, "epsilon")

    def predict_x_0_from_epsilon(self, epsilon: torch.Tensor, x_t: torch.Tensor, t: Timestep) -> torch.Tensor:
        """x_0 = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t (eq. 9)."""
        return self.convert(epsilon, x_t, t, "epsilon", "sample")

    def posterior_mean_from_epsilon(self, epsilon: torch.Tensor, x_t: torch.Tensor, t: Timestep) -> torch.Tensor:
        """μ = (x_t − β_t/√(1−ᾱ_t)·ε)/√α_t (eqs. 10 and 11): `q_posterior` with x_0 from eq. 9 put in."""
        return self._checked_mix("epsilon_mean_coef_x_t", x_t, -1, "epsilon_mean_coef_epsilon", epsilon, t)

    # ------------------------------------------------------------------ reverse process (eqs. 3 and 11)

    def p_mean_std(self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timestep, clip=None) -> ReverseStep:
        """p_θ(x_{t−1} | x_t) (eqs. 3 and 11), to sample from, from the network's output at (x_t, t).

        `model_output` has the shape of x_t, or twice its channels for a learned variance. `clip`, when given, maps
        the predicted x_0 before the mean is made from it, and may write over it.
        """
        mean, std, x_0, variance_output = self._p_mean(model_output, x_t, t, clip)
        return ReverseStep(mean, std if variance_output is None else self._learned_std(variance_output, t, std), x_0)

    def p_mean_variance(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timestep, clip=None
    ) -> ReverseDistribution:
        """p_θ(x_{t−1} | x_t) (eqs. 3 and 11) as a density, for likelihoods; arguments as for `p_mean_std`.

        At index 0, where sampling adds no noise, the fixed variances take the next index's β̃ (the original code's
        convention), since the decoder of the image needs one above 0.
        """
        mean, _, x_0, variance_output = self._p_mean(model_output, x_t, t, clip)
        if self.variance_type in FIXED_VARIANCES:
            return ReverseDistribution(mean, self.at(FIXED_VARIANCES[self.variance_type][1], t, mean), x_0)
        if self.variance_type == "learned":
            return ReverseDistribution(mean, variance_output.log(), x_0)
        return ReverseDistribution(mean, self._interpolated_log_variance(variance_output, t), x_0)

    def _p_mean(self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timestep, clip) -> tuple[torch.Tensor, ...]:
        channels = x_t.shape[1]
        learned = self.variance_type in LEARNED_VARIANCES
        expected = (x_t.shape[0], 2 * channels if learned else channels, *x_t.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"with variance_type={self.variance_type!r} and a sample of shape {tuple(x_t.shape)} the model's "
                f"output must have {expected[1]} channels and the same batch and size, got shape {tuple(model_output.shape)}."
            )
        if not (x_t.is_floating_point() and model_output.is_floating_point()):
            raise TypeError(f"images and outputs must be floating point, got {x_t.dtype} and {model_output.dtype}.")
        check_timestep(t, len(self), x_t)
        dtype = working_dtype(x_t, model_output)
        x_t, model_output = x_t.to(dtype), model_output.to(dtype)
        variance_output = None
        if learned:
            model_output, variance_output = model_output[:, :channels], model_output[:, channels:]
        a, b, c, d, std = self._reverse_step_coefficients(to_index_device(t, x_t), x_t)
        x_0 = add_scaled_(a * x_t, b, model_output)
        if clip is not None:
            x_0 = clip(x_0)
        mean = add_scaled_(c * x_0, d, x_t)
        return mean, std, x_0, variance_output

    def _learned_std(self, variance_output: torch.Tensor, t: Timestep, is_not_last_step) -> torch.Tensor | float:
        if isinstance(is_not_last_step, float) and not is_not_last_step:
            return 0.0
        if self.variance_type == "learned":
            std = variance_output.sqrt()
        else:
            std = torch.exp(self._interpolated_log_variance(variance_output, t) / 2)
        # A product would keep a NaN of the last step, whose variance is never used.
        return std if isinstance(is_not_last_step, float) else torch.where(is_not_last_step != 0, std, 0.0)

    def _interpolated_log_variance(self, variance_output: torch.Tensor, t: Timestep) -> torch.Tensor:
        """v·log β_t + (1−v)·log β̃_t with v = (output + 1)/2 (Improved DDPM, eq. 15)."""
        low, high = (self.at(n, t, variance_output) for n in ("posterior_log_variance_clipped", "log_betas"))
        return low + (variance_output + 1) / 2 * (high - low)

    # ------------------------------------------------------------------ sub-chains

    def respace(self, timesteps: Sequence[int] | torch.Tensor) -> "GaussianDiffusion":
        """The chain that visits only `timesteps` (indices of this chain, any order, no duplicates).

        Its β follow from the ratios of ᾱ, β' = 1 − ᾱ_t/ᾱ_s, taken here as 1 − ∏(1−β) over the steps between,
        so that every formula of the full chain holds for it, and its last step lands on x_0.
        """
        kept = as_timesteps(timesteps).sort().values
        if kept[0] < 0 or kept[-1] >= len(self) or (kept.diff() == 0).any():
            raise ValueError(f"timesteps must be different integers in 0..{len(self) - 1}, got {kept.tolist()}.")
        betas, alphas = self.betas[: kept[-1] + 1], self.alphas[: kept[-1] + 1]
        log_alphas = torch.where(betas < 0.5, torch.log1p(-betas), alphas.log())
        segment = torch.searchsorted(kept, torch.arange(len(log_alphas), device="cpu"))
        log_ratio = torch.zeros(len(kept), dtype=torch.float64, device="cpu").index_add_(0, segment, log_alphas)
        moments = None if self.analytic_moments is None else self.analytic_moments[kept]
        return GaussianDiffusion(
            -torch.expm1(log_ratio),
            self.prediction_type,
            self.variance_type,
            self.timesteps[kept],
            moments,
            alphas=log_ratio.exp(),
        )

    def strided(self, timesteps: Sequence[int] | torch.Tensor) -> "GaussianDiffusion":
        """This chain, except that the step at each of `timesteps` goes straight to the next lower one of them (to
        x_0 from the lowest): `respace` with the full chain's numbering. All other timesteps keep their step."""
        chain = self.respace(timesteps)
        index = as_timesteps(timesteps).sort().values
        strided = copy.copy(self)
        strided._set_tables({n: table.index_copy(0, index, chain.tables[n]) for n, table in self.tables.items()})
        return strided


def add_scaled_(x: torch.Tensor, factor: torch.Tensor | float, y: torch.Tensor) -> torch.Tensor:
    """x + factor·y, written over x, which is a step's own temporary: memory just written is fast to write again."""
    return x.add_(y, alpha=factor) if isinstance(factor, float) else x.addcmul_(factor, y)


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype sample arithmetic happens in: the widest of the tensors' own, but at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def gaussian_kl(
    mean_1: torch.Tensor,
    log_variance_1: torch.Tensor | float,
    mean_2: torch.Tensor,
    log_variance_2: torch.Tensor | float,
) -> torch.Tensor:
    """KL(N(mean_1, variance_1) ‖ N(mean_2, variance_2)) of each element, in nats; arguments broadcast."""
    difference = log_variance_1 - log_variance_2
    expm1 = torch.expm1 if isinstance(difference, torch.Tensor) else math.expm1
    exp = torch.exp if isinstance(log_variance_2, torch.Tensor) else math.exp
    return (expm1(difference) - difference + (mean_1 - mean_2).square() * exp(-log_variance_2)) / 2


def _check_moments(moments: torch.Tensor | Sequence[float], T: int) -> torch.Tensor:
    moments = torch.as_tensor(moments, dtype=torch.float64, device="cpu")
    if moments.shape != (T,) or not bool((moments >= 0).all()) or not bool(moments.isfinite().all()):
        raise ValueError(
            f"analytic_moments must be {T} finite numbers of at least 0, one per timestep, got shape "
            f"{tuple(moments.shape)} with values from {moments.min().item():g} to {moments.max().item():g}."
        )
    return moments
