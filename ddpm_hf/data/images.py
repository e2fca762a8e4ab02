"""Data set -> images at one size: `open_dataset` finds it, `Images` decodes it.

`batches.py` says which images make a batch, `streaming.py` does both for data sets that do not fit on the disk.
"""

import hashlib
import logging
from collections.abc import Sequence

import datasets
import numpy as np
import torch

from ddpm_hf.data.decoding import (
    UNREADABLE,
    ImageFormat,
    decode_image,
    read_entry,
    reads_at_8_bits,
    stack_images,
)
from ddpm_hf.data.finding import find_column

logger = logging.getLogger("train")


def validation_hash(data: bytes) -> float:
    """A number in [0, 1) by the content of an image's file: it is held out if that is less than `validation_fraction`.

    So the images held out stay so when others are added, removed or moved, a larger fraction holds out the same ones and
    more, and copies of a file are on one side.
    """
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2**48


class Images(torch.utils.data.Dataset):
    """The images of a data set at one size, as uint8 tensors, or as uint16 ones where a gray image has 16 bits.

    `images[[3, 5]]` is a dict of "images" (2, C, H, W) and, if there is a label column, "labels" (2,). `ImageFormat` says
    how an image is brought to its size.

    Args:
        dataset: with a column of images.
        size, channels, crop, background, bits: see `ImageFormat`.
        image_column, label_column: None for the column of the fitting type, if there is just one.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        size: tuple[int, int],
        channels: int = 3,
        image_column: str | None = None,
        label_column: str | None = None,
        crop: str = "center",
        background: str = "white",
        bits: int | None = None,
    ):
        self.format = ImageFormat(size, channels, crop, background, bits)
        self.size, self.channels = self.format.size, channels
        self.image_column = find_column(dataset, datasets.Image, image_column, "image_column")
        self.label_column = None
        if label_column is not None:
            self.label_column = find_column(
                dataset, (datasets.ClassLabel, datasets.Value), label_column, "label_column"
            )
        # Undecoded, so that a broken image can be named by its path.
        self.dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self._decoded: torch.Tensor | None = None
        self._found: dict[str, list] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        if self.in_memory:
            batch = {"images": self._decoded[indices]}
            if self.label_column is not None:
                batch["labels"] = self._labels[indices]
            return batch
        columns = self.dataset[list(indices)]
        decoded = [decode_image(read_entry(entry), self.format) for entry in columns[self.image_column]]
        batch = {"images": stack_images(decoded)}
        if self.label_column is not None:
            batch["labels"] = torch.tensor(columns[self.label_column])
        return batch

    def _look(self) -> dict[str, list]:
        if self._found is None:
            flags = self.dataset.select_columns([self.image_column]).map(
                _look_at,
                input_columns=[self.image_column],
                remove_columns=[self.image_column],
                fn_kwargs={"form": self.format},
                desc="Checking images",
            )
            self._found = {name: list(flags[name]) for name in flags.column_names}
        return self._found

    def broken(self) -> list[int]:
        """Indices of the images that cannot be decoded. Reads all of them; `datasets` keeps the answer on disk."""
        return [i for i, is_broken in enumerate(self._look()["broken"]) if is_broken]

    def read_at_8_bits(self) -> list[int]:
        """Indices of color images of 16 bits that come in at 8, which is what Pillow can read."""
        return [i for i, is_cut in enumerate(self._look()["cut"]) if is_cut]

    def describe(self, index: int) -> str:
        """How a person finds image `index`: its path where it has one."""
        return self.dataset[index][self.image_column]["path"] or f"number {index} of the data set"

    def without(self, indices: Sequence[int]) -> None:
        """Leave images out."""
        dropped = set(indices)
        self._keep([i for i in range(len(self)) if i not in dropped])

    def split_validation(self, fraction: float) -> "Images":
        """Leave out the share `fraction` of the images that `validation_hash` chooses, and return those.

        Raises ValueError where that leaves one side without images.
        """
        chosen = [place < fraction for place in self._look()["place"]]
        if not 0 < sum(chosen) < len(self):
            raise ValueError(f"validation_fraction = {fraction!r} holds out {sum(chosen)} of {len(self)} images.")
        validation = self.subset([i for i, is_chosen in enumerate(chosen) if is_chosen])
        self._keep([i for i, is_chosen in enumerate(chosen) if not is_chosen])
        return validation

    def subset(self, indices: Sequence[int]) -> "Images":
        """The images of these indices, in this order."""
        chosen = object.__new__(type(self))
        chosen.__dict__ |= self.__dict__
        chosen._keep(list(indices))
        return chosen

    def _keep(self, indices: list[int]) -> None:
        self.dataset = self.dataset.select(indices)
        if self._found is not None:
            self._found = {name: [values[i] for i in indices] for name, values in self._found.items()}
        if self.in_memory:
            self._decoded, self._labels = (x if x is None else x[indices] for x in (self._decoded, self._labels))

    def keep_in_memory(self, device: torch.device | str = "cpu") -> None:
        """Decode every image now, `num_bytes` in all, into the memory of a device, so that a batch costs an index there."""
        parts = [self[range(i, min(i + 1024, len(self)))] for i in range(0, len(self), 1024)]
        self._decoded = stack_images([part["images"] for part in parts], dim=0).to(device)
        labels = self.label_column is not None
        self._labels = torch.cat([part["labels"] for part in parts]).to(device) if labels else None

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes 0, 1, ..., where the label column knows them."""
        return label_names(self.dataset, self.label_column)

    def check_labels(self, num_classes: int) -> None:
        """ValueError unless every label is an integer in 0..num_classes−1, of as many classes as the column names."""
        check_class_count(self.class_names, num_classes, self.label_column)
        labels = np.asarray(self.dataset[self.label_column][:])
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
            found = sorted(set(labels.tolist()), key=str)
            raise ValueError(
                f"the labels in the column {self.label_column!r} must be integers in 0..num_classes−1 = {num_classes - 1}, "
                f"got {found[:5]}{f' ... {found[-1]}' if len(found) > 5 else ''}."
            )

    @property
    def in_memory(self) -> bool:
        """Whether `keep_in_memory` was called."""
        return self._decoded is not None

    @property
    def num_examples(self) -> int:
        """How many images there are."""
        return len(self)

    @property
    def num_bytes(self) -> int:
        """Of all images, decoded."""
        return len(self) * self.channels * self.size[0] * self.size[1] * (2 if any(self._look()["deep"]) else 1)


