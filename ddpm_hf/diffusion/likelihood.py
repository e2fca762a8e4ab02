"""The variational bound on −log p_θ(x_0) in bits per dimension: L_T + Σ L_{t−1} + L_0 (DDPM, eq. 5).

Index t is that of gaussian.py: the term at t = 0 is the paper's L_0, the decoder's, and the term at t is its L_t.
A respaced chain is a chain, so `GaussianDiffusion.respace` gives its bound.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ddpm_hf.diffusion.gaussian import GaussianDiffusion, gaussian_kl

Model = Callable[..., torch.Tensor]
Clip = Callable[[torch.Tensor], torch.Tensor]
LEVELS = 256


@dataclass(frozen=True)
class VariationalBound:
    """The bound and its parts, averaged over images. All but the mean squared errors are in bits per dimension.

    Attributes:
        num_images: how many the averages are over. stride: each image's terms were taken at every stride-th t.
        bits_per_dim: the bound. standard_error: of that mean, over the choice of images (and of timesteps).
        prior: L_T. decoder: L_0.
        timesteps: (T,) the number that the network is told at each index.
        terms: (T,) L_0, L_1, …, L_{T−1}.
        epsilon_mse, x_0_mse: (T,) mean squared error per pixel, in the units of [-1, 1]: of ε as predicted, and of
            x_0 as the reverse step uses it (clipped, if it clips).
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

    @property
    def decoder(self) -> float:
        return self.terms[0]


