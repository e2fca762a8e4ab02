"""Open data sets, and find the columns in them."""

import logging
import os
from collections import Counter
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from ddpm_hf.data.builtin import BUILTIN

logger = logging.getLogger("train")
ARRAYS = {".npy", ".npz"}
TABLES = {".parquet", ".arrow", ".tar", ".zip"}
STREAM_SHARDS = 64  # into which a local data set is divided to be read as a stream


class NoSuchSplit(ValueError):
    """The data set exists, but has no split of that name."""


def open_dataset(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a split of a data set.

    Args:
        name: "digits" or "photos" (built in), a folder of pictures, or of arrays (.npy, .npz) without pictures, or of
            Parquet, Arrow, tar or zip files, a folder that `save_to_disk` wrote, or a data set on the Hub.
        config_name: the configuration, or subset, of a data set on the Hub.
        split: the name of the split. A single split saved to disk is "train".
        revision: a branch, tag or commit of a data set on the Hub.
        streaming: return an IterableDataset, which reads while iterating and keeps nothing on the disk.

    Raises:
        NoSuchSplit: a ValueError that names the splits there are.
        ValueError: for a folder without images, an unknown data set or revision, and a revision of local data.
    """
    folder = Path(name)
    is_path = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if revision is not None and (is_path or name in BUILTIN):
        raise ValueError(f"dataset_revision {revision!r} is for data sets on the Hub, and {name!r} is local.")
    if name in BUILTIN:
        if folder.is_dir():
            raise ValueError(f"dataset {name!r} is built in and is a folder too: write './{name}' for the folder.")
        found = BUILTIN[name].load()
    elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        found = datasets.load_from_disk(str(folder))
    elif folder.is_dir():
        suffixes = Counter(Path(file).suffix.lower() for _, _, files in os.walk(folder) for file in files)
        arrays = sum(suffixes[suffix] for suffix in ARRAYS)
        if suffixes.keys() & set(Image.registered_extensions()):
            if arrays:
                logger.warning("%s holds pictures: its %d files of arrays (.npy, .npz) are left out.", name, arrays)
            found = datasets.load_dataset("imagefolder", data_dir=str(folder), streaming=streaming)
        elif arrays:
            found = _open_arrays(str(folder.resolve()), streaming)
        elif suffixes.keys() & TABLES:
            found = datasets.load_dataset(str(folder.resolve()), config_name, streaming=streaming)
        else:
            raise _no_image(name)
    elif is_path:
        raise ValueError(f"dataset {name!r} is neither 'digits' nor 'photos', nor a folder, nor a name on the Hub.")
    else:
        try:
            found = datasets.load_dataset(name, config_name, revision=revision, streaming=streaming)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise ValueError(f"dataset {name!r}, dataset_revision {revision!r}: {error}") from error
    if not isinstance(found, dict):  # a single split, which cannot be both the training and the validation images
        found = {"train": found}
    if split not in found:
        raise NoSuchSplit(f"the data set {name!r} has no split {split!r}; it has {list(found)}.")
    found = found[split]
    if isinstance(found, datasets.IterableDataset):
        return found
    if len(found) == 0:
        raise ValueError(f"split {split!r} of the data set {name!r} is empty.")
    return found.to_iterable_dataset(min(STREAM_SHARDS, len(found))) if streaming else found


class ArrayFolder(ImageFolder):
    """The "imagefolder" of `datasets`, for files with arrays: the same splits, classes and metadata files."""

    EXTENSIONS = sorted(ARRAYS)


def _open_arrays(folder: str, streaming: bool) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    files = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
    builder = ArrayFolder(data_files=files, dataset_name="arrayfolder")
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def dataset_files(folder: str) -> list[Path]:
    """The image files in a folder, sorted by name. Raises ValueError if there are none."""
    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in Image.registered_extensions())
    if not files:
        raise _no_image(folder)
    return files


def _no_image(folder: str) -> ValueError:
    return ValueError(f"the folder {folder!r} holds no image (no file with a suffix such as .png, .jpg or .npy).")


def find_column(dataset: datasets.Dataset | datasets.IterableDataset, kind, name: str | None, argument: str) -> str:
    """The column `name`, or the only column, of a kind of feature. Raises ValueError, with the columns, if there is none."""
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name not in fitting:
        raise ValueError(f"{argument} must be one of {fitting}, got {name!r}; all columns: {list(dataset.features)}.")
    return name


def fingerprint(dataset: datasets.Dataset) -> str:
    """The hash that `datasets` keeps of a data set's source and transforms. It has no public name (as of datasets 5.2)."""
    return dataset._fingerprint
