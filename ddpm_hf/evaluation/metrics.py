"""Distances between two sets of images, computed on their features (N, d) (see features.py).

Features are float32. Moments, kernels and distances are computed in float64 on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ddpm_hf.checks import check_choice

CLOSEST = 10  # pairs that `memorization` returns
QUANTILES = (0.05, 0.25, 0.5, 0.75)
BLOCK = 1024  # rows of a distance or kernel matrix that are in memory at a time
NEAREST_PRECISION, NEAREST_DENSITY = 3, 5  # neighbors whose distance is the radius of a ball
SPARE = 8  # candidates for the nearest neighbors beyond those wanted
ROUNDING = 1e-12  # of float64, relative to the largest squared norm
# Least numbers of images on either side.
MIN_KERNEL, MIN_PRECISION, MIN_DENSITY = 3, NEAREST_PRECISION + 1, NEAREST_DENSITY + 1


class Moments(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d) of features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


class Estimate(NamedTuple):
    """A value and its standard error, None if that is unknown."""

    value: float
    standard_error: float | None


def moments(features: torch.Tensor, name: str = "features") -> Moments:
    """Mean and covariance of features (N, d), for `frechet_distance`.

    Raises ValueError if N ≤ d: the covariance is then singular for any images, and the distance depends more on N
    than on them.
    """
    _check_rows(features, name)
    n, d = features.shape
    check_enough(n, d, name)
    # In blocks: a float64 copy of all features would take more memory than the features themselves.
    blocks = range(0, n, BLOCK)
    mean = sum(features[i : i + BLOCK].cpu().double().sum(0) for i in blocks) / n
    covariance = torch.zeros(d, d, dtype=torch.float64)
    for i in blocks:
        centered = features[i : i + BLOCK].cpu().double() - mean
        covariance.addmm_(centered.T, centered)
    return Moments(mean, covariance.div_(n - 1))


def check_enough(n: int, d: int, name: str = "features") -> None:
    """Raise ValueError unless n images can have a covariance of full rank in d dimensions."""
    if n < d + 1:
        raise ValueError(f"{name} must be at least {d + 1} images for a covariance of full rank {d}, got {n}.")


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2(Σ_aΣ_b)^½), the Fréchet distance of two normal distributions (Heusel et al. 2017).

    The trace of the square root is the sum of the singular values of Σ_a^½Σ_b^½, where both square roots come from
    symmetric eigenvalue problems. This is exact for singular covariances too. The square root of the product Σ_aΣ_b,
    which is not symmetric, would lose half of its digits there or become complex.
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


def kernel_distance(
    x: torch.Tensor,
    y: torch.Tensor,
    kernel: str = "polynomial",
    sigma: float = 10.0,
    sums_y: torch.Tensor | None = None,
) -> Estimate:
    """Unbiased squared maximum mean discrepancy of (N, d) and (M, d) (Gretton et al. 2012, eq. 3), with the jackknife's
    standard error over images.

    Args:
        kernel: "polynomial", (x·y/d + 1)³ (KID, Bińkowski et al. 2018), or "rbf", exp(−‖x − y‖²/2σ²) (CMMD,
            Jayasumana et al. 2024, with σ = 10 on normalized CLIP embeddings).
        sums_y: what `kernel_sums` returns for y, if it is known.

    All pairs are used, so the result is not random. Raises ValueError for fewer than 3 images in either set.
    """
    x, y = _check_pair(x, y, MIN_KERNEL)
    n, m = len(x), len(y)
    xx, yy = kernel_sums(x, kernel, sigma), kernel_sums(y, kernel, sigma) if sums_y is None else sums_y
    xy, yx = [], torch.zeros(m, dtype=x.dtype)
    for block in x.split(BLOCK):
        k = _kernel(block, y, kernel, sigma)
        xy.append(k.sum(1))
        yx += k.sum(0)
    xy = torch.cat(xy)

    def estimate(sum_xx, sum_yy, sum_xy, n, m):
        return sum_xx / (n * (n - 1)) + sum_yy / (m * (m - 1)) - 2 * sum_xy / (n * m)

    value = estimate(xx.sum(), yy.sum(), xy.sum(), n, m)
    without_x = estimate(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)
    without_y = estimate(xx.sum(), yy.sum() - 2 * yy, xy.sum() - yx, n, m - 1)
    variance = sum((len(w) - 1) * w.var(correction=0) for w in (without_x, without_y))
    return Estimate(value.item(), variance.sqrt().item())


def kernel_sums(x: torch.Tensor, kernel: str = "polynomial", sigma: float = 10.0) -> torch.Tensor:
    """Sums of the kernel of `kernel_distance` between each row of (N, d) and all others, (N,) float64. They may be
    computed once for several distances to x."""
    x, rows = check_features(x), []
    for start, block in zip(range(0, len(x), BLOCK), x.split(BLOCK)):
        k = _kernel(block, x, kernel, sigma)
        k.diagonal(start).zero_()
        rows.append(k.sum(1))
    return torch.cat(rows)


def _kernel(a: torch.Tensor, b: torch.Tensor, kernel: str, sigma: float) -> torch.Tensor:
    check_choice("kernel", kernel, ("polynomial", "rbf"))
    if kernel == "polynomial":
        return (a @ b.T / a.shape[1] + 1) ** 3
    return torch.exp(_squared_distances(a, b) / (-2 * sigma**2))


def squared_radii(real: torch.Tensor) -> torch.Tensor:
    """Squared distances (N, 6) of features (N, d) to themselves and their 5 nearest others, float64: column k has the radii
    of the balls of `precision_recall` and `density_coverage`, which may be computed once for several sets of samples."""
    real = check_features(real)
    return _nearest(real, real, min(len(real), MIN_DENSITY))[0]


def precision_recall(
    real: torch.Tensor, samples: torch.Tensor, k: int = NEAREST_PRECISION, radii: torch.Tensor | None = None
) -> tuple[float, float]:
    """Share of samples in the manifold of real images, and share of real images in the manifold of samples
    (Kynkäänniemi et al. 2019). A manifold is the union of balls whose radius is the distance to the k-th neighbor.
    `radii`: what `squared_radii` returns for `real`, if it is known."""
    real, samples = _check_pair(real, samples, k + 1)
    radii_real = _nearest(real, real, k + 1)[0] if radii is None else radii
    precision = _mean_over(samples, real, radii_real[:, k], lambda inside: inside.any(1))
    recall = _mean_over(real, samples, _nearest(samples, samples, k + 1)[0][:, k], lambda inside: inside.any(1))
    return precision, recall


def density_coverage(
    real: torch.Tensor, samples: torch.Tensor, k: int = NEAREST_DENSITY, radii: torch.Tensor | None = None
) -> tuple[float, float]:
    """Mean number of real images' balls that contain a sample, divided by k, and share of these balls that contain at
    least one sample (Naeem et al. 2020). A ball's radius is the distance to the k-th real neighbor. `radii`: as for
    `precision_recall`."""
    real, samples = _check_pair(real, samples, k + 1)
    radii_real = (_nearest(real, real, k + 1)[0] if radii is None else radii)[:, k]
    density = _mean_over(samples, real, radii_real, lambda inside: inside.sum(1)) / k
    nearest, _ = _nearest(real, samples, 1)
    return density, (nearest[:, 0] <= radii_real).double().mean().item()


def nearest_neighbors(queries: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distance of each of the queries (N, d) to the nearest of the others (M, d), float64 (N,), and its index
    (N,)."""
    squared, indices = _nearest(*_check_pair(queries, others, 1), 1)
    return squared[:, 0].sqrt(), indices[:, 0]


