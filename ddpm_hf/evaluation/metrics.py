"""Distances between two sets of images, on their features: rows (N, d) that a backbone of features.py makes.

Features are float32; moments, kernels and distances are computed in float64 on the CPU.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

KERNELS = ("polynomial", "rbf")
QUANTILES = (0.05, 0.25, 0.5, 0.75)
BLOCK = 1024  # rows of a distance or kernel matrix held at a time


class Moments(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d) of `num` features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor
    num: int


class Estimate(NamedTuple):
    value: float
    standard_error: float


def moments(features: torch.Tensor, name: str = "features") -> Moments:
    """Mean and covariance of (N, d), by which the Fréchet distance knows a set.

    Raises ValueError where N is at most d: the covariance would be singular whatever the images are, and the distance
    would depend on N more than on them.
    """
    features = check_features(features, name)
    n, d = features.shape
    check_enough(n, d, name)
    mean = features.mean(0)
    centered = features - mean
    return Moments(mean, centered.T @ centered / (n - 1), n)


def check_enough(n: int, d: int, name: str = "features") -> None:
    """ValueError unless n images can have a covariance of full rank in d dimensions."""
    if n < d + 1:
        raise ValueError(
            f"{name} must be of at least {d + 1} images for a covariance of full rank in {d} dimensions, got {n}."
        )


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2(Σ_aΣ_b)^½), the squared distance of two normal distributions (Heusel et al. 2017).

    The trace of the root is the sum of the singular values of Σ_a^½Σ_b^½, each root from a symmetric eigenvalue
    problem. Singular covariances are no special case then, where the root of the product Σ_aΣ_b, which is not
    symmetric, loses half of its digits or becomes complex.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the features must have one dimension, got {len(a.mean)} and {len(b.mean)}.")
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    mean = (a.mean - b.mean).square().sum()
    distance = mean + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_distance(x: torch.Tensor, y: torch.Tensor, kernel: str = "polynomial", sigma: float = 10.0) -> Estimate:
    """Squared maximum mean discrepancy of (N, d) and (M, d), unbiased (Gretton et al. 2012, eq. 3), with the standard error
    of the jackknife over images.

    Args:
        kernel: "polynomial", (x·y/d + 1)³ (KID, Bińkowski et al. 2018), or "rbf", exp(−‖x − y‖²/2σ²) (CMMD,
            Jayasumana et al. 2024, with σ = 10 on normalized CLIP embeddings).

    Every pair is used, so nothing is drawn at random. Raises ValueError for fewer than 3 images on either side.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}.")
    x, y = _check_two(x, y, 3)
    n, m = len(x), len(y)

    def sums(a, b, same):
        """Row sums of the kernel matrix, without its diagonal where a is b."""
        rows = []
        for start in range(0, len(a), BLOCK):
            block = a[start : start + BLOCK]
            if kernel == "polynomial":
                k = (block @ b.T / a.shape[1] + 1) ** 3
            else:
                k = torch.exp(_squared_distances(block, b) / (-2 * sigma**2))
            if same:
                k.diagonal(start).zero_()
            rows.append(k.sum(1))
        return torch.cat(rows)

    xx, yy, xy, yx = sums(x, x, True), sums(y, y, True), sums(x, y, False), sums(y, x, False)

    def estimate(sum_xx, sum_yy, sum_xy, n, m):
        return sum_xx / (n * (n - 1)) + sum_yy / (m * (m - 1)) - 2 * sum_xy / (n * m)

    value = estimate(xx.sum(), yy.sum(), xy.sum(), n, m)
    without_x = estimate(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)
    without_y = estimate(xx.sum(), yy.sum() - 2 * yy, xy.sum() - yx, n, m - 1)
    variance = sum((len(w) - 1) * w.var(correction=0) for w in (without_x, without_y))
    return Estimate(value.item(), variance.sqrt().item())


