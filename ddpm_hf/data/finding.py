"""Finding a data set, its images and its columns."""

import os
from pathlib import Path

import datasets
from PIL import Image

from ddpm_hf.data.builtin import BUILTIN

TABLES = {".parquet", ".arrow", ".tar", ".zip"}


STREAM_SHARDS = 64  # of a data set here that is read as a stream


class NoSuchSplit(ValueError):
    """The data set is there, and has no split of that name."""


def open_dataset(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """A split of "digits" or "photos", of a folder of images or of Parquet, Arrow, tar or zip files, of a folder made by
    `save_to_disk`, or of a data set on the Hub, there at `revision` (a branch, a tag or a commit).

    `streaming` gives an IterableDataset, which reads as it goes and keeps nothing on the disk.
    Raises ValueError, saying what was found, for a folder without images, for a data set, a revision or a split that is not
    there, and for a revision of what has none.
    """
    folder = Path(name)
    if name in BUILTIN:
        if folder.is_dir():
            raise ValueError(f"dataset {name!r} is embedded here and is a folder too: './{name}' is the folder.")
        found = BUILTIN[name].load()
    elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        found = datasets.load_from_disk(str(folder))
    elif folder.is_dir():
        suffixes = {Path(file).suffix.lower() for _, _, files in os.walk(folder) for file in files}
        if suffixes & set(Image.registered_extensions()):
            found = datasets.load_dataset("imagefolder", data_dir=str(folder), streaming=streaming)
        elif suffixes & TABLES:
            found = datasets.load_dataset(str(folder.resolve()), config_name, streaming=streaming)
        else:
            raise ValueError(f"the folder {name!r} holds no image (nothing with a suffix such as .png or .jpg).")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"dataset {name!r} is neither 'digits' nor 'photos', nor a folder here, nor a data set's name on the Hub."
        )
    else:
        try:
            found = datasets.load_dataset(name, config_name, revision=revision, streaming=streaming)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise ValueError(f"dataset {name!r}, dataset_revision {revision!r}: {error}") from error
        revision = None
    if revision is not None:
        raise ValueError(f"dataset_revision {revision!r} is of data sets on the Hub, and {name!r} is none.")
    if not isinstance(found, dict):
        # One split, saved alone: training and validation images must not both be it.
        found = {"train": found}
    if split not in found:
        raise NoSuchSplit(f"the data set {name!r} has no split {split!r}; it has {list(found)}.")
    found = found[split]
    if isinstance(found, datasets.Dataset):
        if len(found) == 0:
            raise ValueError(f"split {split!r} of the data set {name!r} is empty.")
        if streaming:
            found = found.to_iterable_dataset(min(STREAM_SHARDS, len(found)))
    return found


def dataset_files(folder: str) -> list[Path]:
    """The image files in a folder, sorted by name. Raises ValueError where there are none."""
    extensions = Image.registered_extensions()
    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in extensions)
    if not files:
        raise ValueError(f"the folder {folder!r} holds no image (nothing with a suffix such as .png or .jpg).")
    return files


def find_column(dataset: datasets.Dataset | datasets.IterableDataset, kind, name: str | None, argument: str) -> str:
    """The column of that name, or the only one of a kind of feature. Raises ValueError, naming the columns."""
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name not in fitting:
        raise ValueError(
            f"{argument} must be one of {fitting}, got {name!r}; the columns are {list(dataset.features)}."
        )
    return name
