"""Open data sets, and find the columns in them."""

import glob
import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ddpm_hf.data import listing
from ddpm_hf.data.arrays import MAX_CHANNELS, array_file
from ddpm_hf.data.builtin import BUILTIN

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}  # and their builders
FILES = (".parquet", ".arrow", ".npy", ".npz", ".csv", ".jsonl", ".tar", ".zip")
STREAM_SHARDS = 64  # into which a local data set is divided to be read as a stream
ROWS_AT_A_TIME = 1000
FIRST_ROWS = 5
LEFT_OUT = "left out: "  # starts the description of a data set, where the number of such files is kept


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
            Parquet, Arrow, tar or zip files, one such file, a .csv or .jsonl file with a column "file_name", a folder
            that `save_to_disk` wrote, or a data set on the Hub.
        config_name: the configuration, or subset, of a data set on the Hub.
        split: the name of the split. A single split saved to disk is "train".
        revision: a branch, tag or commit of a data set on the Hub.
        streaming: return an IterableDataset, which reads while iterating and keeps nothing on the disk.

    Raises:
        NoSuchSplit: a ValueError that names the splits there are.
        ValueError: for a folder without images, an unknown data set or revision, and a revision of local data.
    """
    folder = Path(name).expanduser()
    is_path = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if config_name is not None and (folder.is_file() or name in BUILTIN):
        raise ValueError(f"dataset_config {config_name!r} is for data sets with configurations, and {name!r} has none.")
    if revision is not None and (is_path or name in BUILTIN):
        raise ValueError(f"dataset_revision {revision!r} is for data sets on the Hub, and {name!r} is local.")
    if name in BUILTIN:
        if folder.is_dir():
            raise ValueError(f"dataset {name!r} is built in and is a folder too: write './{name}' for the folder.")
        found = BUILTIN[name].load()
    elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        found = datasets.load_from_disk(str(folder))
    elif folder.is_dir():
        found = _open_folder(folder.resolve(), config_name, split, streaming)
    elif folder.is_file():
        found = _open_file(folder.resolve(), split, streaming)
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
    found = _mark_images(found[split])
    if isinstance(found, datasets.IterableDataset):
        return found
    if len(found) == 0:
        raise ValueError(f"split {split!r} of the data set {name!r} is empty.")
    return found.to_iterable_dataset(min(STREAM_SHARDS, len(found))) if streaming else found


def left_out(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    """The files of a data set's folder that are not in it, by reason; empty if there are none."""
    marked, _, reasons = (dataset.info.description or "").partition(LEFT_OUT)
    return reasons if not marked else ""


def _open_folder(folder: Path, config_name: str | None, split: str, streaming: bool) -> dict:
    found = listing.list_images(folder)
    files = _table_files(found, folder)
    if files and (not found.splits or _has_images(files[0])):
        card = folder / "README.md"  # its header may say which files are which
        if config_name is not None or (card.is_file() and "\nconfigs:" in card.read_text(errors="replace")):
            return datasets.load_dataset(str(folder), config_name, streaming=streaming)
        left = found.left_out + Counter({"pictures or arrays beside tables": sum(map(len, found.splits.values()))})
        left[listing.not_an_image(files[0].suffix.lower())] -= len(files)
        if len(files) == 1 and _is_archive_of_files(files[0]):
            return _open_folder(_extract(files[0]), None, split, streaming)
        opened = _open_tables(files, folder, streaming)
        return {part: _mark(dataset, listing.describe(+left)) for part, dataset in opened.items()}
    if config_name is not None:
        raise ValueError(
            f"dataset_config {config_name!r} is for data sets of tables, and {str(folder)!r} holds images."
        )
    if not found.splits:
        raise _no_image(str(folder))
    if split not in found.splits:
        raise NoSuchSplit(f"the data set {str(folder)!r} has no split {split!r}; it has {list(found.splits)}.")
    table = listing.tables(found, folder)[split]
    stamps = [found.stamps.get(name) for name in found.splits[split]]
    dataset = _from_table(table, listing.class_names(found), str(stamps), streaming)
    return {split: _mark(dataset, listing.describe(found.left_out))}


def _table_files(found: listing.Listing, folder: Path) -> list[Path]:
    """The files of tables or archives in a folder, sorted; those of one kind, tables first."""
    by_kind = ([folder / f for f in sorted(found.others) if f.lower().endswith(suffix)] for suffix in TABLES)
    return next(filter(None, by_kind), [])


def _has_images(file: Path) -> bool:
    """Whether a table has a column that may hold images. Archives beside pictures are not used."""
    if file.suffix.lower() != ".parquet":
        return file.suffix.lower() == ".arrow"
    kinds = [field.type for field in pa.parquet.read_schema(file)]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_entry(kind) for kind in kinds)