class BoundSums:
    """Sums that a `VariationalBound` is made of, in one float64 tensor `values` on the CPU.

    They are over images, so that the `values` of several processes add up to those of all. With `stride` above 1 an
    image with offset r is looked at for t = 0, 1 + r, 1 + r + stride, … only: every t is still seen by a share of the
    images, and the bound's expectation is the same.
    """

    def __init__(self, T: int, stride: int = 1):
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= max(T - 1, 1):
            raise ValueError(
                f"stride must be an integer in 1..{max(T - 1, 1)} for a chain of {T} steps, got {stride!r}."
            )
        self.T, self.stride = T, stride
        self.values = torch.zeros(1 + 4 * T + 3 * stride, dtype=torch.float64)
        # Views: prior; per t count, term and both squared errors; per offset count, sum and sum of squares of totals.
        self._prior = self.values[:1]
        self._by_t = self.values[1 : 1 + 4 * T].view(4, T)
        self._by_offset = self.values[1 + 4 * T :].view(3, stride)

    @torch.no_grad()
    def add(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        x_0: torch.Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        offsets: torch.Tensor | None = None,
        clip: Clip | None = None,
        labels: torch.Tensor | None = None,
    ) -> None:
        """Add a batch of images.

        Args:
            diffusion: the chain, of T steps.
            model: called as `model(x_t, t)` with x_t (b, C, H, W) of x_0's dtype and the network's own timesteps
                t (b,), int64; returns what `prediction_type` says, and a learned variance's channels after it.
            x_0: (B, C, H, W), images of 8 bits scaled to [-1, 1], on the model's device; float64 computes in float64.
            generator: of the noise, on any device: one, or one per image, which makes its numbers its own.
            offsets: (B,) int64 in 0..stride−1, on the CPU; 0 unless given.
            clip: maps the predicted x_0, as sampling does.
            labels: (B,) on the model's device: it is then called as `model(x_t, t, labels)`, and the bound is that on
                −log p_θ(x_0 | label).

        Raises ValueError for arguments that do not fit, and for a model whose output is not finite.
        """
        offsets = torch.zeros(len(x_0), dtype=torch.int64) if offsets is None else offsets
        self._check(diffusion, x_0, generator, offsets)
        t_parts, rows_parts, measured = [], [], []
        for k in range(-1, -(-(self.T - 1) // self.stride)):
            t = torch.zeros_like(offsets) if k < 0 else 1 + offsets + k * self.stride
            rows = (t < self.T).nonzero()[:, 0]
            if not len(rows):
                continue
            t = t[rows]
            x = x_0 if len(rows) == len(x_0) else x_0[rows.to(x_0.device)]
            noise = _noise(x, generator if not isinstance(generator, Sequence) else [generator[i] for i in rows])
            condition = () if labels is None else (labels[rows.to(labels.device)],)
            measured.append(_measure(diffusion, model, x, t, noise, clip, condition))
            t_parts.append(t)
            rows_parts.append(rows)
        t, rows, measured = torch.cat(t_parts), torch.cat(rows_parts), torch.cat(measured, 1).cpu().double()
        if not bool(measured.isfinite().all()):
            bad = t[~measured.isfinite().all(0)].unique()
            raise ValueError(
                f"the model's output must be finite: the bound is not at {len(bad)} of {self.T} timesteps, the first "
                f"of them {diffusion.timesteps[bad[0]].item()}."
            )
        prior = prior_bits(diffusion, x_0)
        weight = torch.where(t == 0, 1.0, float(self.stride))
        totals = prior.index_add(0, rows, measured[0] * weight)
        self._prior += prior.sum()
        self._by_t.index_add_(1, t, torch.cat([torch.ones(1, len(t), dtype=torch.float64), measured]))
        self._by_offset.index_add_(1, offsets, torch.stack([torch.ones_like(totals), totals, totals.square()]))

    def _check(self, diffusion, x_0, generator, offsets) -> None:
        if len(diffusion) != self.T:
            raise ValueError(
                f"diffusion must have the {self.T} steps that the sums were made for, got {len(diffusion)}."
            )
        if x_0.ndim != 4 or not len(x_0) or x_0.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"x_0 must be images (B, C, H, W) of float32 or float64, got {tuple(x_0.shape)} of {x_0.dtype}."
            )
        levels = x_0.cpu().double().add(1).mul((LEVELS - 1) / 2)
        if (
            not bool(((levels - levels.round()).abs() < 1e-3).all())
            or levels.min() < -0.5
            or levels.max() > LEVELS - 0.5
        ):
            raise ValueError(
                "x_0 must be images of 8 bits scaled to [-1, 1] (k/127.5 − 1): the decoder's likelihood is of those; "
                f"got values from {x_0.min().item():g} to {x_0.max().item():g} that are not all of this form."
            )
        if isinstance(generator, Sequence) and len(generator) != len(x_0):
            raise ValueError(f"generator must be one, or {len(x_0)} (one per image), got {len(generator)}.")
        if offsets.shape != (len(x_0),) or offsets.min() < 0 or offsets.max() >= self.stride:
            raise ValueError(f"offsets must be {len(x_0)} integers in 0..{self.stride - 1}, got {offsets.tolist()}.")

    def result(self, diffusion: GaussianDiffusion) -> VariationalBound:
        """The averages. Raises ValueError where there are fewer than two images for each offset."""
        count, total, squares = self._by_offset
        if count.min() < 2:
            raise ValueError(
                f"a bound with stride {self.stride} needs 2 images for each of its {self.stride} offsets, at least "
                f"{2 * self.stride} in all; got {int(count.sum())}, {int(count.min())} for one of them."
            )
        n = count.sum().item()
        prior = self._prior.item() / n
        terms, epsilon_mse, x_0_mse = self._by_t[1:] / self._by_t[0]
        # Images of one offset are a simple sample, and the offsets' shares are fixed: a stratified mean.
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
        )


def variational_bound(
    diffusion: GaussianDiffusion,
    model: Model,
    batches: Iterable[torch.Tensor],
    generator: torch.Generator | None = None,
    *,
    stride: int = 1,
    clip: Clip | None = None,
) -> VariationalBound:
    """The bound of `batches` of images in [-1, 1]; see `BoundSums.add` for the arguments.

    With `stride` the i-th image has offset i modulo stride, so the order of the images should mean nothing.
    """
    sums, done = BoundSums(len(diffusion), stride), 0
    for x_0 in batches:
        sums.add(diffusion, model, x_0, generator, torch.arange(done, done + len(x_0)) % stride, clip)
        done += len(x_0)
    return sums.result(diffusion)


