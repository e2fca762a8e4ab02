"""Data set -> batches of images in [-1, 1], in an order that depends on (seed, step) alone."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from .seeds import addressed_generator

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def digits() -> datasets.DatasetDict:
    """The 1,797 hand-written digits that scikit-learn ships (8×8, 17 grey levels), as images with a label.

    Split once and for all, stratified: 1,437 to train on, 360 held out.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = (source.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    train, test = train_test_split(np.arange(len(pixels)), test_size=360, stratify=source.target, random_state=0)

    def split(indices: np.ndarray) -> datasets.Dataset:
        columns = {"image": [Image.fromarray(pixels[i]) for i in indices], "label": source.target[indices].tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    return datasets.DatasetDict(train=split(train), test=split(test))


def open_dataset(name: str, config_name: str | None = None, split: str = "train") -> datasets.Dataset:
    """A split of "digits", of a folder of images (or one made by `save_to_disk`), or of a data set on the Hub.

    Raises ValueError, saying what was found, for a folder without images and for a split that is not there.
    """
    folder = Path(name)
    if name == "digits":
        found = digits()
    elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        found = datasets.load_from_disk(str(folder))
    elif folder.is_dir():
        extensions = Image.registered_extensions()
        if not any(Path(f).suffix.lower() in extensions for _, _, files in os.walk(folder) for f in files):
            raise ValueError(f"the folder {name!r} holds no image (nothing with a suffix such as .png or .jpg).")
        found = datasets.load_dataset("imagefolder", data_dir=str(folder))
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"dataset {name!r} is neither 'digits', nor a folder here, nor a data set's name on the Hub.")
    else:
        found = datasets.load_dataset(name, config_name)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"the data set {name!r} has no split {split!r}; it has {list(found)}.")
        found = found[split]
    if len(found) == 0:
        raise ValueError(f"split {split!r} of the data set {name!r} is empty.")
    return found


def dataset_files(folder: str) -> list[Path]:
    """The image files in a folder, sorted by name. Raises ValueError where there are none."""
    extensions = Image.registered_extensions()
    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in extensions)
    if not files:
        raise ValueError(f"the folder {folder!r} holds no image (nothing with a suffix such as .png or .jpg).")
    return files


class Images(torch.utils.data.Dataset):
    """The images of a data set at one size, as uint8 tensors.

    `images[[3, 5]]` is a dict of "images" (2, C, H, W) and, if there is a label column, "labels" (2,). An image is
    turned upright by its EXIF tag, scaled so that it covers (H, W), and cropped at the centre.

    Args:
        dataset: with a column of images.
        size: (H, W). channels: 1 (grey), 3 (RGB) or 4 (RGBA); images of another kind are converted.
        image_column, label_column: None for the column of the fitting type, if there is just one.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        size: tuple[int, int],
        channels: int = 3,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        if channels not in PILLOW_MODES:
            raise ValueError(f"channels must be one of {list(PILLOW_MODES)}, got {channels!r}.")
        self.size, self.channels = tuple(size), channels
        self.image_column = _column(dataset, datasets.Image, image_column, "image_column")
        self.label_column = None
        if label_column is not None:
            self.label_column = _column(dataset, (datasets.ClassLabel, datasets.Value), label_column, "label_column")
        # Undecoded, so that a broken image can be named by its path.
        self.dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self._decoded: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        if self.in_memory:
            batch = {"images": self._decoded[indices]}
            rows = self._labels[indices] if self.label_column is not None else None
        else:
            columns = self.dataset[list(indices)]
            batch = {
                "images": torch.stack(
                    [decode_image(entry, self.size, self.channels) for entry in columns[self.image_column]]
                )
            }
            rows = torch.tensor(columns[self.label_column]) if self.label_column is not None else None
        if rows is not None:
            batch["labels"] = rows
        return batch

    def broken(self) -> list[int]:
        """Indices of the images that cannot be decoded. Reads all of them; `datasets` keeps the answer on disk."""
        flags = self.dataset.select_columns([self.image_column]).map(
            _is_broken,
            input_columns=[self.image_column],
            remove_columns=[self.image_column],
            fn_kwargs={"size": self.size, "channels": self.channels},
            desc="Checking images",
        )
        return [i for i, is_broken in enumerate(flags["broken"]) if is_broken]

    def describe(self, index: int) -> str:
        """How a person finds image `index`: its path where it has one."""
        return self.dataset[index][self.image_column]["path"] or f"number {index} of the data set"

    def without(self, indices: Sequence[int]) -> None:
        """Leave images out."""
        dropped = set(indices)
        self.dataset = self.dataset.select([i for i in range(len(self)) if i not in dropped])

    def keep_in_memory(self) -> None:
        """Decode every image now, H·W·C bytes each, so that a batch costs an index."""
        everything = self[range(len(self))]
        self._decoded, self._labels = everything["images"], everything.get("labels")

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes 0, 1, ..., where the label column knows them."""
        feature = self.dataset.features[self.label_column] if self.label_column is not None else None
        return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def check_labels(self, num_classes: int) -> None:
        """ValueError unless every label is an integer in 0..num_classes−1, of as many classes as the column names."""
        names = self.class_names
        if names is not None and len(names) != num_classes:
            raise ValueError(
                f"num_classes must be {len(names)}, the classes of the column {self.label_column!r} "
                f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}), got {num_classes}."
            )
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
    def num_bytes(self) -> int:
        """Of all images, decoded."""
        return len(self) * self.channels * self.size[0] * self.size[1]


