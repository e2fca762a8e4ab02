"""WebDataset is recognized, and its rows are those that `datasets` reads."""

import json

import datasets
import pytest

from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.listing import list_archives
from ddpm_hf.data.metadata import path_columns
from ddpm_hf.data.reasons import BadData
from ddpm_hf.data.webdataset import flatten, is_webdataset, read_webdataset
from tests.data.helpers import pack, picture


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.png", "0.cls"], True),
        (["a/0.png", "a/0.json", "a/1.png"], True),
        (["0.in.png", "0.out.png", "1.in.png", "1.out.png"], True),
        (["2020.01.png", "2020.02.png", "2021.07.png"], False),
        (["0.png", "1.jpg"], False),
        (["0.png", "0.jpg", "1.png", "1.jpg"], False),
        (["cat/0.png", "dog/0.png", "LICENSE", "README.md", "README.txt"], False),
    ],
)
def test_webdataset_is_told_from_a_tar_of_files(tmp_path, names, expected):
    assert is_webdataset(pack(tmp_path / "a.tar", *names)) == expected
    assert not is_webdataset(pack(tmp_path / "a.zip", *names))


def test_rows_are_those_that_datasets_reads(tmp_path):
    texts = {f"{i}.{kind}": text for i in range(3) for kind, text in (("cls", str(i)), ("txt", f"no. {i}"))}
    texts |= {f"{i}.json": json.dumps({"a": {"b": i, "c": "x"}}) for i in range(3)}
    names = [f"{i}.png" for i in range(3)]
    files = {name: picture(i) for i, name in enumerate(names)} | texts
    archive = pack(tmp_path / "a.tar", **dict(sorted(files.items())))
    expected = datasets.load_dataset("webdataset", data_files=str(archive), split="train")
    found = open_dataset(str(archive))
    assert [row["png"].tobytes() for row in found] == [row["png"].tobytes() for row in expected]
    assert found["cls"][:] == expected["cls"][:] and found["txt"][:] == expected["txt"][:]
    assert found["json.a.b"][:] == [row["a"]["b"] for row in expected["json"]]


def test_pictures_of_several_formats_are_one_column(tmp_path):
    files = {"0.jpg": picture(0, "JPEG"), "0.cls": "cat", "1.png": picture(1), "1.cls": "7", "2.png": picture(2)}
    archive = pack(tmp_path / "a.tar", **files)
    (table,) = read_webdataset(list_archives([archive])).values()
    assert path_columns(table) == ["image"] and table["cls"].to_pylist() == ["cat", "7", None]


def test_other_files_of_a_row_are_left_out_and_counted(tmp_path):
    archive = pack(tmp_path / "a.tar", "0.png", "1.png", **{"0.cls": "1", "0.mp4": "x", "LICENSE": "free"})
    found = list_archives([archive])
    (table,) = read_webdataset(found).values()
    assert table.column_names == ["png", "cls"] and table["cls"].to_pylist() == [1, None]
    assert +found.left_out == {"not images (.mp4)": 1, "not images (without suffix)": 1}


def test_folders_of_rows_are_classes(tmp_path):
    archive = pack(tmp_path / "a.tar", "dog/0.png", "cat/0.png", **{"dog/0.txt": "a dog", "cat/0.txt": "a cat"})
    found = open_dataset(str(archive))
    assert {row["txt"]: row["label"] for row in found} == {"a cat": 0, "a dog": 1}
    assert found.features["label"].names == ["cat", "dog"]


def test_a_damaged_label_is_named(tmp_path):
    archive = pack(tmp_path / "a.tar", "0.png", **{"0.json": "{"})
    with pytest.raises(BadData, match="0.json::.*a.tar cannot be read: Expecting property name"):
        read_webdataset(list_archives([archive]))


def test_nested_fields_have_names_with_dots():
    assert list(flatten("json", {"a": {"b": 1, "c": [2]}, "d": None})) == [
        ("json.a.b", 1),
        ("json.a.c", [2]),
        ("json.d", None),
    ]
