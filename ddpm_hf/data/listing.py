"""Which files of a folder are images, of which split and class, and which files are left out."""

import io
import json
import os
import stat
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet
from PIL import Image, UnidentifiedImageError

from ddpm_hf.data.arrays import ARRAY_STARTS

ARRAYS = {".npy", ".npz"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation", "valid": "validation"}
LABELS = "dataset.json"  # of StyleGAN and EDM: {"labels": [[name, label], ...]}, or null for no labels
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognizes but cannot decode by itself
PATHS = {b"content": b"paths of images"}  # marks the columns of paths in a table
UNSIGNED = {"TGA"}  # formats without a signature: some other files look like them


@dataclass
class Listing:
    """The image files of a folder.

    Attributes:
        splits: by name of the split, the files as sorted paths relative to the folder, with "/" between their parts.
        metadata: paths of the metadata files.
        stamps: by file, what changes with its content: size in bytes and time of the last change in ns.
        others: files that are not images, such as tables.
        left_out: number of files that are left out, by reason.
    """

    splits: dict[str, list[str]] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def describe(left_out: Counter) -> str:
    """Numbers and reasons, as in "1 hidden, 3 not images (.txt)"; empty if nothing is left out."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))


def list_images(folder: Path) -> Listing:
    """The pictures in a folder and its subfolders that Pillow can read, by suffix or content, or else the arrays (.npy, .npz).

    Links to files and folders are followed, and every folder is read once. Hidden folders, and those whose name begins with
    "__", are not read. Top-level folders are splits if all of those with images have names of splits.
    """
    found, pictures, arrays = Listing(), [], []
    for name, path in _walk(folder, found.left_out):
        suffix = PurePosixPath(name).suffix.lower()
        try:
            status = path.stat()
        except OSError:  # a link to nothing: as a broken image, it is named with its path
            status = None
        if path.name.startswith("."):
            if suffix in _picture_suffixes() | ARRAYS:
                found.left_out["hidden"] += 1
            continue
        if status is not None and not stat.S_ISREG(status.st_mode):
            found.left_out["not a regular file"] += 1
        elif path.name in METADATA or (path.name == LABELS and "labels" in json.loads(path.read_bytes())):
            found.metadata.append(name)
        elif suffix in ARRAYS:
            arrays.append(name)
        elif suffix in _picture_suffixes() or (status is not None and is_picture(path)):
            pictures.append(name)
        else:
            found.left_out[not_an_image(suffix)] += 1
            found.others.append(name)
            continue
        found.stamps[name] = (status.st_size, status.st_mtime_ns) if status is not None else (0, 0)
    if pictures and arrays:  # statistics of the pictures, for example
        found.left_out["arrays beside pictures"] += len(arrays)
    found.metadata.sort()
    found.splits = _split(sorted(pictures or arrays), found.left_out)
    return found


def is_picture(file) -> bool:
    """Whether Pillow recognizes the content of a file (a path or a binary stream) as a picture that it can decode."""
    _picture_suffixes()  # loads the formats
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(file, formats=sorted(set(Image.OPEN) - STUBS - UNSIGNED)),
        ):
            return True
    except Image.DecompressionBombError:
        return True
    except (UnidentifiedImageError, OSError):
        return False
    except Exception:  # damaged files raise errors of many types; they are recognized, and decoding says what is wrong
        return True


def is_image_bytes(data) -> bool:
    """Whether bytes are a picture, or an array of NumPy."""
    return isinstance(data, bytes) and (data.startswith(ARRAY_STARTS[0]) or is_picture(io.BytesIO(data)))


@cache
def _picture_suffixes() -> frozenset[str]:
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, form in formats.items() if form in Image.OPEN and form not in STUBS)


def not_an_image(suffix: str) -> str:
    """The reason why files with this suffix are left out."""
    return f"not images ({suffix})" if suffix else "not images (without suffix)"


def _walk(folder: Path, left_out: Counter) -> list[tuple[str, Path]]:
    """The relative name and the path of each file. Folders are read before links to folders, so that a folder which is
    linked from beside it is read at its own place."""
    files, seen, root = [], set(), folder.resolve()
    links, waiting = [], [("", folder)]
    while waiting or links:
        is_link = not waiting
        prefix, path = waiting.pop() if waiting else links.pop(0)
        real = path.resolve()
        if real in seen or (is_link and root.is_relative_to(real)):
            left_out["links to a folder that is read already or lies around it"] += 1
            continue
        seen.add(real)
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        if not entries and PurePosixPath(path.name).suffix.lower() in _picture_suffixes():
            left_out["folders named like a picture"] += 1
        for entry in entries:
            name, entry_path = prefix + entry.name, path / entry.name
            if not entry.is_dir():
                files.append((name, entry_path))
            elif not entry.name.startswith((".", "__")):
                (links if entry.is_symlink() else waiting).append((name + "/", entry_path))
    return files


def _split(names: list[str], left_out: Counter) -> dict[str, list[str]]:
    tops = {name.split("/")[0] for name in names if "/" in name}
    if not tops or not tops <= SPLITS.keys():
        return {"train": names} if names else {}
    splits = {split: [] for split in dict.fromkeys(SPLITS.values()) if split in {SPLITS[top] for top in tops}}
    for name in names:
        if "/" in name:
            splits[SPLITS[name.split("/")[0]]].append(name)
        else:
            left_out["beside the folders of splits"] += 1
    return splits


def tables(found: Listing, folder: Path) -> dict[str, pa.Table]:
    """A table for each split: a column "image" of paths, and the columns of the metadata files, or "label", the index of the
    image's folder among `class_names`, if there are several at one depth.

    With metadata, images come in its order, then those that it does not list. Raises ValueError for metadata without a
    column "file_name".
    """
    if found.metadata:
        parts = [read_metadata(folder / name, Path(name).parent.as_posix()) for name in found.metadata]
        return _with_metadata(found, folder, pa.concat_tables(parts, promote_options="default"))
    classes, made = class_names(found), {}
    index = {name: i for i, name in enumerate(classes or ())}
    for split, names in found.splits.items():
        made[split] = resolve_names(pa.table({"file_name": names}), folder)
        if classes is not None:
            labels = [index[PurePosixPath(name).parent.name] for name in names]
            made[split] = made[split].append_column("label", pa.array(labels, pa.int64()))
    return made


def class_names(found: Listing) -> list[str] | None:
    """The names of the folders of images, sorted, if there are several and all are at one depth; None for metadata files
    and otherwise."""
    inside = [PurePosixPath(name) for names in found.splits.values() for name in _below_split(found, names)]
    classes = {path.parent.name for path in inside}
    is_level = len({len(path.parts) for path in inside}) == 1
    return sorted(classes) if not found.metadata and is_level and len(classes) > 1 else None


def _below_split(found: Listing, names: list[str]) -> list[str]:
    has_splits = all(name.split("/")[0] in SPLITS and "/" in name for part in found.splits.values() for name in part)
    return [name.split("/", 1)[1] for name in names] if has_splits else names


def read_metadata(file: Path, prefix: str = ".") -> pa.Table:
    """A metadata file, with the values of "file_name", and of columns "<name>_file_name", relative to the data folder that
    holds the metadata in its folder `prefix`. Raises ValueError for a file without such a column, and for names that lead
    out of the folder of the metadata."""
    if file.suffix == ".csv":
        table = pa.Table.from_pandas(pd.read_csv(file), preserve_index=False).replace_schema_metadata(None)
    elif file.suffix == ".jsonl":
        table = pa.json.read_json(file)
    elif file.name == LABELS:
        names, labels = zip(*rows) if (rows := json.loads(file.read_bytes())["labels"]) else ((), None)
        table = pa.table({"file_name": pa.array(names, pa.string())} | ({"label": labels} if labels else {}))
    else:
        table = pa.parquet.read_table(file)
    columns = [column for column in table.column_names if is_file_column(column)]
    if not columns:
        raise ValueError(f"{file} has no column 'file_name' with the names of the images; it has {table.column_names}.")
    for column in columns:
        names = [_inside(name, prefix, file) for name in table[column].to_pylist()]
        table = table.set_column(table.column_names.index(column), column, pa.array(names, pa.string()))
    return table


def is_file_column(column: str) -> bool:
    """Whether a column of metadata names files."""
    return column == "file_name" or column.endswith("_file_name")


def _inside(name: str | None, prefix: str, file: Path) -> str | None:
    if name is None:
        return None
    normal = os.path.normpath(str(name)).replace("\\", "/")
    if "://" in str(name) or os.path.isabs(normal) or normal.split("/")[0] == "..":
        raise ValueError(f"file_name must be a path inside the folder of {file}, got {name!r}.")
    return normal if prefix == "." else f"{prefix}/{normal}"


def _with_metadata(found: Listing, folder: Path, table: pa.Table) -> dict[str, pa.Table]:
    columns = [column for column in table.column_names if is_file_column(column)]
    main = "file_name" if "file_name" in columns else columns[0]
    listed = table[main].to_pylist()
    known = {name for column in columns for name in table[column].to_pylist()}
    split_of = {name: split for split, names in found.splits.items() for name in names}
    made = {}

    def missing(name: str | None) -> str | None:
        # A file that does not exist is in the split of its folder, where it is reported as a broken image.
        only = next(iter(found.splits))
        return only if len(found.splits) == 1 else name and SPLITS.get(name.split("/")[0])

    for split, names in found.splits.items():
        rows = [i for i, name in enumerate(listed) if split_of.get(name, missing(name)) == split]
        others = pa.table({main: pa.array([name for name in names if name not in known], pa.string())})
        part = pa.concat_tables([table.take(pa.array(rows, pa.int64())), others], promote_options="default")
        made[split] = resolve_names(part, folder)
    return made


def resolve_names(table: pa.Table, folder: Path) -> pa.Table:
    """Metadata with columns of paths, "image" or "<name>", in place of "file_name" and "<name>_file_name"."""
    for i, column in enumerate(table.column_names):
        if is_file_column(column):
            paths = pa.array([name and str(folder / name) for name in table[column].to_pylist()], pa.string())
            name = "image" if column == "file_name" else column.removesuffix("_file_name")
            table = table.set_column(i, pa.field(name, pa.string(), metadata=PATHS), paths)
    return table


def path_columns(table: pa.Table) -> list[str]:
    """The columns of paths of images."""
    return [field.name for field in table.schema if field.metadata == PATHS]
