"""Tables of image files: their paths, with the columns of metadata files or the classes of their folders."""

import io
import json
import os
import warnings
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from ddpm_hf.data.listing import SPLITS, Entry, Listing, class_names
from ddpm_hf.data.reasons import BadData, reading

SEPARATORS = (",", ";", "\t", "|")  # of a .csv file: the first that finds a column of names in its first line
PATHS = {b"content": b"paths of images"}  # marks the columns of paths in a table


def tables(found: Listing) -> dict[str, pa.Table]:
    """A table for each split: a column "image" of paths, and the columns of the metadata files, or "label", the index of the
    image's folder among `class_names`, if there are several at one depth.

    With metadata, images come in its order, then those that it does not list. Raises BadData for metadata that is damaged
    or without a column "file_name".
    """
    if found.metadata:
        parts = [read_metadata(entry) for entry in found.metadata]
        with reading(" and ".join(entry.path for entry in found.metadata)):
            table = pa.concat_tables(parts, promote_options="permissive")
        return {split: mark_paths(part) for split, part in _with_metadata(found, table).items()}
    index = {name: i for i, name in enumerate(class_names(found) or ())}
    made = {}
    for split, entries in found.splits.items():
        made[split] = mark_paths(pa.table({"file_name": [entry.path for entry in entries]}))
        if index:
            labels = [index[Path(entry.name).parent.name] for entry in entries]
            made[split] = made[split].append_column("label", pa.array(labels, pa.int64()))
    return made


def read_metadata(entry: Entry, anywhere: bool = False) -> pa.Table:
    """A metadata file, with the paths of the files that "file_name", and columns "<name>_file_name", name as seen from its
    folder. Raises BadData for a file that is damaged or without such a column, and, unless `anywhere`, for names that lead
    out of the folder."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_labels}
    with reading(entry.path):
        table = readers.get(entry.suffix, _read_parquet)(entry.read())
        columns = [column for column in table.column_names if is_file_column(column)]
        if not columns:
            found = f"it has {table.column_names}"
            raise BadData(f"{entry.path} has no column 'file_name' with the names of the images; {found}.")
        for column in columns:
            names = [name and _path(str(name), entry, anywhere) for name in table[column].to_pylist()]
            table = table.set_column(table.column_names.index(column), column, pa.array(names, pa.string()))
    return table


def _read_csv(data: bytes) -> pa.Table:
    text = data.decode("utf-8-sig")
    header = text.partition("\n")[0].strip()
    names = {separator: [name.strip(' "') for name in header.split(separator)] for separator in SEPARATORS}
    separator = next((s for s, columns in names.items() if any(map(is_file_column, columns))), ",")
    types = {name: str for name in names[separator] if is_file_column(name)}  # "001" is a name, not a number
    options = {"keep_default_na": False, "na_values": [""], "dtype_backend": "pyarrow", "skipinitialspace": True}
    with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # of rows longer than the header
        frame = pd.read_csv(io.StringIO(text), sep=separator, dtype=types, index_col=False, **options)
    return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)


def _read_jsonl(data: bytes) -> pa.Table:
    rows = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("every line must be a JSON object")
    return pa.Table.from_struct_array(pa.array(rows))


def _read_labels(data: bytes) -> pa.Table:
    rows = json.loads(data)["labels"] or []
    if not all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in rows):
        raise ValueError("its labels must be null, or a list of pairs [name of the file, label]")
    names, labels = zip(*rows) if rows else ((), None)
    return pa.table({"file_name": pa.array(names, pa.string())} | ({"label": labels} if labels else {}))


def _read_parquet(data: bytes) -> pa.Table:
    return pa.parquet.read_table(pa.BufferReader(data))


def is_file_column(column: str) -> bool:
    """Whether a column of metadata names files."""
    return column == "file_name" or column.endswith("_file_name")


def _path(name: str, entry: Entry, anywhere: bool) -> str:
    normal, folder = os.path.normpath(name.replace("\\", "/")), Path(entry.path).parent
    if "\\" in name and os.path.lexists(entry.beside(name)):  # part of a name, except on Windows
        normal = name
    is_absolute = os.path.isabs(normal)
    if is_absolute and (inside := Path(normal).parent.resolve() / Path(normal).name).is_relative_to(folder):
        normal, is_absolute = str(inside.relative_to(folder)), False
    if "://" in name or (not anywhere and (is_absolute or normal.split("/")[0] == "..")):
        raise BadData(f"file_name must be a path inside the folder of {entry.path}, got {name!r}.")
    return normal if is_absolute else entry.beside(normal)


def _with_metadata(found: Listing, table: pa.Table) -> dict[str, pa.Table]:
    columns = [column for column in table.column_names if is_file_column(column)]
    main = "file_name" if "file_name" in columns else columns[0]
    listed = table[main].to_pylist()
    known = {path for column in columns for path in table[column].to_pylist()}
    split_of = {entry.path: split for split, entries in found.splits.items() for entry in entries}
    made, first = {}, next(iter(found.splits), "train")
    folders = {entry.ends[0] + top + "/": SPLITS[top] for entry in found.metadata for top in SPLITS}

    def missing(path: str | None) -> str:
        # A file that does not exist is in the split of its folder, where it is reported as a broken image.
        split = next((split for folder, split in folders.items() if path and path.startswith(folder)), first)
        return split if split in found.splits else first

    for name, entries in (found.splits or {first: []}).items():
        rows = [i for i, path in enumerate(listed) if (split_of.get(path) or missing(path)) == name]
        others = pa.table({main: pa.array([e.path for e in entries if e.path not in known], pa.string())})
        made[name] = pa.concat_tables([table.take(pa.array(rows, pa.int64())), others], promote_options="default")
    return made


def mark_paths(table: pa.Table) -> pa.Table:
    """Metadata with marked columns "image" or "<name>" in place of "file_name" and "<name>_file_name"."""
    for i, column in enumerate(table.column_names):
        if is_file_column(column):
            name = "image" if column == "file_name" else column.removesuffix("_file_name")
            table = table.set_column(i, pa.field(name, pa.string(), metadata=PATHS), table[column])
    return table


def path_columns(table: pa.Table) -> list[str]:
    """The columns of paths of images."""
    return [field.name for field in table.schema if field.metadata == PATHS]