def precision_recall(real: torch.Tensor, samples: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of samples inside the real images' manifold and of real images inside the samples' (Kynkäänniemi et al. 2019):
    within the distance of some point to its own k-th neighbor."""
    real, samples = _check_two(real, samples, k + 1)
    radii_real, radii_samples = _kth_neighbor(real, k), _kth_neighbor(samples, k)
    precision = _share(samples, real, lambda d: (d <= radii_real).any(1))
    recall = _share(real, samples, lambda d: (d <= radii_samples).any(1))
    return precision, recall


def density_coverage(real: torch.Tensor, samples: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """How many real neighborhoods a sample lies in, over k, and the share of real neighborhoods with a sample in them
    (Naeem et al. 2020); radii as for `precision_recall`, of the real images alone."""
    real, samples = _check_two(real, samples, k + 1)
    radii = _kth_neighbor(real, k)
    density = _share(samples, real, lambda d: (d <= radii).sum(1)) / k
    nearest, _ = nearest_neighbors(real, samples)
    return density, (nearest.square() <= radii).double().mean().item()


def nearest_neighbors(queries: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance (N,) of each of (N, d) to the nearest of (M, d), float64, and that one's index (N,)."""
    queries, others = _check_two(queries, others, 1)
    found = [_squared_distances(block, others).min(1) for block in queries.split(BLOCK)]
    return torch.cat([f.values for f in found]).sqrt(), torch.cat([f.indices for f in found])


@dataclass(frozen=True)
class Memorization:
    """How near samples lie to training images, beside how near held-out real images do, in one space.

    `closer_than_5_percent_of_validation`: share of samples nearer to a training image than 95 % of validation images are.
    `closer_p_value`: of the one-sided Kolmogorov-Smirnov test whose alternative is that samples lie nearer; a small
    one means copies. `closest`: (sample, training image, distance) of the closest pairs, closest first.
    """

    distance_quantiles: dict[str, float]
    distance_quantiles_validation: dict[str, float]
    closer_than_5_percent_of_validation: float
    closer_p_value: float
    closest: list[tuple[int, int, float]]

    def as_dict(self) -> dict:
        return asdict(self)


def memorization(
    samples: torch.Tensor, validation: torch.Tensor, training: torch.Tensor, pairs: int = 10
) -> Memorization:
    """Nearest training images of samples (N, d) against those of validation images (M, d); pixels or features."""
    from scipy.stats import ks_2samp  # here, so that the library is imported without scipy

    distances, nearest = nearest_neighbors(samples, training)
    validation_distances, _ = nearest_neighbors(validation, training)
    order = distances.argsort()[:pairs].tolist()
    return Memorization(
        distance_quantiles=_quantiles(distances),
        distance_quantiles_validation=_quantiles(validation_distances),
        closer_than_5_percent_of_validation=(distances < validation_distances.quantile(0.05)).double().mean().item(),
        closer_p_value=float(ks_2samp(distances.numpy(), validation_distances.numpy(), alternative="greater").pvalue),
        closest=[(i, nearest[i].item(), distances[i].item()) for i in order],
    )


def check_features(features: torch.Tensor, name: str = "features") -> torch.Tensor:
    """(N, d) as float64 on the CPU. Raises ValueError for another shape and for features that are not finite."""
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"{name} must have shape (N, d), got {tuple(features.shape)}.")
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{name} must be finite: NaN or infinity in {len(bad)} of {len(features)} rows, first {bad[0]}."
        )
    return features.cpu().double()


def _check_two(a: torch.Tensor, b: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = check_features(a), check_features(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the features must have one dimension, got {a.shape[1]} and {b.shape[1]}.")
    if min(len(a), len(b)) < least:
        raise ValueError(f"at least {least} images are needed on either side, got {len(a)} and {len(b)}.")
    return a, b


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Direct differences: ‖a‖² + ‖b‖² − 2a·b would leave copies at a distance of rounding errors.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def _kth_neighbor(x: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    # The row itself is the nearest: k + 1.
    return torch.cat([_squared_distances(block, x).kthvalue(k + 1, dim=1).values for block in x.split(BLOCK)])


def _share(queries: torch.Tensor, others: torch.Tensor, judge) -> float:
    return (
        torch.cat([judge(_squared_distances(block, others)).double() for block in queries.split(BLOCK)]).mean().item()
    )


def _quantiles(values: torch.Tensor) -> dict[str, float]:
    return {f"{q:g}": values.quantile(q).item() for q in QUANTILES}