def decode_image(entry: dict, size: tuple[int, int], channels: int) -> torch.Tensor:
    """An undecoded image ({"bytes", "path"}) to uint8 (C, H, W). Raises OSError or ValueError for a broken one."""
    with Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # 16 bits: Pillow's own conversion clips at 255 instead of scaling.
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))
        image = image.convert(PILLOW_MODES[channels])
    H, W = size
    if image.size != (W, H):
        image = ImageOps.fit(image, (W, H), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image).reshape(H, W, channels)).permute(2, 0, 1).contiguous()


def _is_broken(entry: dict, size: tuple[int, int], channels: int) -> dict[str, bool]:
    try:
        decode_image(entry, size, channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {"broken": True}
    return {"broken": False}


def _column(dataset: datasets.Dataset, kind, name: str | None, argument: str) -> str:
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name not in fitting:
        raise ValueError(
            f"{argument} must be one of {fitting}, got {name!r}; the columns are {list(dataset.features)}."
        )
    return name


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 images 0..255 to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


class GlobalBatches:
    """Which examples make the global batch of a step: consecutive runs through shuffled data, one epoch after another.

    The shuffle of an epoch depends on (seed, epoch) alone, so that step k has the same examples in any run, on any
    number of processes, resumed or not, and no example is read in order to skip it.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self._epoch, self._order = -1, None

    def __call__(self, step: int) -> list[int]:
        """Indices of the examples of step 0, 1, ..., in the order of their position in the global batch."""
        indices: list[int] = []
        while len(indices) < self.batch_size:
            epoch, start = divmod(step * self.batch_size + len(indices), self.num_examples)
            if epoch != self._epoch:
                generator = addressed_generator("cpu", self.seed, "order", epoch)
                self._epoch, self._order = epoch, torch.randperm(self.num_examples, generator=generator).tolist()
            indices += self._order[start : start + self.batch_size - len(indices)]
        return indices


class ProcessBatches(torch.utils.data.Sampler):
    """This process's share of the global batches of steps first_step .. num_steps−1, in `micro_batches` parts each."""

    def __init__(
        self, batches: GlobalBatches, first_step: int, num_steps: int, rank: int, num_processes: int, micro_batches: int
    ):
        self.batches, self.steps, self.micro_batches = batches, range(first_step, num_steps), micro_batches
        self.positions = process_positions(batches.batch_size, rank, num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        size = len(self.positions) // self.micro_batches
        for step in self.steps:
            share = self.batches(step)[self.positions.start : self.positions.stop]
            for i in range(self.micro_batches):
                yield share[i * size : (i + 1) * size]

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches


def process_positions(batch_size: int, rank: int, num_processes: int) -> range:
    """The positions in the global batch that a process computes."""
    share = batch_size // num_processes
    return range(rank * share, (rank + 1) * share)
