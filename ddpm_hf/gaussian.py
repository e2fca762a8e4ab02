"""The derivation: forward process, posterior, learnt reverse process and their sub-chains. Pure torch.

Index t of this file is the paper's t + 1 (diffusers' timesteps): `alphas_cumprod[0]` is ᾱ₁, and the step at t = 0
lands on the image. Equation numbers are those of docs/derivation.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# The log variants differ from the plain ones only in how other code stored the number.
FIXED_VARIANCES = {
    "fixed_small": "posterior_variance",
    "fixed_small_log": "posterior_variance",
    "fixed_large": "betas",
    "fixed_large_log": "betas",
}
LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = (*FIXED_VARIANCES, *LEARNED_VARIANCES)

Timestep = int | torch.Tensor


class ReverseStep(NamedTuple):
    """p_θ(x_{t−1} | x_t): its mean, the standard deviation of the noise that sampling adds (0 where x_{t−1} is the
    image) and the x_0 it was made with. `mean` and `x_0` have the image's shape; `std` broadcasts against it."""

    mean: torch.Tensor
    std: torch.Tensor | float
    x_0: torch.Tensor


class GaussianDiffusion:
    """A chain of T noising steps with variances β and everything that follows from them.

    Args:
        betas: float64 tensor (T,), each in (0, 1); the last may be 1 (zero terminal SNR).
        prediction_type: what the network's output means: "epsilon", "sample" (x_0) or "v_prediction".
        variance_type: Σ_θ of the reverse step: β̃_t ("fixed_small"), β_t ("fixed_large"), or predicted in a second
            half of the channels, as the variance itself ("learned") or between the two ("learned_range").
        timesteps: (T,) the number that the network is told at each index; 0..T−1 unless this is a sub-chain.

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
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type must be one of {VARIANCE_TYPES}, got {variance_type!r}.")
        self.prediction_type, self.variance_type = prediction_type, variance_type
        betas = betas.to(device="cpu", dtype=torch.float64)
        if prediction_type == "epsilon" and betas[-1] == 1:
            raise ValueError(
                "prediction_type='epsilon' cannot be used where the last β is 1 (zero terminal SNR): x_T holds no "
                "trace of x_0, so x_0 cannot be had from the noise. Use 'v_prediction' or 'sample'."
            )
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self._set_tables(_tables(betas))

    def _set_tables(self, tables: dict[str, torch.Tensor]) -> None:
        self.tables = tables
        self._floats = {name: table.tolist() for name, table in tables.items()}
        self._rounded: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}

    def __getattr__(self, name: str) -> torch.Tensor:
        tables = self.__dict__.get("tables", {})
        if name in tables:
            return tables[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __len__(self) -> int:
        return len(self.timesteps)

    # ------------------------------------------------------------------ reading the tables at t

    def at(self, name: str, t: Timestep, like: torch.Tensor) -> torch.Tensor | float:
        """Table `name` at t, broadcastable against `like` (batch first): a float for an int t, else a tensor."""
        if isinstance(t, int) and not torch.compiler.is_compiling():
            return self._floats[name][t]
        key = (like.device, working_dtype(like))
        if key not in self._rounded:
            self._rounded[key] = {n: table.to(*key) for n, table in self.tables.items()}
        value = self._rounded[key][name][t]
        return value if isinstance(t, int) or t.ndim == 0 else value.reshape(-1, *[1] * (like.ndim - 1))

    def check_timestep(self, t: Timestep, like: torch.Tensor) -> None:
        """Raises TypeError or ValueError for a t that is no timestep of this chain (values on a device and inside a
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
        if low < 0 or high >= len(self):
            raise ValueError(
                f"timesteps must lie in 0..{len(self) - 1}, got {low if low == high else f'{low}..{high}'}."
            )

    # ------------------------------------------------------------------ forward process (eqs. 1 and 2)

    def q_step(self, x_prev: torch.Tensor, t: Timestep, noise: torch.Tensor) -> torch.Tensor:
        """x_t = √(1−β_t)·x_{t−1} + √β_t·z (eq. 1). Shapes: all as `x_prev`."""
        return self._mix("sqrt_alphas", "sqrt_betas", x_prev, noise, t)

    def q_mean_variance(self, x_0: torch.Tensor, t: Timestep) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Mean √ᾱ_t·x_0 and variance 1−ᾱ_t of q(x_t | x_0) (eq. 2)."""
        self.check_timestep(t, x_0)
        x_0 = x_0.to(working_dtype(x_0))
        return self.at("sqrt_alphas_cumprod", t, x_0) * x_0, self.at("one_minus_alphas_cumprod", t, x_0)

    def q_sample(self, x_0: torch.Tensor, t: Timestep, noise: torch.Tensor) -> torch.Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·z (eq. 2). Shapes: all as `x_0`; computed in at least float32."""
        return self._mix("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", x_0, noise, t)

    def velocity(self, x_0: torch.Tensor, t: Timestep, noise: torch.Tensor) -> torch.Tensor:
        """v_t = √ᾱ_t·z − √(1−ᾱ_t)·x_0 (Salimans and Ho 2022, section 4)."""
        return self._mix("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", noise, -x_0, t)

    def _mix(self, a: str, b: str, x: torch.Tensor, y: torch.Tensor, t: Timestep) -> torch.Tensor:
        if x.shape != y.shape:
            raise ValueError(f"the image and the noise must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
        self.check_timestep(t, x)
        x, y = x.to(working_dtype(x)), y.to(working_dtype(x))
        return self.at(a, t, x) * x + self.at(b, t, x) * y

    # ------------------------------------------------------------------ posterior (eqs. 7 and 8)

    def q_posterior(
        self, x_0: torch.Tensor, x_t: torch.Tensor, t: Timestep
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Mean μ̃_t and variance β̃_t of q(x_{t−1} | x_t, x_0) (eqs. 7 and 8)."""
        mean = self._mix("posterior_mean_coef_x_0", "posterior_mean_coef_x_t", x_0, x_t, t)
        return mean, self.at("posterior_variance", t, mean)

    # ------------------------------------------------------------------ reverse process (eqs. 3, 9 to 11)

    def predict_x_0(self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timestep) -> torch.Tensor:
        """The x_0 that the network's output stands for, by `prediction_type`."""
        if self.prediction_type == "epsilon":
            return self.predict_x_0_from_epsilon(model_output, x_t, t)
        if self.prediction_type == "sample":
            return model_output.to(working_dtype(x_t))
        return self._mix("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", x_t, -model_output, t)

    def predict_x_0_from_epsilon(self, epsilon: torch.Tensor, x_t: torch.Tensor, t: Timestep) -> torch.Tensor:
        """x_0 = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t (eq. 9)."""
        return self._mix("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", x_t, -epsilon, t)

    def posterior_mean_from_epsilon(self, epsilon: torch.Tensor, x_t: torch.Tensor, t: Timestep) -> torch.Tensor:
        """μ = (x_t − β_t/√(1−ᾱ_t)·ε)/√α_t (eqs. 10 and 11): `q_posterior` with x_0 from eq. 9 put in."""
        return self._mix("epsilon_mean_coef_x_t", "epsilon_mean_coef_epsilon", x_t, -epsilon, t)

    def p_mean_std(self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timestep, clip=None) -> ReverseStep:
        """p_θ(x_{t−1} | x_t) (eqs. 3 and 11) from the network's output at (x_t, t).

        `model_output` has the shape of x_t, or twice its channels for a learned variance. `clip`, when given, maps
        the predicted x_0 before the mean is made from it.
        """
        channels = x_t.shape[1]
        expected = 2 * channels if self.variance_type in LEARNED_VARIANCES else channels
        if model_output.shape != (x_t.shape[0], expected, *x_t.shape[2:]):
            raise ValueError(
                f"with variance_type={self.variance_type!r} and a sample of shape {tuple(x_t.shape)} the model's output "
                f"must have {expected} channels and the same batch and size, got shape {tuple(model_output.shape)}."
            )
        variance_output = model_output[:, channels:]
        x_0 = self.predict_x_0(model_output[:, :channels], x_t, t)
        if clip is not None:
            x_0 = clip(x_0)
        mean, _ = self.q_posterior(x_0, x_t, t)
        return ReverseStep(mean, self._std(variance_output, t, mean), x_0)

    def _std(self, variance_output: torch.Tensor, t: Timestep, like: torch.Tensor) -> torch.Tensor | float:
        if self.variance_type in FIXED_VARIANCES:
            return self.at(f"sampling_std_{FIXED_VARIANCES[self.variance_type]}", t, like)
        variance_output = variance_output.to(like.dtype)
        if self.variance_type == "learned":
            std = variance_output.sqrt()
        else:  # Improved DDPM eq. 15, with v = (output + 1)/2
            low, high = self.at("posterior_log_variance_clipped", t, like), self.at("log_betas", t, like)
            std = torch.exp((low + (variance_output + 1) / 2 * (high - low)) / 2)
        # A product would keep a NaN of the last step, whose variance is never used.
        return torch.where(torch.as_tensor(self.at("is_last_step", t, like) != 0, device=like.device), 0.0, std)

    # ------------------------------------------------------------------ sub-chains

    def respace(self, timesteps: Sequence[int] | torch.Tensor) -> "GaussianDiffusion":
        """The chain that visits only `timesteps` (indices of this chain, any order, no duplicates).

        Its β follow from the ratios of ᾱ, β' = 1 − ᾱ_t/ᾱ_s, taken here as 1 − ∏(1−β) over the steps between,
        so that every formula of the full chain holds for it, and its last step lands on x_0.
        """
        kept = torch.as_tensor(timesteps)
        if kept.ndim != 1 or kept.numel() == 0 or kept.is_floating_point() or kept.dtype == torch.bool:
            raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps!r}.")
        kept = kept.to(device="cpu", dtype=torch.int64).sort().values
        if kept[0] < 0 or kept[-1] >= len(self) or (kept.diff() == 0).any():
            raise ValueError(f"timesteps must be different integers in 0..{len(self) - 1}, got {kept.tolist()}.")
        log_alphas = torch.log1p(-self.betas[: kept[-1] + 1])
        segment = torch.searchsorted(kept, torch.arange(len(log_alphas)))
        log_ratio = torch.zeros(len(kept), dtype=torch.float64).index_add_(0, segment, log_alphas)
        return GaussianDiffusion(
            -torch.expm1(log_ratio), self.prediction_type, self.variance_type, self.timesteps[kept]
        )

    def strided(self, timesteps: Sequence[int] | torch.Tensor) -> "GaussianDiffusion":
        """This chain, except that the step at each of `timesteps` goes straight to the next lower one of them (to
        x_0 from the lowest): `respace` with the full chain's numbering. All other timesteps keep their step."""
        chain = self.respace(timesteps)
        index = torch.as_tensor(timesteps).to(device="cpu", dtype=torch.int64).sort().values
        strided = GaussianDiffusion(self.betas, self.prediction_type, self.variance_type, self.timesteps)
        strided._set_tables({n: table.index_copy(0, index, chain.tables[n]) for n, table in self.tables.items()})
        return strided


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype sample arithmetic happens in: the image's own, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _tables(betas: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every table of a chain, float64, shape (T,)."""
    alphas = 1 - betas
    alphas_cumprod = torch.cumprod(alphas, 0)
    alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    # 1 − ᾱ_t = Σ ᾱ_{s−1}β_s: a sum of positive terms keeps the relative precision that 1 − ᾱ loses at small t.
    one_minus = torch.cumsum(alphas_cumprod_prev * betas, 0)
    one_minus_prev = torch.cat([torch.zeros(1, dtype=torch.float64), one_minus[:-1]])
    posterior_variance = one_minus_prev / one_minus * betas
    # β̃ of the first index is 0: its logarithm takes the next one's place (the original code's convention).
    clipped = torch.cat([posterior_variance[1:2] if len(betas) > 1 else betas[:1], posterior_variance[1:]])
    no_noise_last = torch.ones_like(betas)
    no_noise_last[0] = 0
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "one_minus_alphas_cumprod": one_minus,
        "snr": alphas_cumprod / one_minus,
        "sqrt_betas": betas.sqrt(),
        "sqrt_alphas": alphas.sqrt(),
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": one_minus.sqrt(),
        "sqrt_recip_alphas_cumprod": alphas_cumprod.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (one_minus / alphas_cumprod).sqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": clipped.log(),
        "log_betas": betas.log(),
        "posterior_mean_coef_x_0": alphas_cumprod_prev.sqrt() * betas / one_minus,
        "posterior_mean_coef_x_t": alphas.sqrt() * one_minus_prev / one_minus,
        "epsilon_mean_coef_x_t": alphas.rsqrt(),
        "epsilon_mean_coef_epsilon": betas / (one_minus * alphas).sqrt(),
        "sampling_std_posterior_variance": posterior_variance.sqrt(),
        "sampling_std_betas": betas.sqrt() * no_noise_last,
        "is_last_step": 1 - no_noise_last,
    }
