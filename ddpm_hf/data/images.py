"""The images of a data set, decoded to one format, on demand or from memory."""

import copy
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import datasets
import numpy as np
import torch

from ddpm_hf.data.checking import check_image, describe_losses
from ddpm_hf.data.columns import find_column
from ddpm_hf.data.decoding import ImageFormat, UnreadableImage, decode_image, match_depth, read_entry
from ddpm_hf.data.finding import source_of

logger = logging.getLogger("train")
LABELS = 64  # read and checked at a time; of a stream, at its start only
MIN_IMAGES_FOR_WORKERS = 2000  # fewer small images are checked sooner than worker processes start


@dataclass(eq=False)
class ImageColumns:
    """A data set with a column of images, undecoded, and optionally a column of labels: classes, numbers or vectors.

    Args:
        dataset: with a column of images.
        format: the size and channels that images are converted to.
        image_column: None for the only column of images.
        label_column: None for no labels.

    Raises:
        ValueError: for a column that does not exist or has another type.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    format: ImageFormat
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self):
        # Before casts, in which streams forget their source, and columns that are not used.
        self.source, self.all_features = source_of(self.dataset), self.dataset.features
        self.size, self.channels = self.format.size, self.format.channels
        self.image_column = find_column(self.dataset, datasets.Image, self.image_column, "image_column")
        if self.label_column is not None:
            kinds = (datasets.ClassLabel, datasets.Value, datasets.List, datasets.LargeList)
            find_column(self.dataset, kinds, self.label_column, "label_column")
        # Undecoded, so that an error about a broken image can name its path.
        self.dataset = self.dataset.cast_column(self.image_column, datasets.Image(decode=False))

    def decode(self, entry: dict | None) -> torch.Tensor:
        """The image (C, H, W) of an entry of the column of images. Raises UnreadableImage with the path and the reason."""
        try:
            return decode_image(read_entry(entry), self.format)
        except UnreadableImage as error:
            raise UnreadableImage(f"{name_of(entry)} ({error})") from error

    def to_batch(self, images: Sequence[torch.Tensor], labels: Sequence | None) -> dict[str, torch.Tensor]:
        """A dict of "images" (B, C, H, W) and, with a label column, "labels" (B,), or (B, D) if they are vectors."""
        batch = {"images": torch.stack(match_depth(images))}
        if self.label_column is not None:
            try:
                batch["labels"] = torch.tensor(labels)
            except (TypeError, ValueError) as error:  # of a stream: those of `Images` are checked
                raise ValueError(
                    f"the labels in the column {self.label_column!r} do not fit together: {error}."
                ) from error
        return batch

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes 0, 1, ..., if the label column has them."""
        feature = self.dataset.features[self.label_column] if self.label_column is not None else None
        return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def count_classes(self) -> int:
        """The number of classes by their names. Raises ValueError if they have none."""
        if self.class_names is None:
            raise ValueError(
                f"num_classes must be given: the classes of the column {self.label_column!r} have no names."
            )
        return len(self.class_names)

    def check_labels(self, num_classes: int) -> None:
        """Raises ValueError unless `num_classes` is the number of class names, if there are any."""
        names = self.class_names
        if names is not None and len(names) != num_classes:
            classes = f"the classes of the column {self.label_column!r} ({abbreviate(names)})"
            raise ValueError(f"num_classes must be {len(names)}, {classes}, got {num_classes}.")

    def label_batches(self, size: int) -> Iterator[list]:
        """The labels of all images in order, `size` at a time."""
        return (rows[self.label_column] for rows in self.dataset.select_columns([self.label_column]).iter(size))

    def first_labels(self, count: int) -> torch.Tensor:
        """The labels of the first images, at most `count`."""
        return torch.tensor(next(self.label_batches(count)))

    def check_conditions(self, width: int | None) -> None:
        """Raises ValueError unless every label is a finite number or, if `width` is given, a list of that many. Of a stream,
        only the first labels are read."""
        shape = () if width is None else (width,)
        accepted = (
            "finite numbers" if width is None else f"lists of {width} finite numbers, the width of the time embedding"
        )
        is_stream = isinstance(self.dataset, datasets.IterableDataset)
        for k, labels in enumerate(islice(self.label_batches(LABELS), 1 if is_stream else None)):
            if not _are_finite(labels, (len(labels), *shape)):
                i, wrong = next((i, label) for i, label in enumerate(labels) if not _are_finite(label, shape))
                found = (
                    f"{len(wrong)}: {abbreviate(list(map(repr, wrong)))}" if isinstance(wrong, list) else repr(wrong)
                )
                where = f"for image {k * LABELS + i} of the data set"
                raise ValueError(
                    f"the labels in the column {self.label_column!r} must be {accepted}, got {found} {where}."
                )