def _is_entry(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _open_tables(files: list[Path], folder: Path, streaming: bool) -> dict:
    """Open table files as splits, if the name or the top-level folder of every one names its split, or else as "train"."""
    names = [_split_of(file.relative_to(folder)) for file in files]
    splits = {}
    for file, split in zip(files, names if all(names) else ["train"] * len(names)):
        splits.setdefault(split, []).append(glob.escape(str(file)))
    return datasets.load_dataset(TABLES[files[0].suffix.lower()], data_files=splits, streaming=streaming)


def _split_of(file: Path) -> str | None:
    """The split that a file such as data/train-00000-of-00002.parquet, test.parquet or val/0.parquet names."""
    if shard := re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", file.name):
        return shard[1]
    words = [file.parts[0], *re.split(r"[-._ 0-9]+", file.stem)]
    return next((listing.SPLITS[word] for word in words if word in listing.SPLITS), None)


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_archive_of_files(file: Path) -> bool:
    """Whether a file is a .zip file, or a .tar file that is not in the format WebDataset, where the files of a row are
    together and differ in their suffixes, and folders have no meaning."""
    if file.suffix.lower() != ".tar":
        return file.suffix.lower() == ".zip"
    with tarfile.open(file) as archive:
        names = [Path(member.name) for member in islice(archive, ROWS_AT_A_TIME) if member.isfile()]
    keys = Counter((name.parent, name.name.split(".")[0]) for name in names)
    return max(keys.values(), default=0) < 2 and any(len(name.parts) > 1 for name in names)


def _extract(archive: Path) -> Path:
    """The folder in the cache of `datasets` where an archive is extracted, once for each content."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "archives" / hashlib.sha256(_stamp(archive).encode()).hexdigest()
    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(cache_dir=str(folder)))
    return Path(manager.extract(str(archive)))


def _open_file(file: Path, split: str, streaming: bool) -> dict | datasets.Dataset | datasets.IterableDataset:
    suffix, stamp = file.suffix.lower(), _stamp(file)
    if _is_archive_of_files(file):
        return _open_folder(_extract(file), None, split, streaming)
    if suffix in TABLES:
        return _open_tables([file], file.parent, streaming)[_split_of(Path(file.name)) or "train"]
    if suffix in (".csv", ".jsonl"):
        table = listing.resolve_names(listing.read_metadata(file), file.parent)
        return _from_table(table, None, stamp, streaming)
    if suffix in listing.ARRAYS:
        features = datasets.Features({"image": datasets.Image()})
        return _generate(_array_rows, features, {"file": str(file), "stamp": stamp}, streaming)
    raise ValueError(f"a data set of one file must be one of {', '.join(FILES)}, got {str(file)!r}.")


def _from_table(table: pa.Table, classes: list[str] | None, stamp: str, streaming: bool):
    """A data set of rows whose column "image" holds paths. Other columns keep their types."""
    features = datasets.Features.from_arrow_schema(table.schema)
    features |= {name: datasets.Image() for name in listing.path_columns(table)}
    if classes is not None:
        features["label"] = datasets.ClassLabel(names=classes)
    return _generate(_table_rows, datasets.Features(features), {"table": table, "stamp": stamp}, streaming)


def _generate(rows, features: datasets.Features, kwargs: dict, streaming: bool):
    # Written to the cache of `datasets`, which then also keeps the results of checking the images. `stamp` is an argument
    # so that files with new content are another data set.
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(rows, features=features, gen_kwargs=kwargs)


def _table_rows(table: pa.Table, stamp: str) -> Iterator[dict]:
    for batch in table.to_batches(ROWS_AT_A_TIME):
        yield from batch.to_pylist()


def _array_rows(file: str, stamp: str) -> Iterator[dict]:
    """The images of one file: (H, W), (H, W, C) with C of at most 8, or several along a first dimension."""
    arrays = np.load(file, allow_pickle=False)
    if not isinstance(arrays, np.ndarray):
        arrays = next(iter(arrays.values()))
    is_one = arrays.ndim == 2 or (arrays.ndim == 3 and arrays.shape[2] <= MAX_CHANNELS)
    for image in [arrays] if is_one else arrays:
        yield {"image": {"bytes": array_file(image), "path": None}}


def _mark_images(dataset):
    """Columns that hold the bytes of images, or {bytes, path}, as columns of images, if there is no such column."""
    columns = dataset.features or {}
    if any(isinstance(feature, datasets.Image) for feature in columns.values()):
        return dataset
    rows = list(dataset.take(FIRST_ROWS))  # several: an image may be null
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if any(listing.is_image_bytes(value.get("bytes") if isinstance(value, dict) else value) for value in values):
            if dataset.features is None:
                dataset = dataset.cast(datasets.Dataset.from_list(rows).features)
            dataset = dataset.cast_column(name, datasets.Image())
    return dataset


def _mark(dataset, reasons: str):
    if reasons:
        dataset.info.description = LEFT_OUT + reasons
    return dataset


def _no_image(folder: str) -> ValueError:
    return ValueError(f"the folder {folder!r} holds no image (no file with a suffix such as .png, .jpg or .npy).")


def find_column(dataset: datasets.Dataset | datasets.IterableDataset, kind, name: str | None, argument: str) -> str:
    """The column `name`, or the only column, of a kind of feature. Raises ValueError, with the columns, if there is none."""
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name not in fitting:
        types = ", ".join(f"{column} ({_type(feature)})" for column, feature in dataset.features.items())
        raise ValueError(f"{argument} must be one of {fitting}, got {name!r}; all columns: {types}.")
    return name


def _type(feature) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def fingerprint(dataset: datasets.Dataset) -> str:
    """The hash that `datasets` keeps of a data set's source and transforms. It has no public name (as of datasets 5.2)."""
    return dataset._fingerprint
