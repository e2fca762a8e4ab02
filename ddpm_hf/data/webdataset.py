"""Tables of .tar files in the format WebDataset: the files of a row are called alike but for their suffixes.

0.jpg, 0.cls and 0.json make a row with the columns "jpg", "cls" and one for each field of the JSON, such as "json.label".
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa

from ddpm_hf.data.archives import is_archive, list_members
from ddpm_hf.data.listing import ARRAYS, Listing, not_an_image, picture_suffixes
from ddpm_hf.data.metadata import PATHS
from ddpm_hf.data.reasons import reading

NUMBERS, TEXTS = {"cls", "cls2", "index", "id"}, {"txt", "text", "caption"}


def is_webdataset(file: Path) -> bool:
    """Whether an archive is a .tar file in this format: a picture and another file are called alike, or, with suffixes such as
    ".input.png" and ".target.png", the same two pictures several times. Raises BadData for a damaged archive."""
    if not is_archive(file) or file.suffix.lower() != ".tar":
        return False
    rows: dict[str, set[str]] = {}
    for name in list_members(file):
        key, suffix = _key(name)
        rows.setdefault(key, set()).add(suffix)
    several = Counter(frozenset(row) for row in rows.values() if len(row) > 1 and any(map(_is_image, row)))
    is_repeated = any(count > 1 and any("." in s for s in row) for row, count in several.items())
    return is_repeated or any(not all(map(_is_image, row)) for row in several)


def _key(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    base, _, suffix = path.name.partition(".")
    return str(path.parent / base), suffix.lower()


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in picture_suffixes() | ARRAYS


def read_webdataset(found: Listing, classes: Sequence[str] | None = None) -> dict[str, pa.Table]:
    """A table for each split of `found`, the files of the archives. A column "label" has the index of the folder of each row
    among `classes`, if given.

    The columns of images are named by their suffixes; there is one, "image", for pictures of several formats. Files with
    other suffixes than those of numbers, texts and JSON are left out. Raises BadData for a file that cannot be read.
    """
    entries = [entry for part in found.splits.values() for entry in part]
    suffixes = {_key(entry.name)[1] for entry in entries}
    is_one = not any("." in suffix for suffix in suffixes)
    rows: dict[tuple, dict] = {}
    for entry in entries:
        key, suffix = _key(entry.name)
        column = "image" if is_one and len(suffixes) > 1 else suffix
        rows.setdefault((entry.split, entry.ends[1], key), {})[column] = entry.path
    images = sorted({column for row in rows.values() for column in row})
    index = {name: i for i, name in enumerate(classes or ())}
    for (_, _, key), row in rows.items() if classes else ():
        row["label"] = index[PurePosixPath(key).parent.name]
    for entry in found.others:
        key, suffix = _key(entry.name)
        row = rows.get((entry.split, entry.ends[1], key))
        if row is not None and suffix in {"json"} | NUMBERS | TEXTS:
            with reading(entry.path):
                row.update(_columns(suffix, entry.read().decode("utf-8-sig")))
            found.left_out[not_an_image(entry.suffix)] -= 1
    splits: dict[str, list[dict]] = {}
    for key, row in rows.items():
        splits.setdefault(key[0] or "train", []).append(row)
    return {split: _table(part, images) for split, part in splits.items()}


def _columns(suffix: str, text: str) -> Iterator[tuple[str, object]]:
    if suffix == "json":
        yield from flatten("json", json.loads(text))
    else:
        text = text.strip()
        is_number = suffix in NUMBERS and text.lstrip("-").isdecimal()
        yield suffix, int(text) if is_number else text


def flatten(name: str, value) -> Iterator[tuple[str, object]]:
    """The fields of nested dicts, with names such as "json.a.b"."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(f"{name}.{key}", inner)
    else:
        yield name, value


def _table(rows: list[dict], images: list[str]) -> pa.Table:
    names = [*images, *dict.fromkeys(name for row in rows for name in row if name not in images)]
    columns = [_array([row.get(name) for row in rows]) for name in names]
    fields = [pa.field(n, a.type, metadata=PATHS if n in images else None) for n, a in zip(names, columns)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _array(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # of several types
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