@dataclass(eq=False)
class Images(ImageColumns, torch.utils.data.Dataset):
    """Images as uint8 tensors, or uint16 if one of them has 16 bits.

    `images[[3, 5]]` is a dict of "images" (2, C, H, W) and, with a label column, "labels" (2,), or (2, D) for vectors.

    Args:
        dataset, format, image_column, label_column: see `ImageColumns`.
        num_workers: processes that check the images (`broken`); 0 and 1: this process.
    """

    num_workers: int = 0
    _memory: dict[str, torch.Tensor] | None = field(default=None, init=False)
    _checks: dict[str, np.ndarray] | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        if self.in_memory:
            return {name: values[indices] for name, values in self._memory.items()}
        rows = self.dataset[list(indices)]
        images = [self.decode(entry) for entry in rows[self.image_column]]
        return self.to_batch(images, rows.get(self.label_column))

    def keep_in_memory(self, device: torch.device | str = "cpu") -> None:
        """Decode all images, `num_bytes` in total, into the memory of a device. A batch is then an index on that device."""
        parts = [self[range(i, min(i + 1024, len(self)))] for i in range(0, len(self), 1024)]
        self._memory = {name: torch.cat(match_depth([part[name] for part in parts])).to(device) for name in parts[0]}

    @property
    def in_memory(self) -> bool:
        """Whether `keep_in_memory` was called."""
        return self._memory is not None

    @property
    def num_examples(self) -> int:
        """The number of images."""
        return len(self)

    @property
    def fingerprint(self) -> str:
        """A hash of the images' files and the labels, in order."""
        digest = hashlib.sha256(self._check()["hash"].tobytes())
        for labels in () if self.label_column is None else self.label_batches(LABELS):
            digest.update(repr(labels).encode())
        return digest.hexdigest()

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The least and the greatest value in images of more than 8 bits; None if there are none."""
        low, high = (self._check()[name] for name in ("low", "high"))
        return None if np.isnan(high).all() else (float(np.nanmin(low)), float(np.nanmax(high)))

    @property
    def num_bytes(self) -> int:
        """The size of all images when decoded."""
        return len(self) * self.channels * self.size[0] * self.size[1] * (2 if self._check()["deep"].any() else 1)

    def broken(self) -> list[int]:
        """Indices of the images that cannot be decoded. Reads every image once; `datasets` caches the result."""
        return np.flatnonzero(self._check()["problem"] != "").tolist()

    def _check(self) -> dict[str, np.ndarray]:
        if self._checks is None:
            is_spread = self.num_workers > 1 and len(self) >= MIN_IMAGES_FOR_WORKERS
            checks = self.dataset.select_columns([self.image_column]).map(
                check_image,
                input_columns=[self.image_column],
                remove_columns=[self.image_column],
                fn_kwargs={"form": self.format},
                num_proc=self.num_workers if is_spread else None,
                desc="Checking images",
            )
            self._checks = {name: np.asarray(checks[name]) for name in checks.column_names}
        return self._checks

    def describe(self, index: int) -> str:
        """The path of image `index`, or its number if it has no path."""
        return (self.dataset[index][self.image_column] or {}).get("path") or f"number {index} of the data set"

    def split_validation(self, fraction: float) -> "Images":
        """Remove the validation images, the share `fraction` that `validation_hash` chooses, and return them.

        Raises ValueError if that leaves no image on one side.
        """
        chosen = self._check()["hash"] < fraction
        if not 0 < chosen.sum() < len(self):
            raise ValueError(f"validation_fraction = {fraction!r} selects {chosen.sum()} of {len(self)} images.")
        validation = self.subset(np.flatnonzero(chosen))
        self._keep(np.flatnonzero(~chosen))
        return validation

    def subset(self, indices: Sequence[int]) -> "Images":
        """The images of these indices, in this order."""
        chosen = copy.copy(self)
        chosen._keep(indices)
        return chosen

    def _keep(self, indices: Sequence[int]) -> None:
        indices = np.asarray(indices).tolist()  # the fingerprint of the data set depends on the type as well
        self.dataset = self.dataset.select(indices)
        if self._checks is not None:
            self._checks = {name: values[indices] for name, values in self._checks.items()}
        if self.in_memory:
            self._memory = self[indices]

    def count_classes(self) -> int:
        """The number of classes by their names or, of integers without names, the largest and one more."""
        if self.class_names is not None:
            return super().count_classes()
        labels = self.dataset[self.label_column][:]
        if not all(type(label) is int for label in labels):
            found = abbreviate(sorted(set(map(repr, labels))))
            raise ValueError(f"the labels in the column {self.label_column!r} must be integers, got {found}.")
        return max(labels) + 1

    def check_labels(self, num_classes: int) -> None:
        """Raises ValueError unless every label is an integer in 0..num_classes−1, and `num_classes` the number of class
        names, if there are any."""
        super().check_labels(num_classes)
        labels = self.dataset[self.label_column][:]
        if not all(type(label) is int and 0 <= label < num_classes for label in labels):
            accepted = f"integers in 0..num_classes−1 = {num_classes - 1}"
            found = abbreviate(sorted(set(map(repr, labels))))
            raise ValueError(f"the labels in the column {self.label_column!r} must be {accepted}, got {found}.")


def name_of(entry: dict | None) -> str:
    """The path of an undecoded image, or words for one that has none."""
    return (entry or {}).get("path") or "an image without a name"


def _are_finite(labels, shape: tuple[int, ...]) -> bool:
    """Whether they are real numbers in this shape, all of them finite."""
    try:
        values = np.asarray(labels)
    except ValueError:  # lists of different lengths
        return False
    return values.shape == shape and values.dtype.kind in "biuf" and bool(np.isfinite(values).all())


def abbreviate(names: list[str]) -> str:
    """The names, or the first and the last of many."""
    return ", ".join(names if len(names) <= 10 else [*names[:9], "...", names[-1]])


def leave_out_broken(images: Images, is_allowed: bool, what: str = "images") -> None:
    """Remove the images that cannot be decoded, and log which and why. Raises ValueError, naming them, if that is not
    allowed or no image is left."""
    _warn_of_losses(images)
    broken = images.broken()
    if not broken:
        return
    names = "\n".join(f"  {images.describe(i)}: {images._check()['problem'][i]}" for i in broken[:20])
    more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
    if not is_allowed or len(broken) == len(images):
        advice = "Repair or remove them, or leave them out with --skip_broken_images."
        raise ValueError(f"{len(broken)} of {len(images)} {what} cannot be read:\n{names}{more}\n{advice}")
    logger.warning("Leaving out %d %s that cannot be read:\n%s%s", len(broken), what, names, more)
    images._keep(np.flatnonzero(images._check()["problem"] == ""))


def _warn_of_losses(images: Images) -> None:
    """Log which images lose bits or colors, and a range of values that leaves most of 16 bits unused."""
    checks = images._check()
    for sentence in describe_losses(checks, images.format, images.describe).values():
        logger.warning("%s", sentence)
    if images.format.white_level is not None and np.isnan(checks["high"]).all():
        levels = list(images.format.white_level)
        logger.warning("white_level = %s changes no image: none has more than 8 bits.", levels)