def _measure(diffusion, model, x_0, t, noise, clip, condition) -> torch.Tensor:
    """(3, B): the term in bits/dim and the squared errors of ε and x_0, at timesteps t (B,) of which all or none are 0."""
    is_decoder, t = bool(t[0] == 0), t.to(x_0.device)
    x_t = diffusion.q_sample(x_0, t, noise)
    output = model(x_t, diffusion.timesteps.to(t.device)[t], *condition).to(x_0.dtype)
    mean, log_variance, predicted = diffusion.p_mean_variance(output, x_t, t, clip)
    epsilon = diffusion.predict_epsilon(output[:, : x_0.shape[1]], x_t, t)
    if is_decoder:
        nats = -discretized_gaussian_log_likelihood(x_0, mean, log_variance).to(x_0.device, x_0.dtype)
    else:
        # The two means differ in x_0 alone: μ̃_t − μ_θ = √ᾱ_{t−1}β_t/(1−ᾱ_t)·(x_0 − x̂_0). Taken so, nothing cancels.
        difference = diffusion.at("posterior_mean_coef_x_0", t, x_0) * (x_0 - predicted)
        true_log_variance = diffusion.at("posterior_log_variance_clipped", t, x_0)
        nats = gaussian_kl(difference, true_log_variance, torch.zeros_like(difference), log_variance)
    parts = (nats / math.log(2), (epsilon - noise).square(), (predicted - x_0).square())
    return torch.stack([part.flatten(1).mean(1) for part in parts])


def prior_bits(diffusion: GaussianDiffusion, x_0: torch.Tensor) -> torch.Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of each image (B, C, H, W), in bits/dim: (B,), float64 on the CPU."""
    signal = diffusion.alphas_cumprod[-1].item()
    # The variance 1 − ᾱ is so near 1 that its logarithm is better had from ᾱ.
    log_variance = math.log1p(-signal) if signal < 0.5 else diffusion.one_minus_alphas_cumprod[-1].log().item()
    mean = signal**0.5 * x_0.cpu().double()
    return gaussian_kl(mean, log_variance, torch.zeros_like(mean), 0.0).flatten(1).mean(1) / math.log(2)


def discretized_gaussian_log_likelihood(
    x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor | float
) -> torch.Tensor:
    """`discretized_log_likelihood` in float64 on the CPU, since a likelihood is wanted once an image and its differences are small."""
    x_0, mean = x_0.cpu().double(), mean.cpu().double()
    return discretized_log_likelihood(x_0, mean, torch.as_tensor(log_variance, dtype=torch.float64, device="cpu"))


def discretized_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """log P(x_0) of each pixel under N(mean, variance) integrated over the pixel's 8-bit level, the outer levels
    reaching to ±∞ (DDPM, eq. 13), in nats.

    Shapes: all as `x_0`, or broadcasting against it; of its device and dtype; differentiable. Exact far out in the
    tails, where both ends of the level round to the same probability.
    """
    precision, centered, half = torch.exp(-log_variance / 2), x_0 - mean, 1 / (LEVELS - 1)
    infinity = torch.full_like(centered, torch.inf)
    low = torch.where(x_0 < -1 + half, -infinity, (centered - half) * precision)
    high = torch.where(x_0 > 1 - half, infinity, (centered + half) * precision)
    # log(Φ(high) − Φ(low)) = log(Φ(−low) − Φ(−high)): below the mean both logarithms keep their digits.
    above = low + high > 0
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    log_high = torch.special.log_ndtr(high)
    ratio = torch.special.log_ndtr(low) - log_high
    one_minus = torch.where(ratio > -math.log(2), (-torch.expm1(ratio)).log(), torch.log1p(-ratio.exp()))
    return log_high + one_minus


def _noise(like: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> torch.Tensor:
    """z ~ N(0, I) with the shape, dtype and device of `like`, drawn on the generators' device."""
    if isinstance(generator, Sequence):
        draws = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generator]
        return torch.stack(draws).to(like.device)
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
