"""Open data sets from folders, files and the Hub."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ddpm_hf.data import listing, metadata
from ddpm_hf.data.archives import ARCHIVES, is_archive
from ddpm_hf.data.arrays import MAX_CHANNELS, array_file
from ddpm_hf.data.builtin import BUILTIN
from ddpm_hf.data.columns import Data, mark_images, mark_labels
from ddpm_hf.data.reasons import BadData, reading
from ddpm_hf.data.tables import TABLES, has_images, load_tables, read_labels
from ddpm_hf.data.webdataset import is_webdataset, read_webdataset

TEXTS = (".csv", ".tsv", ".jsonl")
FILES = (*TABLES, *listing.ARRAYS, *TEXTS, *ARCHIVES)
SAVED = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` wrote
PACKED = (".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zst")  # archives that cannot be read in place
STREAM_SHARDS = 64  # into which a local data set is divided to be read as a stream
ROWS_AT_A_TIME = 1000
MARK = "ddpm_hf: "  # starts the description of a data set, where a `Source` is kept


class NoSuchSplit(ValueError):
    """The data set exists, but has no split of that name."""


@dataclass
class Source:
    """Where a data set comes from.

    Attributes:
        kind: in words, such as "a folder of pictures in 2 folders of classes".
        splits: the names of its splits.
        left_out: the files that are not in it, by reason; empty if there are none.
        num_classes: of a stream, the largest label and one more, if the labels are integers that are known already.
    """

    kind: str = "a data set"
    splits: list[str] = field(default_factory=list)
    left_out: str = ""
    num_classes: int | None = None


@dataclass
class Opened:
    """The splits of a data set, or tables of them as of `metadata.tables`.

    Attributes:
        stamp: what changes with the content of the files.
        classes: the names of the labels in tables.
        tables: the Parquet and Arrow files.
    """

    kind: str
    splits: dict[str, Data | pa.Table]
    left_out: Counter = field(default_factory=Counter)
    stamp: str = ""
    classes: list[str] | None = None
    tables: list[Path] = field(default_factory=list)


def open_dataset(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    label_column: str | None = None,
    has_classes: bool = True,
) -> Data:
    """Open a split of a data set.

    Args:
        name: "digits" or "photos" (built in), a folder of pictures, or of arrays (.npy, .npz) without pictures, or of
            Parquet, Arrow, .tar or .zip files, one such file, a .csv, .tsv or .jsonl file with a column "file_name", a
            folder that `save_to_disk` wrote, or a data set on the Hub.
        config_name: the configuration, or subset, of a data set on the Hub.
        split: the name of the split. A single split saved to disk is "train".
        revision: a branch, tag or commit of a data set on the Hub.
        streaming: return an IterableDataset, which reads while iterating and keeps nothing on the disk. Archives are read in
            place, streaming or not.
        label_column: a column whose strings become classes; a field in a column of dicts is called like "json.label".
        has_classes: False leaves the strings as they are.

    Raises:
        NoSuchSplit: a ValueError that names the splits there are.
        ValueError: for a folder without images, a damaged file, an unknown data set or revision, and a revision of local
            data.
        ConnectionError: for a data set on the Hub that is not cached, without a network.
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
        found = Opened("built in", BUILTIN[name].load())
    elif folder.exists():
        found = _open_local(folder.resolve(), config_name, streaming)
    elif is_path:
        raise ValueError(f"dataset {name!r} is neither 'digits' nor 'photos', nor a folder, nor a name on the Hub.")
    else:
        try:
            opened = datasets.load_dataset(name, config_name, revision=revision, streaming=streaming)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise ValueError(f"dataset {name!r}, dataset_revision {revision!r}: {error}") from error
        except ConnectionError as error:
            use = "connect to the network (and unset HF_HUB_OFFLINE), or use data on this machine"
            raise ConnectionError(
                f"dataset {name!r} is no folder here, is not cached, and the Hub cannot be reached: {use}."
            ) from error
        found = Opened("a data set on the Hub", opened)
    if not found.splits:
        raise _no_image(str(folder), found.left_out)
    if split not in found.splits:
        raise NoSuchSplit(f"the data set {name!r} has no split {split!r}; it has {list(found.splits)}.")
    with reading(name):
        return _make(found, split, streaming, label_column, has_classes)


