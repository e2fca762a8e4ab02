"""Parquet and Arrow files are opened as splits, damage is named by file, and labels are read alone."""

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from ddpm_hf.data.reasons import BadData
from ddpm_hf.data.tables import has_images, load_tables, read_labels
from tests.data.helpers import picture


def parquet(file, **columns):
    pa.parquet.write_table(pa.table(columns), file)
    return file


def test_tables_with_columns_of_bytes_may_have_images(tmp_path):
    entry = {"bytes": picture(), "path": None}
    columns = ({"x": [b"a"]}, {"x": [entry]}, {"x": [1]}, {"x": ["a"], "y": [[1]]})
    found = [has_images(parquet(tmp_path / f"{i}.parquet", **c)) for i, c in enumerate(columns)]
    assert found == [True, True, False, False]
    assert has_images(tmp_path / "a.arrow") and not has_images(tmp_path / "a.zip")


def test_the_damaged_one_of_several_files_is_named(tmp_path):
    files = [parquet(tmp_path / f"{i}[*].parquet", x=list(range(1000))) for i in range(3)]
    assert load_tables({"train": files[:2], "test": files[2:]}, False)["train"].num_rows == 2000
    whole = files[1].read_bytes()
    for damaged in (whole[:-20], whole[:4] + bytes(3000) + whole[3004:]):
        files[1].write_bytes(damaged)
        with pytest.raises(BadData, match=r"1\[\*\].parquet cannot be read"):
            load_tables({"train": files}, False)
    datasets.Dataset.from_dict({"x": [1, 2]}).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert load_tables({"train": [arrow]}, False)["train"]["x"][:] == [1, 2]
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(BadData, match=f"{arrow} cannot be read"):
        load_tables({"train": [arrow]}, False)


def test_labels_of_all_files_are_read_without_the_images(tmp_path, monkeypatch):
    columns = ({"kind": ["b", "a"], "a.b": [1, 2]}, {"kind": ["c", None], "a.b": [3, 4]})
    json = [{"a": {"b": "x"}, "l": [1]}, {"a": {"b": "y"}, "l": [2]}]
    files = [parquet(tmp_path / f"{i}.parquet", json=json, **c) for i, c in enumerate(columns)]
    read, asked = pa.parquet.ParquetFile.read, []
    monkeypatch.setattr(
        pa.parquet.ParquetFile, "read", lambda self, columns: asked.append(columns) or read(self, columns)
    )
    assert read_labels(files, "kind") == {"a", "b", "c", None}
    assert read_labels(files, "json.a.b") == {"x", "y"} and read_labels(files, "a.b") == {1, 2, 3, 4}
    assert asked == [["kind"]] * 2 + [["json.a.b"]] * 2 + [["a.b"]] * 2
    for column in ("json", "json.l", "other", "other.x"):
        assert read_labels(files, column) is None
    assert read_labels([], "kind") is read_labels([tmp_path / "a.arrow"], "kind") is None