def _look_at(entry: dict, form: ImageFormat) -> dict[str, bool | float]:
    try:
        data = read_entry(entry)
        is_deep = decode_image(data, form).dtype == torch.uint16
    except UNREADABLE:
        return {"broken": True, "deep": False, "cut": False, "place": 1.0}
    return {"broken": False, "deep": is_deep, "cut": reads_at_8_bits(data), "place": validation_hash(data)}


def label_names(dataset: datasets.Dataset | datasets.IterableDataset, column: str | None) -> list[str] | None:
    """The names of the classes 0, 1, ... in a column of labels, where it knows them."""
    feature = dataset.features[column] if column is not None else None
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def check_class_count(names: list[str] | None, num_classes: int, column: str) -> None:
    """ValueError unless `num_classes` is how many classes a column of labels names, if it names them."""
    if names is not None and len(names) != num_classes:
        raise ValueError(
            f"num_classes must be {len(names)}, the classes of the column {column!r} "
            f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}), got {num_classes}."
        )


def leave_out_broken(images: Images, is_allowed: bool, what: str = "images") -> None:
    """Leave out images that cannot be read, if that is allowed and leaves some; ValueError, naming them, otherwise."""
    if shallow := images.read_at_8_bits():
        logger.warning(
            "%d color images of 16 bits are read at 8, which is what Pillow can do; the first is %s.",
            len(shallow),
            images.describe(shallow[0]),
        )
    if not (broken := images.broken()):
        return
    names = "\n".join(f"  {images.describe(i)}" for i in broken[:20])
    more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
    if not is_allowed or len(broken) == len(images):
        raise ValueError(
            f"{len(broken)} of {len(images)} {what} cannot be read:\n{names}{more}\n"
            "Repair or remove them, or leave them out with --skip_broken_images."
        )
    logger.warning("Leaving out %d %s that cannot be read:\n%s%s", len(broken), what, names, more)
    images.without(broken)
