"""Columns are found by what they hold: images, and labels of words, truth values or fields."""

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data.columns import find_column, fingerprint, mark_images, mark_labels
from ddpm_hf.data.decoding import ImageFormat, read_entry, read_image
from ddpm_hf.data.images import Images
from ddpm_hf.data.reasons import BadData
from tests.data.helpers import picture

ARRAYS = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)


def nested(dtype: str, depth: int):
    feature = datasets.Value(dtype)
    for _ in range(depth):
        feature = datasets.List(feature)
    return feature


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (datasets.Array3D((6, 5, 3), "uint8"), ARRAYS),
        (datasets.Array2D((6, 5), "uint16"), ARRAYS[..., 0].astype(np.uint16) * 257),
        (nested("uint8", 3), ARRAYS),
        (nested("uint8", 2), ARRAYS[..., 0]),
    ],
)
def test_arrays_are_read_as_images(feature, values, streaming):
    rows = {"x": [*values.tolist(), None]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(x=feature))
    found = mark_images(dataset.to_iterable_dataset(2) if streaming else dataset)
    assert find_column(found, datasets.Image, None, "image_column") == "x"
    *entries, last = [row["x"] for row in found.cast_column("x", datasets.Image(decode=False))]
    for entry, value in zip(entries, values, strict=True):
        np.testing.assert_array_equal(read_image(read_entry(entry)).squeeze(), value)
    assert last is None


def test_arrays_that_are_no_images_are_named_as_broken():
    rows = {"x": [[[1, 2], [3]], [[1, 2], [3, 4]]]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(x=nested("uint8", 2)))
    images = Images(mark_images(dataset), ImageFormat((2, 2), 1))
    assert images.broken() == [0] and images[[1]]["images"].flatten().tolist() == [1, 2, 3, 4]


def test_lists_of_numbers_beside_images_stay_as_they_are():
    rows = {"image": [picture()], "box": [[[1.0, 2.0], [3.0, 4.0]]]}
    features = datasets.Features(image=datasets.Image(), box=nested("float32", 2))
    dataset = datasets.Dataset.from_dict(rows, features=features)
    assert mark_images(dataset) is dataset


def test_columns_of_lists_of_images_are_refused():
    dataset = datasets.Dataset.from_dict(
        {"a": [[picture()]]}, features=datasets.Features(a=datasets.List(datasets.Image()))
    )
    with pytest.raises(BadData, match=r"the columns \['a'\] hold lists of images; make one row of each image"):
        mark_images(dataset)


def words(*labels, feature=None) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8))] * len(labels), "label": list(labels)})
    return rows.cast_column("label", feature) if feature else rows


def test_classes_are_those_of_all_splits_in_order():
    splits = {"train": words("b", "c", None), "test": words("a", "c")}
    marked = mark_labels(splits, "label")
    assert marked["train"].features["label"].names == marked["test"].features["label"].names == ["a", "b", "c"]
    assert marked["train"]["label"][:] == [1, 2, None] and marked["test"]["label"][:] == [0, 2]
    assert fingerprint(mark_labels(splits, "label")["train"]) == fingerprint(marked["train"])


def test_truth_values_are_classes_and_other_labels_stay():
    (found,) = mark_labels({"train": words(True, False)}, "label").values()
    assert found.features["label"].names == ["False", "True"] and found["label"][:] == [1, 0]
    named = datasets.ClassLabel(names=["z", "a"])
    for unchanged in (words(0, 1), words(0.5), words([1.0, 2.0]), words(0, 1, feature=named), words(None, None)):
        assert mark_labels({"train": unchanged}, "label")["train"].features == unchanged.features
    kept = mark_labels({"train": words("a")}, "label", has_classes=False)["train"]
    assert kept["label"][:] == ["a"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_field_is_a_column_of_labels(streaming):
    rows = datasets.Dataset.from_dict({"image": [picture()] * 3, "json": [{"a": {"b": w}, "n": 1} for w in "yxy"]})
    source = rows.to_iterable_dataset(2) if streaming else rows
    (found,) = mark_labels({"train": source}, "json.a.b", labels={"x", "y"} if streaming else None).values()
    assert [row["json.a.b"] for row in found] == [1, 0, 1] and found.features["json.a.b"].names == ["x", "y"]
    assert set(found.features) == {"image", "json", "json.a.b"}
    for missing in ("json.a.c", "json", "other.a"):
        assert set(mark_labels({"train": source}, missing)["train"].features) == {"image", "json"}


def test_images_of_a_stream_keep_their_bytes():
    files = [picture(i, "JPEG") for i in range(3)]
    entries = [{"bytes": data, "path": None} for data in files]
    features = {"image": datasets.Image(), "json": {"a": datasets.Value("string")}}
    rows = datasets.Dataset.from_dict(
        {"image": entries, "json": [{"a": w} for w in "yxy"]}, features=datasets.Features(features)
    )
    (found,) = mark_labels({"train": rows.to_iterable_dataset(1)}, "json.a", labels={"x", "y"}).values()
    found = found.cast_column("image", datasets.Image(decode=False)).select_columns(["image", "json.a"])
    assert [(row["image"]["bytes"], row["json.a"]) for row in found] == list(zip(files, [1, 0, 1]))


def test_words_of_a_stream_must_be_known():
    stream = words("a", "b").to_iterable_dataset(1)
    with pytest.raises(
        BadData, match="the labels in the column 'label' are words, and a stream .* leave out --streaming"
    ):
        mark_labels({"train": stream}, "label")
    (found,) = mark_labels({"train": stream}, "label", labels={"b", "a", None}).values()
    assert [row["label"] for row in found] == [0, 1]
