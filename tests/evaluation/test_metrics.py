"""Distances agree with closed forms, brute force and torchmetrics."""

import subprocess
import sys
from dataclasses import asdict

import mpmath
import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from ddpm_hf.evaluation.metrics import (
    BLOCK,
    Moments,
    check_features,
    density_coverage,
    frechet_distance,
    kernel_distance,
    kernel_sums,
    memorization,
    moments,
    nearest_neighbors,
    precision_recall,
    squared_radii,
)


def normal(n, d, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_moments_agree_with_numpy_in_float64_for_a_large_mean():
    features = normal(200, 5) + 1e4
    m = moments(features)
    np.testing.assert_allclose(m.covariance, np.cov(features.double().numpy().T), rtol=1e-10)
    assert m.mean.dtype == m.covariance.dtype == torch.float64


@pytest.mark.parametrize("n", [BLOCK, 2 * BLOCK + 7])
def test_moments_summed_in_blocks_are_those_of_the_plain_formula(n):
    features = normal(n, 9) @ normal(9, 9, 1) + 3
    plain, m = features.double(), moments(features)
    torch.testing.assert_close(m.mean, plain.mean(0), rtol=1e-10, atol=0)
    centered = plain - plain.mean(0)
    torch.testing.assert_close(m.covariance, centered.T @ centered / (n - 1), rtol=1e-10, atol=1e-10)


def test_moments_copy_less_memory_than_the_features_take():
    """In a process of its own: its peak shows what moments() adds to the features, here 96 MB."""
    code = """
import resource, torch
from ddpm_hf.evaluation.metrics import moments
torch.set_num_threads(1)
moments(torch.randn(600, 64))
features = torch.randn(48000, 512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moments(features)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 48_000  # kilobytes; a float64 copy takes 192,000


def test_frechet_distance_agrees_with_its_definition():
    a, b = moments(normal(50, 4) @ normal(4, 4, 1)), moments(normal(60, 4, 2) @ normal(4, 4, 3) + 1)
    with mpmath.workdps(40):
        product = mpmath.matrix(a.covariance.tolist()) * mpmath.matrix(b.covariance.tolist())
        root = sum(mpmath.sqrt(v).real for v in mpmath.eig(product)[0])
        expected = float(
            sum((p - q) ** 2 for p, q in zip(a.mean.tolist(), b.mean.tolist()))
            + a.covariance.trace().item()
            + b.covariance.trace().item()
            - 2 * root
        )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-11)


def test_frechet_distance_of_singular_covariances_is_exact():
    """Along shared axes it is Σ(√a_i − √b_i)²; most of these a_i and b_i are 0."""
    rotation, _ = torch.linalg.qr(normal(60, 60).double())
    a_i, b_i = torch.zeros(60).double(), torch.zeros(60).double()
    a_i[:10], b_i[5:20] = torch.linspace(0.1, 9, 10).double(), torch.linspace(1e-9, 4, 15).double()
    a, b = (Moments(torch.zeros(60).double(), rotation * v @ rotation.T) for v in (a_i, b_i))
    expected = (a_i.sqrt() - b_i.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("d", [3, 16])
def test_polynomial_kernel_distance_agrees_with_torchmetrics(d):
    x, y = normal(70, d).double(), normal(70, d, 1).double() + 0.2
    assert kernel_distance(x, y).value == pytest.approx(poly_mmd(x, y).item(), rel=1e-10)


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_kernel_distance_and_error_agree_with_definition_and_jackknife(kernel):
    x, y = normal(6, 3).double(), normal(8, 3, 1).double() + 0.5

    def k(a, b):
        return (a @ b / 3 + 1) ** 3 if kernel == "polynomial" else torch.exp(-(a - b).square().sum() / 8)

    def mmd(x, y):
        n, m = len(x), len(y)
        xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        return (xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)).item()

    actual = kernel_distance(x, y, kernel, sigma=2.0)
    assert actual == kernel_distance(x, y, kernel, sigma=2.0, sums_y=kernel_sums(y, kernel, 2.0))
    assert actual.value == pytest.approx(mmd(x, y), rel=1e-10)
    leave_x = np.array([mmd(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(6)])
    leave_y = np.array([mmd(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(8)])
    assert actual.standard_error == pytest.approx(np.sqrt(5 * leave_x.var() + 7 * leave_y.var()), rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_is_calibrated():
    apart = [kernel_distance(normal(60, 4, s), normal(40, 4, 1000 + s) + 0.5) for s in range(150)]
    spread = np.std([e.value for e in apart], ddof=1)
    assert np.mean([e.standard_error for e in apart]) == pytest.approx(spread, rel=0.25)
    same = np.array([kernel_distance(normal(60, 4, s), normal(40, 4, 1000 + s)).value for s in range(150)])
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(150)


def brute_force(real, samples, k_pr, k_dc):
    def distance(a, b):
        return np.linalg.norm(a - b)

    def radius(points, i, k):
        return sorted(distance(points[i], p) for p in points)[k]

    r3, s3 = ([radius(p, i, k_pr) for i in range(len(p))] for p in (real, samples))
    r5 = [radius(real, i, k_dc) for i in range(len(real))]
    precision = np.mean([any(distance(s, r) <= rad for r, rad in zip(real, r3)) for s in samples])
    recall = np.mean([any(distance(s, r) <= rad for s, rad in zip(samples, s3)) for r in real])
    density = sum(distance(s, r) <= rad for s in samples for r, rad in zip(real, r5)) / (k_dc * len(samples))
    coverage = np.mean([any(distance(s, r) <= rad for s in samples) for r, rad in zip(real, r5)])
    return precision, recall, density, coverage


def test_precision_recall_density_coverage_agree_with_brute_force():
    real, samples = normal(40, 2), normal(30, 2, 1, scale=0.6) + 0.3
    expected = brute_force(real.double().numpy(), samples.double().numpy(), 3, 5)
    assert (*precision_recall(real, samples), *density_coverage(real, samples)) == pytest.approx(expected)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_copies_are_inside_the_balls_whose_radius_they_are(offset):
    """The real images themselves as samples: each is in its own ball, and on the boundary of others."""
    real = (normal(50, 6) + offset).double()
    squared = (real[:, None] - real).square().sum(2)
    for k, measure in ((3, precision_recall), (5, density_coverage)):
        inside = squared <= squared.sort(1).values[:, k] * (1 + 1e-12)
        expected = (1.0, 1.0) if k == 3 else (inside.sum().item() / (5 * 50), 1.0)
        assert measure(real, real) == pytest.approx(expected)
        assert measure(real, real, radii=squared_radii(real)) == pytest.approx(expected)


def test_a_missing_mode_lowers_recall_but_not_precision():
    real = torch.cat([normal(100, 3), normal(100, 3, 1) + 50])
    precision, recall = precision_recall(real, normal(100, 3, 2))
    density, coverage = density_coverage(real, normal(100, 3, 2))
    assert precision > 0.8 and recall < 0.55 and density > 0.7 and coverage < 0.55
    assert precision_recall(real, normal(100, 3, 2) + 500) == (0, 0)


def test_nearest_neighbor_of_a_copy_has_distance_zero():
    others = normal(2000, 6) + 100
    queries = torch.cat([others[[7, 1500]], normal(20, 6, 1) + 100])
    distances, indices = nearest_neighbors(queries, others)
    assert distances[:2].tolist() == [0, 0] and indices[:2].tolist() == [7, 1500]
    expected = np.linalg.norm(queries.double().numpy()[:, None] - others.double().numpy(), axis=-1)
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-9)
    np.testing.assert_array_equal(indices, expected.argmin(1))


def test_memorization_detects_copies_and_not_fresh_images():
    training, validation = normal(300, 8), normal(100, 8, 1)
    fresh = memorization(normal(100, 8, 2), validation, training)
    assert fresh.closer_p_value > 0.01 and fresh.closer_than_5_percent_of_validation < 0.15
    copies = training[:100] + normal(100, 8, 3, scale=0.01)
    copied = memorization(copies, validation, training)
    assert copied.closer_p_value < 1e-9 and copied.closer_than_5_percent_of_validation == 1
    assert all(i == j for i, j, _ in copied.closest) and len(copied.closest) == 10
    distances = [d for _, _, d in copied.closest]
    assert distances == sorted(distances) and asdict(copied)["closer_p_value"] == copied.closer_p_value


def at(*distances):
    return torch.tensor(distances)[:, None]


def test_probability_of_close_samples_is_that_of_their_ranks():
    """19 validation images and 4 samples, 2 of them closer than all validation images: 4/23 · 3/22 by symmetry."""
    near = memorization(at(0.1, 0.2, 8.5, 30.0), at(*range(1, 20)).float(), at(0.0))
    assert near.closer_than_5_percent_of_validation == 0.5
    assert near.closer_p_value == pytest.approx(4 / 23 * 3 / 22)


def test_samples_that_are_alike_but_near_no_image_are_no_copies():
    """Blurred samples are closer than most validation images, and none is as close as the closest of these."""
    near = memorization(at(*[20.0] * 50), at(*range(1, 100)).float(), at(0.0))
    assert near.closer_than_5_percent_of_validation == 0 and near.closer_p_value == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(normal(8, 8)), "at least 9 images for a covariance of full rank 8, got 8"),
        (lambda: check_features(torch.tensor([[0.0], [torch.nan]])), "NaN or infinity in 1 of 2 rows, first 1"),
        (lambda: check_features(torch.ones(3)), r"shape \(N, d\), got \(3,\)"),
        (lambda: kernel_distance(normal(2, 3), normal(9, 3)), "at least 3 images are needed on either side, got 2"),
        (lambda: kernel_distance(normal(9, 3), normal(9, 3), "cubic"), "kernel must be one of .* got 'cubic'"),
        (lambda: precision_recall(normal(9, 3), normal(3, 3)), "at least 4 images .* got 9 and 3"),
        (lambda: nearest_neighbors(normal(9, 3), normal(9, 4)), "one dimension, got 3 and 4"),
        (lambda: frechet_distance(moments(normal(9, 3)), moments(normal(9, 4))), "one dimension, got 3 and 4"),
    ],
)
def test_features_without_a_distance_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