@dataclass(frozen=True)
class Memorization:
    """How close samples are to training images, compared with how close validation images are, in one space.

    Attributes:
        distance_quantiles, distance_quantiles_validation: of the Euclidean distances to the nearest training image.
        closer_than_5_percent_of_validation: share of samples that are closer to a training image than 95 % of validation
            images are.
        closer_p_value: probability of at least this share if samples are as close as validation images are. A small value
            indicates copies.
        closest: (sample, training image, distance) of the closest pairs, closest first.
    """

    distance_quantiles: dict[str, float]
    distance_quantiles_validation: dict[str, float]
    closer_than_5_percent_of_validation: float
    closer_p_value: float
    closest: list[tuple[int, int, float]]


def memorization(samples: torch.Tensor, validation: torch.Tensor, training: torch.Tensor) -> Memorization:
    """Compare distances from samples (N, d) and from validation images (M, d) to training images (K, d). Rows are pixels
    or features."""
    from scipy.stats import hypergeom  # an optional dependency

    distances, nearest = nearest_neighbors(samples, training)
    validation_distances, _ = nearest_neighbors(validation, training)
    n, m = len(distances), len(validation_distances)
    k = max(1, round(0.05 * (m + 1)))  # of m + 1 gaps between validation distances, k are below the k-th
    closer = int((distances < validation_distances.kthvalue(k).values).sum())
    order = distances.argsort()[:CLOSEST].tolist()
    return Memorization(
        distance_quantiles=_quantiles(distances),
        distance_quantiles_validation=_quantiles(validation_distances),
        closer_than_5_percent_of_validation=closer / n,
        # At least `closer` samples are below the k-th validation distance if fewer than k of the closer + k - 1 shortest
        # distances are of validation images.
        closer_p_value=float(hypergeom.cdf(k - 1, n + m, m, closer + k - 1)),
        closest=[(i, nearest[i].item(), distances[i].item()) for i in order],
    )


