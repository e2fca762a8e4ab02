"""Sample quality for the built-in digits: a classifier trained on real digits judges samples and validation digits alike.

Other modules reach this one through `ddpm_hf.evaluation.judges.judge_of`.
"""

import hashlib
from pathlib import Path

import datasets
import jinja2
import numpy as np
import torch
from huggingface_hub import EvalResult

from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation.metrics import memorization

RECOGNIZED = 0.9  # a digit counts as recognized above this probability
NO_DIGIT = 10  # the class of images that are no digits


class DigitsJudge:
    """Judge images of digits by a classifier (a support-vector machine with a radial kernel and temperature scaling) and
    by their distance to the nearest training image. Fitted to the training split of `digits()`, and compared with its
    test split.

    A classifier of ten classes is confident on noise too. This one has an eleventh class, no digit, with examples made
    from the training digits (`non_digits`).
    """

    def __init__(self, splits: datasets.DatasetDict):
        # Optional dependencies.
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import SVC

        self.train, labels = _pixels(splits["train"])
        self.validation, self.validation_labels = _pixels(splits["test"])
        negatives = non_digits(self.train, labels)
        images = np.concatenate([self.train, negatives])
        classes = np.concatenate([labels, np.full(len(negatives), NO_DIGIT)])
        classifier = CalibratedClassifierCV(SVC(C=10), method="temperature", cv=5, ensemble=False)
        self.classifier = classifier.fit(images, classes)

    def recognized(self, images: np.ndarray) -> tuple[float, np.ndarray]:
        """Share of images (N, 64) that are recognized as a digit, and the most probable digits (N,)."""
        probabilities = self.classifier.predict_proba(images)[:, :NO_DIGIT]
        return float((probabilities.max(1) > RECOGNIZED).mean()), probabilities.argmax(1)

    def __call__(self, samples: np.ndarray) -> dict:
        """Judge samples (N, 8, 8, 1) in [0, 1], rounded to 8 bits as in a PNG file.

        Returns shares of 1 and Euclidean distances of pixels in [0, 1], and the same of validation digits under names
        with `_validation`; see `Memorization` for the comparison of the distances. Raises ValueError for another shape.
        """
        if samples.shape[1:] != (8, 8, 1):
            raise ValueError(f"samples must have shape (N, 8, 8, 1), got {samples.shape}.")
        samples = (np.round(samples.astype(np.float64) * 255) / 255).reshape(len(samples), -1)
        share, classes = self.recognized(samples)
        share_validation, classes_validation = self.recognized(self.validation)
        class_shares = np.bincount(classes, minlength=10) / len(samples)
        near = memorization(*(torch.from_numpy(images) for images in (samples, self.validation, self.train)))
        return {
            "num_samples": len(samples),
            "recognized": share,
            "recognized_validation": share_validation,
            "recognized_ratio": share / share_validation,
            "accuracy_validation": float((classes_validation == self.validation_labels).mean()),
            "smallest_class_share": float(class_shares.min()),
            "largest_class_share": float(class_shares.max()),
            "nearest_distance_quantiles": near.distance_quantiles,
            "nearest_distance_quantiles_validation": near.distance_quantiles_validation,
            "closer_than_5_percent_of_validation": near.closer_than_5_percent_of_validation,
            "closer_p_value": near.closer_p_value,
        }


def non_digits(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images (M, 64) that have statistics of digits (N, 64) but are none: shuffled pixels, halves of two digits joined
    together, averages of two digits, digits with strong noise, and noise alone."""
    rng = np.random.default_rng(seed)
    partner = rng.permutation(len(images))
    other = labels != labels[partner]
    a, b = images[other].reshape(-1, 8, 8), images[partner][other].reshape(-1, 8, 8)
    noise = rng.normal(size=images.shape)
    return np.concatenate(
        [
            rng.permuted(images, axis=1),
            np.concatenate([a[:, :4], b[:, 4:]], axis=1).reshape(-1, 64),
            np.concatenate([a[:, :, :4], b[:, :, 4:]], axis=2).reshape(-1, 64),
            ((a + b) / 2).reshape(-1, 64),
            (images + 0.35 * noise).clip(0, 1),
            (0.5 + 0.5 * noise[::2]).clip(0, 1),
        ]
    )


def _pixels(split: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.stack([np.asarray(image) for image in split["image"]]).reshape(len(split), -1)
    return pixels / 255.0, np.array(split["label"])


class DigitsBackbone:
    """Features for distances: the margins (55) between each two of the eleven classes of `DigitsJudge`.

    The classifier is the solution of a convex problem on fixed data, so it is the same wherever it is fitted.
    """

    label, channels, dim, num_labels = "digits classifier", 1, 55, None

    def __init__(self, splits: datasets.DatasetDict):
        classifier = DigitsJudge(splits).classifier.calibrated_classifiers_[0].estimator
        self.classifier = classifier.set_params(decision_function_shape="ovo")
        self.protocol = {
            "backbone": self.label,
            "backbone_revision": hashlib.sha256(np.ascontiguousarray(classifier.support_)).hexdigest()[:16],
            "features": "pairwise margins",
            "resize": None,
        }

    def __call__(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Features (N, 55) of uint8 images (N, 1, 8, 8). Raises ValueError for another shape."""
        images = np.asarray(images)
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"the digits classifier takes images (N, 1, 8, 8), got {images.shape}.")
        margins = self.classifier.decision_function(images.reshape(len(images), -1) / 255.0)
        return torch.from_numpy(margins).float()


# ---------------------------------------------------------------------- the interface of judges.py


def backbone() -> DigitsBackbone:
    return DigitsBackbone(digits())


def judge(samples: np.ndarray, steps: int, seed: int) -> dict:
    return {**DigitsJudge(digits())(samples), "sample_steps": steps, "seed": seed}


def card_section(quality: dict) -> str:
    template = Path(__file__).with_name("digits_card.md").read_text(encoding="utf-8")
    return jinja2.Template(template).render(quality=quality)


def card_results(quality: dict, dataset: str) -> list[EvalResult]:
    source = ("unconditional-image-generation", dataset, "scikit-learn digits, validation part")
    how = f"{quality['sample_steps']} steps, seed {quality['seed']}, averaged weights"
    name = f"share of {quality['num_samples']} samples ({how}) recognized, of that of real digits"
    return [EvalResult(*source, "recognized_ratio", round(quality["recognized_ratio"], 4), metric_name=name)]
