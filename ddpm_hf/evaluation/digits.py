"""Sample quality, measured against real images.

For the embedded digits: a classifier fitted to the real training digits judges samples and validation real digits alike.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import jinja2
import numpy as np
import torch
from huggingface_hub import EvalResult

from ddpm_hf.data.builtin import digits
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.images import Images
from ddpm_hf.evaluation.metrics import memorization

RECOGNizED = 0.9  # probability above which the classifier counts as having recognized a digit
NO_DIGIT = 10


@dataclass(frozen=True)
class DigitsQuality:
    """Samples against validation real digits. Shares are of 1; distances are Euclidean, pixels in [0, 1].

    `closer_p_value`: of the one-sided Kolmogorov-Smirnov test whose alternative is that samples lie closer to the
    training digits than validation digits do; a small one means copies.
    """

    num_samples: int
    recognized: float
    recognized_validation: float
    recognized_ratio: float
    accuracy_validation: float
    smallest_class_share: float
    largest_class_share: float
    nearest_distance_quantiles: dict[str, float]
    nearest_distance_quantiles_validation: dict[str, float]
    closer_than_5_percent_of_validation: float
    closer_p_value: float

    def as_dict(self) -> dict:
        return asdict(self)


class DigitsJudge:
    """Judges images of digits by a classifier (support vectors, radial kernel, temperature-scaled) and by their distance to
    the nearest training image. Fitted to the training split of `data.digits`; the test split is the yardstick.

    A classifier of ten classes is sure of its answer for noise too, so this one has an eleventh: no digit. Its examples
    are made from the training digits (`non_digits`).
    """

    def __init__(self, splits: datasets.DatasetDict):
        # Here, so that the library is imported without scikit-learn.
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import SVC

        (self.train, labels), (self.validation, self.validation_labels) = (
            _pixels(splits[s]) for s in ("train", "test")
        )
        negatives = non_digits(self.train, labels)
        images = np.concatenate([self.train, negatives])
        classes = np.concatenate([labels, np.full(len(negatives), NO_DIGIT)])
        classifier = CalibratedClassifierCV(SVC(C=10), method="temperature", cv=5, ensemble=False)
        self.classifier = classifier.fit(images, classes)

    def recognized(self, images: np.ndarray) -> tuple[float, np.ndarray]:
        """Share of (N, 64) recognized as some digit with probability above 0.9, and the likeliest digits (N,)."""
        probabilities = self.classifier.predict_proba(images)[:, :NO_DIGIT]
        return float((probabilities.max(1) > RECOGNizED).mean()), probabilities.argmax(1)

    def __call__(self, samples: np.ndarray) -> DigitsQuality:
        """Judge samples (N, 8, 8, 1) in [0, 1], rounded to 8 bits as a PNG would be."""
        if samples.shape[1:] != (8, 8, 1):
            raise ValueError(f"samples must have shape (N, 8, 8, 1), got {samples.shape}.")
        samples = (np.round(samples.astype(np.float64) * 255) / 255).reshape(len(samples), -1)
        share, classes = self.recognized(samples)
        share_validation, classes_validation = self.recognized(self.validation)
        class_shares = np.bincount(classes, minlength=10) / len(samples)
        near = memorization(*(torch.from_numpy(images) for images in (samples, self.validation, self.train)))
        return DigitsQuality(
            num_samples=len(samples),
            recognized=share,
            recognized_validation=share_validation,
            recognized_ratio=share / share_validation,
            accuracy_validation=float((classes_validation == self.validation_labels).mean()),
            smallest_class_share=float(class_shares.min()),
            largest_class_share=float(class_shares.max()),
            nearest_distance_quantiles=near.distance_quantiles,
            nearest_distance_quantiles_validation=near.distance_quantiles_validation,
            closer_than_5_percent_of_validation=near.closer_than_5_percent_of_validation,
            closer_p_value=near.closer_p_value,
        )


def non_digits(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images (M, 64) that share statistics with digits (N, 64) but are none: pixels shuffled within an image, halves of
    digits of two classes put together, averages of two classes, digits under heavy noise, and noise alone."""
    rng = np.random.default_rng(seed)
    partner = rng.permutation(len(images))
    other = labels != labels[partner]
    mine, theirs = images[other].reshape(-1, 8, 8), images[partner][other].reshape(-1, 8, 8)
    noise = rng.normal(size=images.shape)
    return np.concatenate(
        [
            rng.permuted(images, axis=1),
            np.concatenate([mine[:, :4], theirs[:, 4:]], axis=1).reshape(-1, 64),
            np.concatenate([mine[:, :, :4], theirs[:, :, 4:]], axis=2).reshape(-1, 64),
            ((mine + theirs) / 2).reshape(-1, 64),
            (images + 0.35 * noise).clip(0, 1),
            (0.5 + 0.5 * noise[::2]).clip(0, 1),
        ]
    )


def _pixels(split: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    images = Images(split, ImageFormat((8, 8), channels=1), label_column="label")
    batch = images[range(len(images))]
    return batch["images"].numpy().reshape(len(images), -1) / 255.0, batch["labels"].numpy()


class DigitsBackbone:
    """The margins (55) between every two classes of the digits' classifier (`DigitsJudge`: ten digits and none). It is the
    solution of a convex problem on the training digits, and so the same wherever it is fitted."""

    def __init__(self, splits: datasets.DatasetDict):
        classifier = DigitsJudge(splits).classifier.calibrated_classifiers_[0].estimator
        self.classifier = classifier.set_params(decision_function_shape="ovo")
        self.label, self.channels, self.dim = "digits classifier", 1, 55
        self.protocol = {
            "backbone": "digits classifier",
            "backbone_revision": hashlib.sha256(np.ascontiguousarray(classifier.support_)).hexdigest()[:16],
            "features": "pairwise margins",
            "resize": None,
        }

    def __call__(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        images = np.asarray(images)
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"the digits classifier takes images (N, 1, 8, 8), got {images.shape}.")
        margins = self.classifier.decision_function(images.reshape(len(images), -1) / 255.0)
        return torch.from_numpy(margins).float()


def backbone() -> DigitsBackbone:
    """The backbone, fitted to the digits."""
    return DigitsBackbone(digits())


def judge(samples: np.ndarray, steps: int, seed: int) -> dict:
    """The quality of samples (N, 8, 8, 1) in [0, 1], with the protocol of the figures."""
    return {**DigitsJudge(digits())(samples).as_dict(), "sample_steps": steps, "seed": seed}


def card_section(quality: dict) -> str:
    """The figures of `judge` in Markdown."""
    return jinja2.Template(Path(__file__).with_name("digits_card.md").read_text(encoding="utf-8")).render(
        quality=quality
    )


def card_results(quality: dict, dataset: str) -> list[EvalResult]:
    """The figures of `judge` as the Hub keeps them."""
    made = (
        f"{quality['num_samples']} samples ({quality['sample_steps']} steps, seed {quality['seed']}, averaged weights)"
    )
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=dataset,
            dataset_name="scikit-learn digits, validation part",
            metric_type="recognized_ratio",
            metric_name=f"share of {made} recognized, of that of real digits",
            metric_value=round(quality["recognized_ratio"], 4),
        )
    ]
