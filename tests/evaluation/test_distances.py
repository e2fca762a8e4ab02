"""Distances as rows of metrics.json, and what is left out of them."""

from types import SimpleNamespace

import pytest
import torch

from ddpm_hf.evaluation import metrics
from ddpm_hf.evaluation.distances import Distances

BACKBONE = SimpleNamespace(dim=4, label="DINOv2", protocol={"backbone": "tiny"})
PROTOCOL = {"split": "train", "reference": None, "steps": 5}
KINDS = ["FD", "KD", "precision", "recall", "density", "coverage"]


def features(n, seed=0):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def kinds(rows):
    return [row["name"].split("-")[0] for row in rows]


def test_rows_hold_the_distances_of_samples_and_of_validation_images():
    samples, training, validation = features(30), features(40, 1), features(20, 2)
    rows = Distances(BACKBONE, training, validation).figures(samples, PROTOCOL)
    assert kinds(rows) == KINDS and all(row["name"].endswith("-DINOv2, n = 30") for row in rows)
    expected = [metrics.frechet_distance(metrics.moments(x), metrics.moments(training)) for x in (samples, validation)]
    assert [rows[0]["value"], rows[0]["validation"]] == expected
    assert rows[1]["standard_error"] == metrics.kernel_distance(samples, training).standard_error
    assert rows[0]["protocol"] == {
        "split": "train",
        "reference": "train split, 40 images",
        "steps": 5,
        "backbone": "tiny",
    }


def test_as_many_validation_images_are_compared_as_there_are_samples():
    """Their distances, which depend on the number of images, are those that samples without a fault would have."""
    training, validation = features(400, 1), features(400, 2)
    distances = Distances(BACKBONE, training, validation)
    found = {n: distances.figures(features(n, 3), PROTOCOL)[0] for n in (20, 100, 400)}
    of_all = metrics.frechet_distance(metrics.moments(validation), metrics.moments(training))
    assert found[400]["validation"] == pytest.approx(of_all, rel=1e-12)
    # Samples of the same distribution are as far away as validation images, whatever their number.
    assert found[20]["validation"] > found[100]["validation"] > found[400]["validation"]
    assert all(1 / 3 < found[n]["value"] / found[n]["validation"] < 3 for n in (20, 100))


def test_frechet_distance_alone_is_to_the_moments_of_a_file():
    reference = metrics.moments(features(50, 3) + 2)
    rows = Distances(BACKBONE, features(40, 1), None, reference).figures(
        features(30), PROTOCOL | {"reference": "cifar10.npz"}
    )
    assert rows[0]["value"] == metrics.frechet_distance(metrics.moments(features(30)), reference)
    assert [row["protocol"]["reference"] for row in rows[:2]] == ["cifar10.npz", "train split, 40 images"]


def test_without_training_images_the_frechet_distance_is_alone():
    distances = Distances(BACKBONE, None, None, metrics.moments(features(50, 3)))
    assert kinds(distances.figures(features(30), PROTOCOL | {"split": None, "reference": "r.npz"})) == ["FD"]
    assert distances.left_out(30) == [] and len(distances.left_out(4)) == 1


@pytest.mark.parametrize("samples, training, expected", [(2, 40, []), (3, 40, KINDS[1:2]), (4, 40, KINDS[1:4])])
def test_each_distance_needs_its_own_number_of_images(samples, training, expected):
    for sizes in ((samples, training), (training, samples)):
        distances = Distances(BACKBONE, features(sizes[1], 1))
        assert kinds(distances.figures(features(sizes[0]), PROTOCOL)) == expected
        said = " ".join(distances.left_out(sizes[0]))
        assert all((kind in said) == (kind not in expected) for kind in KINDS), said
        assert f"there are {sizes[0]} samples and {sizes[1]} training images" in said
