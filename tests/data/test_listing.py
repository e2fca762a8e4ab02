"""The lister finds every picture or array of a folder once, and counts what it leaves out."""

from collections import Counter

import numpy as np
import pyarrow
import pytest
from PIL import Image

from ddpm_hf.data.listing import class_names, describe, is_image_bytes, is_picture, list_images, read_metadata, tables


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / name, format="PNG")


def test_hidden_folders_and_files_are_not_read(tmp_path):
    write(tmp_path, "a/0.png", ".hidden/1.png", "__MACOSX/2.png", "a/._0.png")
    found = list_images(tmp_path)
    assert found.splits == {"train": ["a/0.png"]} and describe(found.left_out) == "1 hidden"


def test_a_file_is_stamped_with_its_size_and_time(tmp_path):
    write(tmp_path, "0.png")
    status = (tmp_path / "0.png").stat()
    assert list_images(tmp_path).stamps == {"0.png": (status.st_size, status.st_mtime_ns)}


def test_folders_at_several_depths_are_no_classes(tmp_path):
    write(tmp_path, "a/0.png", "b/c/1.png")
    assert class_names(list_images(tmp_path)) is None
    write(tmp_path, "b/2.png")
    (tmp_path / "b" / "c" / "1.png").unlink()
    assert class_names(list_images(tmp_path)) == ["a", "b"]


def test_missing_files_of_metadata_stay_in_the_split_of_their_folder(tmp_path):
    write(tmp_path, "train/0.png", "test/1.png")
    (tmp_path / "metadata.csv").write_text("file_name,x,mask_file_name\ntest/2.png,1,\ntrain/0.png,2,train/m.png\n")
    made = tables(list_images(tmp_path), tmp_path)
    assert made["test"]["image"].to_pylist() == [str(tmp_path / "test" / name) for name in ("2.png", "1.png")]
    assert made["train"]["mask"].to_pylist() == [str(tmp_path / "train" / "m.png")]
    assert made["test"]["x"].to_pylist() == [1, None]


def test_metadata_of_a_subfolder_names_files_inside_it(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["0.png"], "v": [[1, 2]]}), tmp_path / "metadata.parquet")
    table = read_metadata(tmp_path / "metadata.parquet", "a/b")
    assert table.to_pylist() == [{"file_name": "a/b/0.png", "v": [1, 2]}]
    for name in ("/etc/0.png", "a/../../0.png", "file://0.png"):
        pyarrow.parquet.write_table(pyarrow.table({"file_name": [name]}), tmp_path / "metadata.parquet")
        with pytest.raises(ValueError, match=f"inside the folder .* got '{name}'"):
            read_metadata(tmp_path / "metadata.parquet")


def test_pictures_and_arrays_are_recognized_by_content(tmp_path):
    write(tmp_path, "0")
    np.save(tmp_path / "1.npy", np.zeros((2, 2), np.uint8))
    (tmp_path / "2").write_bytes(bytes(range(256)))
    assert is_picture(tmp_path / "0") and not is_picture(tmp_path / "2")
    assert [is_image_bytes((tmp_path / name).read_bytes()) for name in ("0", "1.npy", "2")] == [True, True, False]
    assert not is_image_bytes("text") and not is_image_bytes(None)


def test_reasons_are_described_with_their_numbers():
    assert describe(Counter({"hidden": 1200, "arrays": 1})) == "1 arrays, 1,200 hidden" and describe(Counter()) == ""
