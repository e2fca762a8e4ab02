"""Data sets are opened from every supported source, and errors say what was found."""

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data.builtin import digits
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.finding import NoSuchSplit, dataset_files, find_column, open_dataset
from ddpm_hf.data.images import Images


def test_a_folder_of_parquet_files_is_opened(tmp_path):
    digits()["test"].to_parquet(tmp_path / "test.parquet")
    assert len(open_dataset(str(tmp_path), split="test")) == 360


def test_a_single_saved_split_is_the_training_split_only(tmp_path):
    digits()["test"].save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        open_dataset(str(tmp_path / "saved"), split="test")


def test_a_revision_of_local_data_raises(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    for name in ("digits", str(tmp_path)):
        with pytest.raises(ValueError, match="dataset_revision 'main' is for data sets on the Hub"):
            open_dataset(name, revision="main")


def test_a_folder_named_like_a_built_in_data_set_raises(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'photos' is built in and is a folder too: write './photos' for the folder"):
        open_dataset("photos")


def save_arrays(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (np.savez if name.endswith("npz") else np.save)(folder / name, np.full((4, 4, 5), i, np.uint8))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_arrays_has_splits_and_classes_like_one_of_images(tmp_path, streaming):
    for split in ("train", "test"):
        for name in ("a", "b"):
            save_arrays(tmp_path / split / name, "0.npy", "1.npz")
    found = open_dataset(str(tmp_path), split="test", streaming=streaming)
    assert found.features["label"].names == ["a", "b"]
    rows = list(found.cast_column("image", datasets.Image(decode=False)))
    assert [row["label"] for row in rows] == [0, 0, 1, 1]
    assert rows[3]["image"] == {"bytes": None, "path": str(tmp_path / "test" / "b" / "1.npz")}


def test_arrays_that_are_added_are_found(tmp_path):
    save_arrays(tmp_path, "0.npy")
    assert len(open_dataset(str(tmp_path))) == 1
    save_arrays(tmp_path, "0.npy", "1.npy")
    assert len(open_dataset(str(tmp_path))) == 2


def test_arrays_beside_pictures_are_left_out_and_said(tmp_path, caplog):
    """Statistics of the pictures, for example, are often kept in a .npz file beside them."""
    save_arrays(tmp_path, "0.npy", "statistics.npz")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert len(open_dataset(str(tmp_path))) == 1
    assert "its 2 files of arrays (.npy, .npz) are left out" in caplog.text


def test_a_folder_without_images_raises(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match="holds no image"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_a_missing_folder_raises(name):
    with pytest.raises(ValueError, match="neither 'digits' nor 'photos', nor a folder"):
        open_dataset(name)


def test_a_missing_split_raises_with_the_existing_ones():
    with pytest.raises(NoSuchSplit, match=r"no split 'validation'; it has \['train', 'test'\]"):
        open_dataset("digits", split="validation")


def test_a_folder_of_save_to_disk_is_opened(tmp_path):
    digits()["test"].save_to_disk(str(tmp_path / "saved"))
    assert len(open_dataset(str(tmp_path / "saved"))) == 360


def test_a_column_must_be_named_if_several_fit():
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    picture = Image.new("RGB", (8, 8))
    dataset = datasets.Dataset.from_dict({"a": [picture], "b": [picture]}, features=features)
    with pytest.raises(ValueError, match=r"image_column must be one of \['a', 'b'\]"):
        Images(dataset, ImageFormat((8, 8)))
    assert Images(dataset, ImageFormat((8, 8)), image_column="b").image_column == "b"


def test_a_column_of_another_type_raises_with_the_columns():
    dataset = digits()["test"]
    assert find_column(dataset, datasets.Image, None, "image_column") == "image"
    with pytest.raises(
        ValueError, match=r"image_column must be one of \['image'\], got 'label'; .*\['image', 'label'\]"
    ):
        find_column(dataset, datasets.Image, "label", "image_column")


def test_image_files_are_listed_by_name(tmp_path):
    for name in ("b.png", "a.PNG", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in dataset_files(str(tmp_path))] == ["a.PNG", "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        dataset_files(str(tmp_path / "empty"))
