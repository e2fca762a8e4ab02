"""The variational bound on −log p_θ(x_0) in bits per dimension: L_T + Σ L_{t−1} + L_0 (DDPM, eq. 5).

Timesteps are those of gaussian.py: the term at index 0 is the paper's L_0 (the discretized decoder), and the term at
index t is its L_t. For the bound of a sub-chain use `GaussianDiffusion.respace`.

L_0 uses the exact normal CDF. Published code (DDPM, improved-diffusion) approximates it by tanh: its L_0 is 0.0005 to 0.010 bits
per dimension apart. The difference is least where the variance fits the prediction's errors, and grows with errors above it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_hf.checks import check_int
from ddpm_hf.diffusion.gaussian import FIXED_VARIANCES, Clip, GaussianDiffusion
from ddpm_hf.diffusion.timesteps import MAX_TIMESTEPS

Model = Callable[..., Tensor]
LEVELS = 256  # of an 8-bit image
DECODER_VARIANCES = 5  # at which L_0 is measured, for sub-chains


@dataclass(frozen=True)
class VariationalBound:
    """The bound and its parts, averaged over images, in bits per dimension unless noted.

    Attributes:
        num_images: the number of images.
        stride: every stride-th t was evaluated for an image.
        bits_per_dim: the bound.
        standard_error: of `bits_per_dim`, over the choice of images (and of timesteps).
        prior: L_T.
        timesteps: (T,) the timestep that the network receives at each index.
        terms: (T,) L_0, L_1, …, L_{T−1}.
        epsilon_mse, x_0_mse: (T,) mean squared error per pixel, of images in [-1, 1]: of the raw
            predicted ε, without `clip`, and of the predicted x_0 after `clip`.
        decoder_terms: L_0 with each of `decoder_log_variances` in place of the chain's own variance, for sub-chains.
            Empty for a learned variance.
    """

    num_images: int
    stride: int
    bits_per_dim: float
    standard_error: float
    prior: float
    timesteps: list[int]
    terms: list[float]
    epsilon_mse: list[float]
    x_0_mse: list[float]
    decoder_terms: list[float]


class BoundSums:
    """The sums that a `VariationalBound` is computed from, in one float64 tensor `values` on the CPU.

    Each is a sum over images, so that adding the `values` of several processes gives those of all. With `stride` above
    1, an image with offset r is evaluated at t = 0, 1 + r, 1 + r + stride, … only. Every t is still evaluated for some
    images, and the expectation of the bound is the same.

    Args:
        T: length of the chain.
        stride: in 1..T−1.
    """

    def __init__(self, T: int, stride: int = 1):
        self.T = T = check_int("T", T, 1, MAX_TIMESTEPS)
        self.stride = stride = check_int("stride", stride, 1, max(T - 1, 1), f"for a chain of {T} steps")
        # Views: the prior; for each t the count, term and both squared errors; for each offset the count, and the sum
        # and sum of squares of the images' bounds; L_0 by variance.
        sizes = (1, 4 * T, 3 * stride, DECODER_VARIANCES)
        self.values = torch.zeros(sum(sizes), dtype=torch.float64)
        self._prior, by_t, by_offset, self._decoder = self.values.split(sizes)
        self._by_t, self._by_offset = by_t.view(4, T), by_offset.view(3, stride)

    @torch.no_grad()
    def add(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        x_0: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        offsets: Tensor | None = None,
        clip: Clip | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Add a batch of images.

        Args:
            diffusion: a chain of T steps.
            model: called as `model(x_t, t)` with x_t (b, C, H, W) of the dtype of `x_0` and the network's timesteps
                t (b,), int64. Returns a prediction by `prediction_type`, with a learned variance in C more channels.
            x_0: (B, C, H, W), 8-bit images scaled to [-1, 1], on the model's device, float32 or float64.
            generator: of the noise, on any device: one, or one per image, which makes an image's noise independent of
                the batch.
            offsets: (B,) int64 in 0..stride−1, on the CPU; 0 by default.
            clip: maps the predicted x_0, as in sampling.
            labels: (B,) on the model's device. The model is then called as `model(x_t, t, labels)`, and the bound is
                that of −log p_θ(x_0 | label).

        Raises ValueError or TypeError that names the argument, and ValueError if the model's output is not finite.
        """
        offsets = torch.zeros(len(x_0), dtype=torch.int64) if offsets is None else offsets
        self._check(diffusion, x_0, generator, offsets)
        parts, decoder = [], None
        for k in range(-1, -(-(self.T - 1) // self.stride)):
            t = torch.zeros_like(offsets) if k < 0 else 1 + offsets + k * self.stride
            rows = (t < self.T).nonzero()[:, 0]
            if not len(rows):
                continue
            t = t[rows]
            x = x_0 if len(rows) == len(x_0) else x_0[rows.to(x_0.device)]
            noise = _noise(x, generator if not isinstance(generator, Sequence) else [generator[i] for i in rows])
            condition = () if labels is None else (labels[rows.to(labels.device)],)
            measured, predicted = _measure(diffusion, model, x, t, noise, clip, condition)
            parts.append((t, rows, measured))
            if k < 0 and diffusion.variance_type in FIXED_VARIANCES:
                decoder = decoder_terms(diffusion, x, predicted)
        t, rows, measured = (torch.cat(part, -1).cpu() for part in zip(*parts))
        measured = measured.double()
        if not bool(measured.isfinite().all()):
            bad = diffusion.timesteps[t[~measured.isfinite().all(0)].unique()]
            where = f"at {len(bad)} of {self.T} timesteps, the first of them {bad[0]}"
            raise ValueError(f"the model's output must be finite: the bound is not finite {where}.")
        if decoder is not None:
            self._decoder += decoder.sum(1)
        prior = prior_bits(diffusion, x_0)
        weight = torch.where(t == 0, 1.0, float(self.stride))
        totals = prior.index_add(0, rows, measured[0] * weight)
        self._prior += prior.sum()
        self._by_t.index_add_(1, t, torch.cat([torch.ones(1, len(t), dtype=torch.float64), measured]))
        self._by_offset.index_add_(1, offsets, torch.stack([torch.ones_like(totals), totals, totals.square()]))

    def _check(self, diffusion, x_0, generator, offsets) -> None:
        if len(diffusion) != self.T:
            raise ValueError(f"diffusion must have {self.T} steps, the T of these sums, got {len(diffusion)}.")
        if x_0.ndim != 4 or not len(x_0) or x_0.dtype not in (torch.float32, torch.float64):
            given = f"{tuple(x_0.shape)} of {x_0.dtype}"
            raise ValueError(f"x_0 must be images (B, C, H, W) of float32 or float64, got {given}.")
        levels = x_0.cpu().double().add(1).mul((LEVELS - 1) / 2)
        if not bool(((levels - levels.round().clamp(0, LEVELS - 1)).abs() < 1e-3).all()):
            given = f"other values, from {x_0.min():g} to {x_0.max():g}"
            raise ValueError(f"x_0 must be 8-bit images scaled to [-1, 1] (k/127.5 − 1), got {given}.")
        if isinstance(generator, Sequence) and len(generator) != len(x_0):
            raise ValueError(f"generator must be one, or {len(x_0)} (one per image), got {len(generator)}.")
        if offsets.shape != (len(x_0),) or offsets.min() < 0 or offsets.max() >= self.stride:
            raise ValueError(f"offsets must be {len(x_0)} integers in 0..{self.stride - 1}, got {offsets.tolist()}.")

    def result(self, diffusion: GaussianDiffusion) -> VariationalBound:
        """The averages. Raises ValueError with fewer than two images for an offset."""
        count, total, squares = self._by_offset
        if count.min() < 2:
            least, given = 2 * self.stride, f"{int(count.sum())}, {int(count.min())} for one offset"
            raise ValueError(f"stride={self.stride} needs 2 images per offset, at least {least} in all; got {given}.")
        n = count.sum().item()
        prior = self._prior.item() / n
        terms, epsilon_mse, x_0_mse = self._by_t[1:] / self._by_t[0]
        # Stratified sampling: the images of one offset are a stratum, and the strata have fixed weights.
        variance = (squares - total.square() / count).clamp(min=0) / (count - 1)
        error = (variance / count).sum().sqrt().item() / self.stride
        return VariationalBound(
            num_images=int(n),
            stride=self.stride,
            bits_per_dim=prior + terms.sum().item(),
            standard_error=error,
            prior=prior,
            timesteps=diffusion.timesteps.tolist(),
            terms=terms.tolist(),
            epsilon_mse=epsilon_mse.tolist(),
            x_0_mse=x_0_mse.tolist(),
            decoder_terms=(self._decoder / n).tolist() if diffusion.variance_type in FIXED_VARIANCES else [],
        )


def _measure(diffusion, model, x_0, t, noise, clip, condition) -> tuple[Tensor, Tensor]:
    """(3, B), the term in bits/dim and the squared errors of ε and x_0, and the predicted x_0. Of the timesteps t (B,)
    all are 0, or none."""
    like = x_0
    x_t = diffusion.q_sample(x_0, t, noise)
    output = model(x_t, diffusion.timesteps[t].to(x_0.device), *condition).to(x_0.dtype)
    if t[0] == 0:  # float64, on the CPU because some devices lack it: the decoder takes differences of near numbers
        output, x_0, x_t, noise = (values.cpu().double() for values in (output, x_0, x_t, noise))
    t = t.to(x_0.device)
    terms, predicted = bound_terms(diffusion, output, x_0, x_t, t, clip)
    epsilon = diffusion.predict_epsilon(output[:, : x_0.shape[1]], x_t, t)
    errors = ((epsilon - noise).square(), (predicted - x_0).square())
    return torch.stack([terms, *(error.flatten(1).mean(1) for error in errors)]).to(like), predicted


def bound_terms(
    diffusion: GaussianDiffusion, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, clip: Clip | None = None
) -> tuple[Tensor, Tensor]:
    """Each example's term of the variational bound at its t, in bits per dimension, differentiable (DDPM, eq. 5).

    At t > 0 this is KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)). At t = 0 it is L_0 = −log p_θ(x_0 | x_1) of the
    discretized decoder (DDPM, eq. 13).

    Args:
        output: the network's at (x_t, t): (B, C, H, W), or (B, 2C, H, W) for a learned variance.
        x_0, x_t: (B, C, H, W). t: (B,), int64.
        clip: maps the predicted x_0, as in sampling. Training does without: a clipped x_0 has no gradient.

    Returns the terms (B,) and the predicted x_0, shape of `x_0`.
    """
    mean, log_variance, predicted = diffusion.p_mean_variance(output, x_t, t, clip)
    # The two means differ in x_0 only: μ̃_t − μ_θ = √ᾱ_{t−1}β_t/(1−ᾱ_t)·(x_0 − x̂_0). Subtracting them would cancel.
    difference = diffusion.lookup("posterior_mean_coef_x_0", t, x_0) * (x_0 - predicted)
    true_log_variance = diffusion.lookup("posterior_log_variance_clipped", t, x_0)
    kl = gaussian_kl(difference, true_log_variance, torch.zeros_like(difference), log_variance)
    # Both are computed for every example: selecting by t would read t back from the device.
    decoder = -discretized_gaussian_log_likelihood(x_0, mean, log_variance)
    nats = torch.where((t == 0).reshape(-1, 1, 1, 1), decoder, kl)
    return nats.flatten(1).mean(1) / math.log(2), predicted


def decoder_log_variances(diffusion: GaussianDiffusion) -> Tensor:
    """Evenly spaced log-variances of the decoder L_0: float64 (DECODER_VARIANCES,).

    The first is that of the chain, the last that of its sub-chain of both ends. Those of all sub-chains with both ends lie
    between, because the variance at index 0 is β̃ of index 1, which grows with the jump. They are less than ln 2 apart if
    β_1 ≥ β_0, and equal for most analytic variances.
    """
    table, ends = FIXED_VARIANCES[diffusion.variance_type][1], sorted({0, len(diffusion) - 1})
    low, high = (chain.tables[table][0].item() for chain in (diffusion, diffusion.respace(ends)))
    return torch.linspace(low, high, DECODER_VARIANCES, dtype=torch.float64)


def decoder_terms(diffusion: GaussianDiffusion, x_0: Tensor, predicted: Tensor) -> Tensor:
    """L_0 of images (B, C, H, W) and of the x_0 predicted at t = 0, which is the decoder's mean, for each of
    `decoder_log_variances`: (DECODER_VARIANCES, B) in bits/dim, float64 on the CPU."""
    x_0, predicted = x_0.cpu().double(), predicted.cpu().double()
    terms = [discretized_gaussian_log_likelihood(x_0, predicted, v) for v in decoder_log_variances(diffusion)]
    return -torch.stack([term.flatten(1).mean(1) for term in terms]) / math.log(2)


def prior_bits(diffusion: GaussianDiffusion, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of images (B, C, H, W), in bits/dim: (B,), float64 on the CPU."""
    signal = diffusion.alphas_cumprod[-1].item()
    # The variance 1 − ᾱ is nearly 1: log1p keeps the digits of its logarithm.
    log_variance = math.log1p(-signal) if signal < 0.5 else diffusion.one_minus_alphas_cumprod[-1].log().item()
    mean = signal**0.5 * x_0.cpu().double()
    return gaussian_kl(mean, log_variance, torch.zeros_like(mean), 0.0).flatten(1).mean(1) / math.log(2)


def gaussian_kl(
    mean_1: Tensor, log_variance_1: Tensor | float, mean_2: Tensor, log_variance_2: Tensor | float
) -> Tensor:
    """KL(N(mean_1, variance_1) ‖ N(mean_2, variance_2)) of each element, in nats; arguments broadcast."""
    difference = log_variance_1 - log_variance_2
    expm1 = torch.expm1 if isinstance(difference, Tensor) else math.expm1
    exp = torch.exp if isinstance(log_variance_2, Tensor) else math.exp
    return (expm1(difference) - difference + (mean_1 - mean_2).square() * exp(-log_variance_2)) / 2


def discretized_gaussian_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log P(x_0) of each pixel in nats: N(mean, variance) integrated over the pixel's 8-bit level (DDPM, eq. 13).

    The lowest and highest level extend to ∓∞. Shapes: all as `x_0`, or broadcasting against it; differentiable. Exact
    far out in the tails, where both ends of a level round to the same probability.
    """
    precision, centered, half = torch.exp(-log_variance / 2), x_0 - mean, 1 / (LEVELS - 1)
    infinity = torch.full_like(centered, torch.inf)
    low = torch.where(x_0 < -1 + half, -infinity, (centered - half) * precision)
    high = torch.where(x_0 > 1 - half, infinity, (centered + half) * precision)
    # log(Φ(high) − Φ(low)) = log(Φ(−low) − Φ(−high)): both logarithms keep their digits below the mean.
    above = low + high > 0
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    log_high = torch.special.log_ndtr(high)
    ratio = torch.special.log_ndtr(low) - log_high
    one_minus = torch.where(ratio > -math.log(2), (-torch.expm1(ratio)).log(), torch.log1p(-ratio.exp()))
    return log_high + one_minus


def _noise(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """z ~ N(0, I) with the shape, dtype and device of `like`, drawn on the device of the generators."""
    if isinstance(generator, Sequence):
        draws = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generator]
        return torch.stack(draws).to(like.device)
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
