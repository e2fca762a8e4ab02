"""The digits judge recognizes digits, rejects other images, and detects copies of training images."""

import numpy as np
import pytest
import torch

from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation.digits import DigitsJudge, non_digits
from ddpm_hf.evaluation.metrics import nearest_neighbors


@pytest.fixture(scope="module")
def judge():
    return DigitsJudge(digits())


def as_images(flat):
    return flat.reshape(-1, 8, 8, 1)


def test_validation_digits_are_recognized(judge):
    quality = judge(as_images(judge.validation))
    assert quality["accuracy_validation"] > 0.98
    assert quality["recognized"] == quality["recognized_validation"] > 0.8
    assert quality["recognized_ratio"] == 1
    assert 0.09 < quality["smallest_class_share"] <= quality["largest_class_share"] < 0.11
    assert quality["closer_p_value"] > 0.5  # by the symmetry of two equal sets
    assert quality["nearest_distance_quantiles"] == pytest.approx(quality["nearest_distance_quantiles_validation"])


@pytest.mark.parametrize(
    "kind", ["uniform noise", "normal noise", "black and white", "blank", "mean", "other non-digits"]
)
def test_images_that_are_no_digits_are_not_recognized(judge, kind):
    rng = np.random.default_rng(1)
    images = {
        "uniform noise": rng.random((300, 64)),
        "normal noise": (0.5 + 0.5 * rng.normal(size=(300, 64))).clip(0, 1),
        "black and white": rng.integers(0, 2, (300, 64)).astype(float),
        "blank": np.zeros((1, 64)),
        "mean": judge.train.mean(0)[None],
        "other non-digits": non_digits(judge.validation, judge.validation_labels, seed=2),
    }[kind]
    assert judge(as_images(images))["recognized"] < 0.1


def test_copies_of_training_digits_are_detected(judge):
    rng = np.random.default_rng(0)
    copies = (judge.train[:300] + rng.normal(scale=0.01, size=(300, 64))).clip(0, 1)
    quality = judge(as_images(copies))
    assert quality["closer_p_value"] < 1e-6 and quality["closer_than_5_percent_of_validation"] > 0.9


def test_samples_of_a_single_class_are_detected(judge):
    ones = judge.validation[judge.validation_labels == 1]
    quality = judge(as_images(ones))
    assert quality["smallest_class_share"] == 0 and quality["largest_class_share"] > 0.9


def test_distances_agree_with_their_definition(judge):
    images = judge.validation[:20]
    expected = np.sqrt(((images[:, None] - judge.train[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(
        nearest_neighbors(torch.from_numpy(images), torch.from_numpy(judge.train))[0], expected, atol=1e-6
    )


def test_images_of_another_size_raise(judge):
    with pytest.raises(ValueError, match=r"\(N, 8, 8, 1\), got \(2, 16, 16, 1\)"):
        judge(np.zeros((2, 16, 16, 1)))
