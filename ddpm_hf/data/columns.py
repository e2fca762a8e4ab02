"""The columns of images and of labels in a data set."""

from collections.abc import Iterable

import datasets
import numpy as np

from ddpm_hf.data.arrays import array_file
from ddpm_hf.data.listing import is_image_bytes
from ddpm_hf.data.reasons import BadData
from ddpm_hf.data.webdataset import flatten

Data = datasets.Dataset | datasets.IterableDataset
FIRST_ROWS = 5  # that are looked at for the types of columns: an image may be null
WORDS = {"string", "large_string", "bool"}  # types of labels that become classes


def find_column(dataset: Data, kind, name: str | None, argument: str) -> str:
    """The column `name`, or the only column, of a kind of feature. Raises ValueError, with the columns, if there is none."""
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name not in fitting:
        types = ", ".join(f"{column} ({_type(feature)})" for column, feature in dataset.features.items())
        raise ValueError(f"{argument} must be one of {fitting}, got {name!r}; all columns: {types}.")
    return name


def _type(feature) -> str:
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"{type(feature).__name__} of {_type(inner)}"
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def mark_images(dataset: Data) -> Data:
    """The data set, if it has no column of images, with those of the bytes of images, of {bytes, path}, and of arrays as such.

    Raises BadData for columns of lists of images, if there are no others.
    """
    features = dataset.features or {}
    if any(isinstance(feature, datasets.Image) for feature in features.values()):
        return dataset
    rows = list(dataset.take(FIRST_ROWS))
    if not features and rows:
        dataset = dataset.cast(datasets.Dataset.from_list(rows).features)
        features = dataset.features
    for name, feature in features.items():
        values = [row[name] for row in rows]
        if any(is_image_bytes(value.get("bytes") if isinstance(value, dict) else value) for value in values):
            dataset = dataset.cast_column(name, datasets.Image())
        elif (dtype := _array_type(feature)) is not None:
            after = datasets.Features(dataset.features | {name: datasets.Image()})
            options = {"fn_kwargs": {"column": name, "dtype": dtype}, "features": after}
            dataset = dataset.map(_array_entry, **options)
    lists = [name for name, f in features.items() if isinstance(getattr(f, "feature", None), datasets.Image)]
    if lists and not any(isinstance(feature, datasets.Image) for feature in dataset.features.values()):
        raise BadData(f"the columns {lists} hold lists of images; make one row of each image.")
    return dataset


def _array_type(feature) -> str | None:
    """The type of the numbers in a column of arrays, (H, W) or (H, W, C), or of nested lists; None for other columns."""
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return feature.dtype
    depth = 0
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature, depth = feature.feature, depth + 1
    is_number = isinstance(feature, datasets.Value) and feature.dtype.startswith(("uint", "int", "float"))
    return feature.dtype if depth in (2, 3) and is_number else None


def _array_entry(row: dict, column: str, dtype: str) -> dict:
    if row[column] is None:
        return {column: None}
    try:
        data = array_file(np.asarray(row[column], dtype))
    except ValueError:  # lists of several lengths: a broken image
        data = b""
    return {column: {"bytes": data, "path": None}}


def mark_labels(
    splits: dict[str, Data], column: str | None, has_classes: bool = True, labels: Iterable | None = None
) -> dict[str, Data]:
    """The splits with the strings, or truth values, of a column as classes: those of all splits, sorted. A name with dots is
    that of a field in a column of dicts.

    Args:
        has_classes: False leaves the values as they are.
        labels: the values in the column; None if they are not known without reading the images too.

    Raises BadData for a stream whose words are not known.
    """
    if column is None:
        return splits
    splits = {split: _unpack(dataset, column) for split, dataset in splits.items()}
    types = {getattr(dataset.features.get(column), "dtype", None) for dataset in splits.values()}
    if not has_classes or not types & WORDS or not types <= WORDS | {"null"} or _has_names(splits, column):
        return splits
    if labels is None:
        if any(isinstance(dataset, datasets.IterableDataset) for dataset in splits.values()):
            raise BadData(
                f"the labels in the column {column!r} are words, and a stream does not tell which ones there are: "
                "leave out --streaming, or store them as ClassLabel."
            )
        labels = {word for dataset in splits.values() for word in dataset.unique(column)}
    names = sorted({str(word) for word in labels if word is not None})
    return {split: _encode(dataset, column, names) for split, dataset in splits.items()}


def _has_names(splits: dict[str, Data], column: str) -> bool:
    return any(isinstance(dataset.features.get(column), datasets.ClassLabel) for dataset in splits.values())


def _unpack(dataset: Data, column: str) -> Data:
    top = column.split(".")[0]
    if column in dataset.features or not isinstance(dataset.features.get(top), dict):
        return dataset
    fields = datasets.Features({top: dataset.features[top]}).flatten()
    if column not in fields:
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return _map_stream(dataset, _field, column, fields[column], top=top)
    labels = dataset.select_columns([top]).flatten()[column][:]
    return dataset.add_column(column, labels, feature=fields[column])


def _field(row: dict, top: str, column: str) -> dict:
    return {column: dict(flatten(top, row[top])).get(column)}


def _encode(dataset: Data, column: str, names: list[str]) -> Data:
    classes = datasets.ClassLabel(names=names)
    index = {name: i for i, name in enumerate(names)}
    if isinstance(dataset, datasets.IterableDataset):
        return _map_stream(dataset, _class, column, classes, index=index)
    labels = [None if word is None else index[str(word)] for word in dataset[column]]
    # In place of `cast_column`, which would copy the images too.
    return dataset.remove_columns(column).add_column(column, labels, feature=classes)


def _class(row: dict, column: str, index: dict[str, int]) -> dict:
    return {column: None if row[column] is None else index[str(row[column])]}


def _map_stream(
    stream: datasets.IterableDataset, function, column: str, feature, **options
) -> datasets.IterableDataset:
    for name, image in stream.features.items():
        if isinstance(image, datasets.Image):  # or else they would be decoded, and encoded anew
            stream = stream.cast_column(name, datasets.Image(decode=False))
    after = datasets.Features(stream.features | {column: feature})
    return stream.map(function, fn_kwargs={"column": column, **options}, features=after)


def fingerprint(dataset: datasets.Dataset) -> str:
    """The hash that `datasets` keeps of a data set's source and transforms. It has no public name (as of datasets 5.2)."""
    return dataset._fingerprint
