"""Data sets are opened from every supported source, and errors say what was found."""

import json
import os
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from ddpm_hf.data.builtin import digits
from ddpm_hf.data.columns import find_column, fingerprint
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.finding import NoSuchSplit, open_dataset, source_of
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


def test_a_configuration_of_data_that_has_none_raises(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "table.csv").write_text("file_name\nimage.png\n")
    for name in ("digits", str(tmp_path), str(tmp_path / "table.csv")):
        with pytest.raises(ValueError, match="dataset_config 'foo' is for data sets"):
            open_dataset(name, "foo")


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


def test_arrays_beside_pictures_are_left_out_and_said(tmp_path):
    """Statistics of the pictures, for example, are often kept in a .npz file beside them."""
    save_arrays(tmp_path, "0.npy", "statistics.npz")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    found = open_dataset(str(tmp_path))
    assert len(found) == 1 and source_of(found).left_out == "2 arrays beside pictures"


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
        ValueError,
        match=r"image_column must be one of \['image'\], got 'label'; .*image \(Image\), label \(ClassLabel\)",
    ):
        find_column(dataset, datasets.Image, "label", "image_column")


def pictures(folder, *names, form="PNG"):
    """Write gray pictures, the i-th of value i."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / name, format=form)


def names_of(dataset, folder):
    rows = dataset.cast_column("image", datasets.Image(decode=False))
    return [os.path.relpath(row["image"]["path"], folder) for row in rows]


ODD_NAMES = ["train.png", "training-1.png", "train station.png", "test.png", "dev board.png", "val 2.png"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_files_do_not_make_splits(tmp_path, name, streaming):
    names = sorted([name, *(f"{i}.png" for i in range(11))])
    pictures(tmp_path, *names)
    assert names_of(open_dataset(str(tmp_path), streaming=streaming), tmp_path) == names


def test_order_and_classes_are_those_of_imagefolder(tmp_path):
    pictures(tmp_path, *(f"{kind}/{i}.png" for kind in ("B b", "a", "b", "a-b") for i in (2, 10, 1)))
    expected = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    for streaming in (False, True):
        found = open_dataset(str(tmp_path), streaming=streaming)
        assert names_of(found, tmp_path) == names_of(expected, tmp_path) and found.features == expected.features
        assert [row["label"] for row in found] == expected["label"][:]


def test_folders_that_are_not_all_splits_are_classes(tmp_path):
    pictures(tmp_path, "bus/0.png", "train/0.png", "car/0.png")
    found = open_dataset(str(tmp_path))
    assert found.features["label"].names == ["bus", "car", "train"] and found["label"][:] == [0, 1, 2]


def test_top_level_folders_with_names_of_splits_are_splits(tmp_path):
    pictures(tmp_path, "train/a/train/0.png", "train/b/x/1.png", "val/a/x/2.png", "3.png")
    found = open_dataset(str(tmp_path))
    assert names_of(found, tmp_path) == ["train/a/train/0.png", "train/b/x/1.png"]
    assert source_of(found).left_out == "1 beside the folders of splits"
    assert names_of(open_dataset(str(tmp_path), split="validation"), tmp_path) == ["val/a/x/2.png"]
    with pytest.raises(NoSuchSplit, match=r"no split 'test'; it has \['train', 'validation'\]"):
        open_dataset(str(tmp_path), split="test")


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "[!r]un1"])
def test_a_folder_whose_name_is_a_pattern_is_the_one_given(tmp_path, name):
    pictures(tmp_path / name, "0.png")
    pictures(tmp_path / "run1", "0.png", "1.png")
    for made in (tmp_path / name, tmp_path / name / "tables"):
        if made.name == "tables":
            made.mkdir()
            digits()["test"].select(range(3)).to_parquet(made / "test.parquet")
        assert len(open_dataset(str(made), split="test" if made.name == "tables" else "train")) in (1, 3)


def test_links_to_folders_are_followed_once(tmp_path):
    pictures(tmp_path / "data", "0.png", "a/1.png", "a/2.png")
    pictures(tmp_path / "far", *(f"{i}.png" for i in range(12)))
    (tmp_path / "data" / "0_far").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "0_a").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path)
    found = open_dataset(str(tmp_path / "data"))
    expected = sorted(["0.png", "a/1.png", "a/2.png", *(f"0_far/{i}.png" for i in range(12))])
    assert names_of(found, tmp_path / "data") == expected
    assert source_of(found).left_out.startswith("3 links to a folder that is read already")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_are_pictures_by_suffix_or_content(tmp_path, streaming):
    pictures(tmp_path, "0.png")
    for form in ("AVIF", "QOI", "MPO"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"1.{form.lower()}", format=form)
    pictures(tmp_path, "2", "3.unknown", ".4.png")
    for name in ("LICENSE", "a.txt", "b.txt", "c.h5"):
        (tmp_path / name).write_text("no picture")
    found = open_dataset(str(tmp_path), streaming=streaming)
    assert names_of(found, tmp_path) == ["0.png", "1.avif", "1.mpo", "1.qoi", "2", "3.unknown"]
    assert (
        source_of(Images(found, ImageFormat((8, 8))).dataset if not streaming else found).left_out
        == "1 hidden, 1 not images (.h5), 2 not images (.txt), 1 not images (without suffix)"
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_gives_columns_and_files_beside_it_are_kept(tmp_path, kind):
    pictures(tmp_path, "a/x.png", "a/y.png", "a/z.png")
    rows = [{"file_name": "y.png", "age": 3}, {"file_name": "x.png", "age": 5}]
    text = "file_name,age\ny.png,3\nx.png,5\n" if kind == "csv" else "\n".join(map(json.dumps, rows))
    (tmp_path / "a" / f"metadata.{kind}").write_text(text)
    for name in (tmp_path, tmp_path / "a"):
        found = open_dataset(str(name))
        assert names_of(found, tmp_path) == ["a/y.png", "a/x.png", "a/z.png"] and found["age"][:] == [3, 5, None]
    one = open_dataset(str(tmp_path / "a" / f"metadata.{kind}"))
    assert names_of(one, tmp_path) == ["a/y.png", "a/x.png"] and one["age"][:] == [3, 5]


def test_metadata_that_names_files_elsewhere_raises(tmp_path):
    pictures(tmp_path, "x.png")
    for text, message in (("file_name\n../y.png", r"inside the folder .*got '../y.png'"), ("a\nb", "no column 'file")):
        (tmp_path / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_dataset(str(tmp_path))


def test_pictures_beside_tables_are_left_out(tmp_path):
    digits()["train"].select(range(5)).to_parquet(tmp_path / "data.parquet")
    pictures(tmp_path, "preview.png", "preview 2.png")
    found = open_dataset(str(tmp_path))
    assert len(found) == 5 and source_of(found).left_out == "2 pictures or arrays beside tables"


def test_tables_without_images_do_not_replace_pictures(tmp_path):
    datasets.Dataset.from_dict({"x": [1.0]}).to_parquet(tmp_path / "statistics.parquet")
    pictures(tmp_path, "0.png")
    assert names_of(open_dataset(str(tmp_path)), tmp_path) == ["0.png"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_bytes_in_a_table_without_features_are_images(tmp_path, as_dict, streaming):
    pictures(tmp_path, "0.png")
    data = (tmp_path / "0.png").read_bytes()
    rows = {"picture": [{"bytes": data, "path": "0.png"} if as_dict else data] * 2, "hash": [b"abc"] * 2}
    rows = {name: [None, *values] for name, values in rows.items()}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "data[1].parquet")
    found = open_dataset(str(tmp_path / "data[1].parquet"), streaming=streaming)
    assert find_column(found, datasets.Image, None, "image_column") == "picture"
    assert [row["picture"] and row["picture"].size for row in found] == [None, (8, 8), (8, 8)]


def test_a_single_file_in_the_home_folder_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stack = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    np.savez(tmp_path / "some.npz", stack)
    np.testing.assert_array_equal(
        Images(open_dataset("~/some.npz"), ImageFormat((8, 8)))[range(3)]["images"].permute(0, 2, 3, 1), stack
    )
    pictures(tmp_path, "pictures/0.png")
    assert len(open_dataset("~/pictures")) == 1
    (tmp_path / "some.txt").touch()
    with pytest.raises(ValueError, match=r"a data set of one file must be one of .parquet, .*some.txt"):
        open_dataset("~/some.txt")


def test_odd_entries_named_like_pictures_are_reported(tmp_path):
    pictures(tmp_path, "0.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    found = open_dataset(str(tmp_path))
    assert source_of(found).left_out == "1 folders named like a picture, 1 not a regular file"
    images = Images(found, ImageFormat((8, 8)))
    assert [images.describe(i) for i in images.broken()] == [str(tmp_path / "dangling.png")]


def test_a_file_with_new_content_is_checked_again(tmp_path):
    pictures(tmp_path, "0.png", "1.png")
    before = open_dataset(str(tmp_path))
    assert fingerprint(open_dataset(str(tmp_path))) == fingerprint(before)
    assert Images(before, ImageFormat((8, 8))).broken() == []
    (tmp_path / "1.png").write_bytes(b"broken")
    assert Images(open_dataset(str(tmp_path)), ImageFormat((8, 8))).broken() == [1]


@pytest.mark.parametrize("packed", ["zip", "tar"])
@pytest.mark.parametrize("inside", [False, True])
def test_archives_of_class_folders_have_the_classes(tmp_path, packed, inside):
    pictures(tmp_path / "data", "cat/0.png", "cat/1.png", "dog/0.png")
    (tmp_path / "data" / "LICENSE").write_text("free")
    (tmp_path / "out").mkdir()
    archive = shutil.make_archive(str(tmp_path / "out" / "data"), packed, tmp_path / "data")
    found = open_dataset(str(tmp_path / "out") if inside else archive)
    assert found.features["label"].names == ["cat", "dog"] and found["label"][:] == [0, 0, 1]
    assert source_of(found).left_out == "1 not images (without suffix)"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_archive_of_edm_has_its_labels(tmp_path, streaming):
    names = [f"0000{i % 2}/img{i}.png" for i in range(4)]
    pictures(tmp_path / "data", *names)
    for labels, expected in (([[name, 3 - i] for i, name in enumerate(names)], [3, 2, 1, 0]), (None, None)):
        (tmp_path / "data" / "dataset.json").write_text(json.dumps({"labels": labels}))
        archive = shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
        rows = list(open_dataset(archive, streaming=streaming))
        assert [row.get("label") for row in rows] == (expected or [None] * 4)
        assert expected is None or [row["image"].getpixel((0, 0)) for row in rows] == [0, 1, 2, 3]
        assert expected is not None or list(rows[0]) == ["image"]


def test_a_tar_file_of_webdataset_keeps_its_columns(tmp_path):
    pictures(tmp_path / "data", "a/0.png", "a/1.png")
    for i in range(2):
        (tmp_path / "data" / "a" / f"{i}.cls").write_text(str(i))
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in ("0.cls", "0.png", "1.cls", "1.png"):
            archive.add(tmp_path / "data" / "a" / name, name)
    found = open_dataset(str(tmp_path / "train.tar"))
    assert found["cls"][:] == [0, 1] and find_column(found, datasets.Image, None, "image_column") == "png"