def check_features(features: torch.Tensor, name: str = "features") -> torch.Tensor:
    """Features (N, d) as float64 on the CPU. Raises ValueError for another shape and for NaN or infinity."""
    _check_rows(features, name)
    return features.cpu().double()


def _check_rows(features: torch.Tensor, name: str) -> None:
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"{name} must have shape (N, d), got {tuple(features.shape)}.")
    # By blocks, because a mask of all elements would take a quarter of the memory of the features.
    bad = torch.cat([~block.isfinite().all(1) for block in features.split(BLOCK)]).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(features)} rows, first {bad[0]}.")


def _check_pair(a: torch.Tensor, b: torch.Tensor, minimum: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = check_features(a), check_features(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the features must have one dimension, got {a.shape[1]} and {b.shape[1]}.")
    if min(len(a), len(b)) < minimum:
        raise ValueError(f"at least {minimum} images are needed on either side, got {len(a)} and {len(b)}.")
    return a, b


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, M), as ‖a‖² + ‖b‖² − 2a·b: a fifth of the time of differences, and off by rounding errors of the norms."""
    norms = a.square().sum(1)[:, None], b.square().sum(1)[None]
    return torch.addmm(norms[1], a, b.T, alpha=-2).add_(norms[0]).clamp_(min=0)


def _rounding(a: torch.Tensor, b: torch.Tensor) -> float:
    """More than the error of `_squared_distances`."""
    return ROUNDING * max(x.square().sum(1).max().item() for x in (a, b))


def _nearest(queries: torch.Tensor, others: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances of each query to its `count` nearest others, nearest first, and their indices, both (N, count).

    Candidates are found by approximate distances. Their own are those of differences, so that a copy is at distance 0.
    """
    candidates, found = min(len(others), count + SPARE), []
    for block in queries.split(BLOCK):
        indices = _squared_distances(block, others).topk(candidates, dim=1, largest=False).indices
        squared, order = (block[:, None] - others[indices]).square().sum(2).sort(dim=1, stable=True)
        found.append((squared[:, :count], indices.gather(1, order[:, :count])))
    return tuple(map(torch.cat, zip(*found)))


def _mean_over(
    queries: torch.Tensor,
    others: torch.Tensor,
    squared_radii: torch.Tensor,
    statistic: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Mean over queries of a statistic (B,) of which balls around the others they are in, (B, M). A query on the boundary,
    such as a copy of the neighbor that gives a ball its radius, is inside."""
    limits = squared_radii + _rounding(queries, others)
    found = [statistic(_squared_distances(block, others) <= limits) for block in queries.split(BLOCK)]
    return torch.cat(found).double().mean().item()


def _quantiles(values: torch.Tensor) -> dict[str, float]:
    return {f"{q:g}": values.quantile(q).item() for q in QUANTILES}
