"""Parquet and Arrow files: which have images, and their labels without the images."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from ddpm_hf.data.reasons import BadData, reading, reason

TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # and their builders


def has_images(file: Path) -> bool:
    """Whether a table has a column that may hold images. Archives beside pictures are not used."""
    if file.suffix.lower() != ".parquet":
        return file.suffix.lower() == ".arrow"
    with reading(file):
        kinds = [field.type for field in pa.parquet.read_schema(file)]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_entry(kind) for kind in kinds)


def _is_entry(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def load_tables(splits: dict[str, list[Path]], streaming: bool) -> dict:
    """The data sets of files of one kind, by split. Raises BadData, which names the first damaged file."""
    files = [file for part in splits.values() for file in part]
    kind = files[0].suffix.lower()
    empty = set()
    for file in files if kind == ".parquet" else ():  # the end of a file, where its schema is, is read at once
        with reading(file):
            empty |= set() if pa.parquet.read_metadata(file).num_rows else {file}  # which `datasets` cannot read
    escaped = {split: [glob.escape(str(f)) for f in part if f not in empty] for split, part in splits.items()}
    if not all(escaped.values()):
        raise BadData(f"{sorted(empty)[0]} has no rows.")
    try:
        return datasets.load_dataset(TABLES[kind], data_files=escaped, streaming=streaming)
    except Exception as error:
        for file in files:
            with reading(file):
                sum(len(batch) for batch in _batches(file))
        raise BadData(f"{files[0].parent} cannot be read: {reason(error)}.") from error


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    if file.suffix.lower() == ".parquet":
        return pa.parquet.ParquetFile(file).iter_batches()
    try:
        return iter(pa.ipc.open_stream(file))
    except pa.ArrowInvalid:
        found = pa.ipc.open_file(file)
        return map(found.get_batch, range(found.num_record_batches))


def read_labels(files: Sequence[Path], column: str) -> set | None:
    """The values in a column, or field of a column, of Parquet files, which is read alone. None for other files, and
    if there is no such column."""
    if not files or files[0].suffix.lower() != ".parquet":
        return None
    labels, (top, *fields) = set(), column.split(".")
    for file in files:
        with reading(file):
            top = column if column in (names := pa.parquet.read_schema(file).names) else top
            if top not in names:
                return None
            values = pa.parquet.ParquetFile(file).read([column])[top]
            for name in fields if top != column else ():
                values = pa.compute.struct_field(values, name)
            if pa.types.is_nested(values.type):
                return None
            labels |= set(values.unique().to_pylist())
    return labels