def _make(found: Opened, split: str, streaming: bool, label_column: str | None, has_classes: bool) -> Data:
    splits = found.splits
    if isinstance(splits[split], pa.Table):
        splits = {name: _from_table(table, found, streaming) for name, table in splits.items()}
    labels = None
    if isinstance(splits[split], datasets.IterableDataset):
        splits = {split: mark_images(splits[split])}
        labels = read_labels(found.tables, label_column) if label_column is not None else None
    dataset = mark_images(mark_labels(splits, label_column, has_classes, labels)[split])
    if isinstance(dataset, datasets.Dataset) and streaming and label_column in dataset.features:
        labels = dataset[label_column] if isinstance(dataset.features[label_column], datasets.Value) else None
    is_known = labels and all(type(label) is int for label in labels)
    if not isinstance(dataset, datasets.IterableDataset):
        if len(dataset) == 0:
            raise BadData(f"the split {split!r} of the data set is empty.")
        dataset = dataset.to_iterable_dataset(min(STREAM_SHARDS, len(dataset))) if streaming else dataset
    number = max(labels) + 1 if is_known else None
    source = Source(found.kind, list(found.splits), listing.describe(+found.left_out), number)
    dataset.info.description = MARK + json.dumps(asdict(source))
    return dataset


def source_of(dataset: Data) -> Source:
    """Where the data set that `open_dataset` returned comes from."""
    before, mark, source = (dataset.info.description or "").partition(MARK)
    return Source(**json.loads(source)) if mark and not before else Source()


def _open_local(path: Path, config_name: str | None, streaming: bool) -> Opened:
    if path.is_file():
        return _open_file(path, streaming)
    if not path.is_dir():
        raise ValueError(f"dataset must be a folder or a file, and {str(path)!r} is neither.")
    if any((path / name).is_file() for name in SAVED):
        with reading(path):
            opened = datasets.load_from_disk(str(path))
        # A single split cannot be both the training and the validation images.
        return Opened("a folder of save_to_disk", opened if isinstance(opened, dict) else {"train": opened})
    return _open_folder(path, config_name, streaming)


def _open_folder(folder: Path, config_name: str | None, streaming: bool) -> Opened:
    found = listing.list_images(folder)
    files = _table_files(found)
    if files and (not found.splits or has_images(files[0])):
        card = folder / "README.md"  # its header may say which files are which
        if config_name is not None or (card.is_file() and "\nconfigs:" in card.read_text(errors="replace")):
            with reading(folder):
                opened = datasets.load_dataset(str(folder), config_name, streaming=streaming)
            return Opened("a folder with configurations in its README.md", opened)
        left = found.left_out + Counter({"pictures or arrays beside tables": sum(map(len, found.splits.values()))})
        left["metadata files beside tables or archives"] = len(found.metadata)
        left.subtract(listing.not_an_image(file.suffix.lower()) for file in files)
        opened = _open_files(files, folder, streaming)
        opened.left_out += left
        return opened
    if config_name is not None:
        raise ValueError(
            f"dataset_config {config_name!r} is for data sets of tables, and {str(folder)!r} holds images."
        )
    return _open_listing(found, "a folder")


def _open_listing(found: listing.Listing, where: str) -> Opened:
    """The images of a folder or of archives."""
    if not found.splits and not found.metadata:  # metadata may name files that are missing
        return Opened("", {}, found.left_out)
    classes = listing.class_names(found)
    first = next(iter(found.splits.values()), [])[:1]
    what = "arrays" if first and first[0].suffix in listing.ARRAYS else "pictures"
    kind = f"{where} of {what}" + (f" in {len(classes)} folders of classes" if classes else "")
    if found.metadata:
        kind += " with " + ", ".join(sorted({Path(entry.name).name for entry in found.metadata}))
    stamp = str([entry.stamp for part in found.splits.values() for entry in part])
    return Opened(kind, metadata.tables(found), found.left_out, stamp, classes)


def _table_files(found: listing.Listing) -> list[Path]:
    """The files of tables or archives in a folder, sorted; those of one kind, tables first."""
    kinds = [(suffix,) for suffix in TABLES] + [ARCHIVES]
    by_kind = (sorted(Path(entry.path) for entry in found.others if entry.suffix in kind) for kind in kinds)
    return next(filter(None, by_kind), [])


