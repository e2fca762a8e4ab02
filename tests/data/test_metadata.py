"""Metadata gives paths and columns, whatever wrote the file."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from ddpm_hf.data.listing import Entry, list_archives, list_images
from ddpm_hf.data.metadata import mark_paths, path_columns, read_metadata, tables
from ddpm_hf.data.reasons import BadData
from tests.data.helpers import pack
from tests.data.test_listing import write


def metadata(folder, name, content: str | bytes) -> Entry:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Entry(name, str(folder / name))


def test_missing_files_stay_in_the_split_of_their_folder(tmp_path):
    write(tmp_path, "train/0.png", "test/1.png")
    text = "file_name,x,mask_file_name\ntest/2.png,1,\ntrain/0.png,2,train/m.png\nother/3.png,3,\n"
    metadata(tmp_path, "metadata.csv", text)
    made = tables(list_images(tmp_path))
    assert made["test"]["image"].to_pylist() == [str(tmp_path / "test" / name) for name in ("2.png", "1.png")]
    assert made["train"]["mask"].to_pylist() == [str(tmp_path / "train" / "m.png"), None]
    assert made["test"]["x"].to_pylist() == [1, None] and made["train"]["x"].to_pylist() == [2, 3]


def test_missing_files_of_an_archive_are_not_dropped(tmp_path):
    text = {"metadata.csv": "file_name,x\ntrain/0.png,1\ntest/9.png,2\n"}
    made = tables(list_archives([pack(tmp_path / "a.zip", "train/0.png", "test/1.png", **text)]))
    assert [path.split("::")[0] for path in made["test"]["image"].to_pylist()] == [
        "zip://test/9.png",
        "zip://test/1.png",
    ]


def test_names_are_relative_to_the_folder_of_the_metadata(tmp_path):
    pa.parquet.write_table(pa.table({"file_name": ["0.png", None], "v": [[1, 2], []]}), tmp_path / "m.parquet")
    entry = metadata(tmp_path, "a/b/metadata.parquet", (tmp_path / "m.parquet").read_bytes())
    expected = [{"file_name": f"{tmp_path}/a/b/0.png", "v": [1, 2]}, {"file_name": None, "v": []}]
    assert read_metadata(entry).to_pylist() == expected


@pytest.mark.parametrize("name", ["/etc/0.png", "a/../../0.png", "file://0.png", "..\\0.png", "a\\..\\..\\0.png"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    entry = metadata(tmp_path, "metadata.jsonl", json.dumps({"file_name": name}))
    with pytest.raises(BadData, match="inside the folder .* got ") as error:
        read_metadata(entry)
    assert repr(name) in str(error.value)


def test_names_anywhere_are_accepted_on_request(tmp_path):
    entry = metadata(tmp_path, "a/b.csv", "file_name\n/etc/0.png\n../1.png\nsub\\2.png\n")
    found = read_metadata(entry, anywhere=True)["file_name"].to_pylist()
    assert found == ["/etc/0.png", str(tmp_path / "1.png"), str(tmp_path / "a/sub/2.png")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_line_ends_and_byte_order_marks_make_no_difference(tmp_path, separator, end, mark):
    rows = [["id", '"file_name"', "label"], ["1", "007", "NA"], ["", '"a b"', ""]]
    text = mark + "".join(separator.join(row) + end for row in rows)
    names = [str(tmp_path / name) for name in ("007", "a b")]
    expected = {"id": [1, None], "file_name": names, "label": ["NA", None]}
    assert read_metadata(metadata(tmp_path, "a.csv", text)).to_pydict() == expected
    lines = '{"id": 1, "file_name": "007", "label": "NA"}', "", '{"file_name": "a b"}'
    assert read_metadata(metadata(tmp_path, "a.jsonl", mark + end.join(lines))).to_pydict() == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "", "cannot be read: No columns to parse"),
        ("metadata.csv", "x\n1", "no column 'file_name' .* it has .'x'"),
        ("metadata.csv", b"file_name\n\xff\n", "cannot be read: .*invalid start byte"),
        ("metadata.jsonl", "[1]", "every line must be a JSON object"),
        ("metadata.jsonl", '{"file_name": "0.png", "a": 1}\n{"a": "x"}', "cannot be read"),
        ("metadata.parquet", "PAR1", "cannot be read"),
        ("dataset.json", '{"labels": {"0.png": 1}}', "must be null, or a list of pairs"),
        ("dataset.json", '{"labels": [["0.png", 1], ["1.png", "x"]]}', "cannot be read"),
        ("dataset.json", '{"labels": ', "dataset.json cannot be read"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, name, text, message):
    write(tmp_path, "0.png")
    metadata(tmp_path, name, text)
    with pytest.raises(BadData, match=message) as error:
        tables(list_images(tmp_path))
    assert name in str(error.value)


@pytest.mark.parametrize("text", ["[]", "3", '{"name": "x"}'])
def test_another_file_called_dataset_json_is_no_metadata(tmp_path, text):
    write(tmp_path, "0.png")
    metadata(tmp_path, "dataset.json", text)
    assert list_images(tmp_path).metadata == []


def test_columns_of_paths_are_marked():
    table = mark_paths(pa.table({"file_name": ["/a"], "mask_file_name": ["/b"], "x": ["/c"]}))
    assert table.column_names == ["image", "mask", "x"] and path_columns(table) == ["image", "mask"]
