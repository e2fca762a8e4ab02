"""Distances between samples and real images, as metrics.json has them."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property

import torch

from ddpm_hf.data.images import Images
from ddpm_hf.evaluation import metrics, plots
from ddpm_hf.evaluation.features import Backbone, metric_name
from ddpm_hf.evaluation.metrics import Estimate, Moments


class Distances:
    """Measures samples against real images by the features of a backbone.

    Args:
        backbone: of all features.
        training: features (N, d) of training images; None if there are none, for the Fréchet distance alone.
        validation: features (M, d) of validation images. The distances of as many as there are samples, or of all if they
            are fewer, are given for comparison; None for no comparison.
        reference: moments that the Fréchet distance is to; None: those of `training`, if there are more images than d.
    """

    def __init__(
        self,
        backbone: Backbone,
        training: torch.Tensor | None,
        validation: torch.Tensor | None = None,
        reference: Moments | None = None,
    ):
        self.backbone, self.training, self.validation = backbone, training, validation
        self.has_reference = reference is not None
        if reference is None and training is not None and len(training) > backbone.dim:
            reference = metrics.moments(training, "training features")
        self.reference = reference
        self._by_count: dict[int, dict[str, Estimate]] = {}
        self._kernel = "rbf" if backbone.label == "CLIP" else "polynomial"
        # Names, the number of images that they need of either kind, and their computation from features.
        self._measures = [
            (("FD",), backbone.dim + 1, lambda x: [metrics.frechet_distance(metrics.moments(x), self.reference)]),
            (
                ("KD",),
                metrics.MIN_KERNEL,
                lambda x: [metrics.kernel_distance(x, training, self._kernel, sums_y=self._kernel_sums)],
            ),
            (
                ("precision", "recall"),
                metrics.MIN_PRECISION,
                lambda x: metrics.precision_recall(training, x, radii=self._radii),
            ),
            (
                ("density", "coverage"),
                metrics.MIN_DENSITY,
                lambda x: metrics.density_coverage(training, x, radii=self._radii),
            ),
        ]

    # Of the training images, once for validation images and the samples of every sampler.

    @cached_property
    def _kernel_sums(self) -> torch.Tensor:
        return metrics.kernel_sums(self.training, self._kernel)

    @cached_property
    def _radii(self) -> torch.Tensor:
        return metrics.squared_radii(self.training)

    def measure(self, features: torch.Tensor) -> dict[str, Estimate]:
        """The distances of features (n, d), by name, for which there are enough images."""
        found = {}
        for names, least, compute in self._measures:
            if min(len(features), self._num_real(names)) >= least:
                values = (v if isinstance(v, Estimate) else Estimate(v, None) for v in compute(features))
                found |= dict(zip(names, values))
        return found

    def left_out(self, num_samples: int) -> list[str]:
        """A sentence on each distance for which there are too few images."""
        sentences, with_training = [], self.training is not None
        for names, least, _ in self._measures:
            if min(num_samples, self._num_real(names)) < least and (
                with_training or self.has_reference == ("FD" in names)
            ):
                found = f"there are {num_samples} samples"
                found += f" and {len(self.training)} training images" if with_training else ""
                what = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} left out"
                sentences.append(f"{what}: at least {least} images are needed on either side, {found}.")
        return sentences

    def _num_real(self, names: Sequence[str]) -> float:
        if self.has_reference and "FD" in names:
            return float("inf")
        return 0 if self.training is None else len(self.training)

    def _of_validation(self, count: int) -> dict[str, Estimate]:
        """The distances of `count` random validation images, or of all if they are fewer: distances depend on the number."""
        count = 0 if self.validation is None else min(count, len(self.validation))
        if count and count not in self._by_count:
            order = torch.randperm(len(self.validation), generator=torch.Generator().manual_seed(0))
            self._by_count[count] = self.measure(self.validation[order[:count].sort().values])
        return self._by_count.get(count, {})

    def figures(self, features: torch.Tensor, protocol: dict) -> list[dict]:
        """The distances of samples, and those of as many validation images to compare with, as rows of metrics.json."""
        rows, of_validation = [], self._of_validation(len(features))
        for kind, (value, error) in self.measure(features).items():
            validation = of_validation[kind].value if kind in of_validation else None
            name = metric_name(kind, self.backbone.label, len(features))
            row = {"name": name, "value": value, "validation": validation, "protocol": self._protocol(kind, protocol)}
            rows.append(row if error is None else row | {"standard_error": error})
        return rows

    def _protocol(self, kind: str, protocol: dict) -> dict:
        is_to_file = kind == "FD" and self.has_reference
        reference = protocol["reference"] if is_to_file else f"{protocol['split']} split, {len(self.training)} images"
        return protocol | {"reference": reference} | self.backbone.protocol


def closest_to_training(
    samples: torch.Tensor, training: Images, validation: Images, features: Sequence[torch.Tensor] | None
) -> tuple[dict, dict[str, bytes]]:
    """How close samples are to training images in pixels and, unless None, in features of samples, training and validation
    images; and pictures of the closest pairs."""
    training, validation = (images[range(len(images))]["images"] for images in (training, validation))
    spaces = {"pixels": [images.flatten(1).float() / 255 for images in (samples, training, validation)]}
    spaces |= {} if features is None else {"features": features}
    results, pictures = {}, {}
    for space, (of_samples, of_training, of_validation) in spaces.items():
        result = metrics.memorization(of_samples, of_validation, of_training)
        ours, theirs, distances = zip(*result.closest)
        cells = [x[list(i)].permute(0, 2, 3, 1).numpy() / 255 for x, i in ((samples, ours), (training, theirs))]
        pictures[f"closest_{space}.png"] = plots.figure_bytes(plots.closest_pairs(*cells, distances))
        results[space] = asdict(result)
    return results, pictures