def _open_files(files: list[Path], folder: Path, streaming: bool) -> Opened:
    """Open tables or archives as splits, if the name or the top-level folder of every one names its split, or else as one
    split, "train"."""
    names = [_split_of(file.relative_to(folder)) for file in files]
    names = names if all(names) else ["train"] * len(names)
    suffixes = "/".join(sorted({file.suffix.lower() for file in files}))
    what = f"{len(files)} {suffixes} files" if len(files) > 1 else f"a {suffixes} file"
    if is_archive(files[0]):
        found = listing.list_archives(files, names if len(files) > 1 and len(set(names)) > 1 else None)
        if found.splits and all(map(is_webdataset, files)):
            classes, stamp = listing.class_names(found), str([_stamp(file) for file in files])
            return Opened(f"{what} of WebDataset", read_webdataset(found, classes), found.left_out, stamp, classes)
        return _open_listing(found, what)
    splits: dict[str, list[Path]] = {}
    for file, split in zip(files, names):
        splits.setdefault(split, []).append(file)
    return Opened(what, load_tables(splits, streaming), tables=files)


def _split_of(file: Path) -> str | None:
    """The split that a file such as data/train-00000-of-00002.parquet, test.parquet or val/0.parquet names."""
    if shard := re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", file.name):
        return shard[1]
    words = [file.parts[0], *re.split(r"[-._ 0-9]+", file.stem)]
    return next((listing.SPLITS[word] for word in words if word in listing.SPLITS), None)


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _open_file(file: Path, streaming: bool) -> Opened:
    suffix, stamp = file.suffix.lower(), _stamp(file)
    if suffix in (*TABLES, *ARCHIVES):
        opened = _open_files([file], file.parent, streaming)
        if not opened.splits:
            raise _no_image(str(file), opened.left_out)
        opened.splits = {"train": next(iter(opened.splits.values()))} if len(opened.splits) == 1 else opened.splits
        return opened
    if suffix in TEXTS:
        entry = listing.Entry(file.name, str(file))
        table = metadata.mark_paths(metadata.read_metadata(entry, anywhere=True))
        return Opened(f"a {suffix} file", {"train": table}, stamp=stamp)
    if suffix in listing.ARRAYS:
        features = datasets.Features({"image": datasets.Image()})
        with reading(file):
            _load_arrays(str(file))
            rows = _generate(_array_rows, features, {"file": str(file), "stamp": stamp}, streaming)
        return Opened(f"a {suffix} file of images", {"train": rows})
    raise ValueError(f"a data set of one file must be one of {', '.join(FILES)}, got {str(file)!r}.")


def _from_table(table: pa.Table, found: Opened, streaming: bool) -> datasets.Dataset:
    """A data set of rows whose columns of images hold paths. Other columns keep their types."""
    features = datasets.Features.from_arrow_schema(table.schema)
    features |= {name: datasets.Image() for name in metadata.path_columns(table)}
    if found.classes is not None:
        features["label"] = datasets.ClassLabel(names=found.classes)
    features = datasets.Features(features)
    if streaming:  # in memory
        rows = datasets.table.table_cast(table.replace_schema_metadata(None), features.arrow_schema)
        return datasets.Dataset(datasets.table.InMemoryTable(rows), datasets.DatasetInfo(features=features))
    return _generate(_table_rows, features, {"table": table, "stamp": found.stamp}, False)


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
    arrays = _load_arrays(file)
    is_one = arrays.ndim == 2 or (arrays.ndim == 3 and arrays.shape[2] <= MAX_CHANNELS)
    for image in [arrays] if is_one else arrays:
        yield {"image": {"bytes": array_file(image), "path": None}}


def _load_arrays(file: str) -> np.ndarray:
    arrays = np.load(file, mmap_mode="r" if file.lower().endswith(".npy") else None, allow_pickle=False)
    return arrays if isinstance(arrays, np.ndarray) else next(iter(arrays.values()))


def _no_image(folder: str, left_out: Counter) -> ValueError:
    found = f"; it has {listing.describe(+left_out)}" if +left_out else ""
    packed = any(f"({suffix})" in found for suffix in PACKED) or (found and is_archive(Path(folder)))
    advice = " Unpack the archive, and give its folder." if packed else ""
    return ValueError(f"{folder!r} holds no image (no file with a suffix such as .png, .jpg or .npy){found}.{advice}")
