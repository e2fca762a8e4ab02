"""The lister finds every picture or array of a folder once, and counts what it leaves out."""

from collections import Counter

import numpy as np
from PIL import Image

from ddpm_hf.data.listing import (
    Entry,
    class_names,
    describe,
    is_image_bytes,
    is_picture,
    list_archives,
    list_images,
)
from tests.data.helpers import pack


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / name, format="PNG")


def test_hidden_folders_and_files_are_not_read(tmp_path):
    write(tmp_path, "a/0.png", ".hidden/1.png", "__MACOSX/2.png", "a/._0.png")
    found = list_images(tmp_path)
    assert [entry.name for entry in found.splits["train"]] == ["a/0.png"] and describe(found.left_out) == "1 hidden"


def test_a_file_is_stamped_with_its_size_and_time(tmp_path):
    write(tmp_path, "0.png")
    status = (tmp_path / "0.png").stat()
    entry = Entry("0.png", str(tmp_path / "0.png"), (status.st_size, status.st_mtime_ns))
    assert list_images(tmp_path).splits == {"train": [entry]}
    assert entry.read() == (tmp_path / "0.png").read_bytes()


def test_files_beside_another_are_named_in_folders_and_archives():
    for path in ("/x/a/0.png", "zip://a/0.png::/x/a/0.png.zip"):
        start, end = path.split("a/0.png", 1)
        entry = Entry("a/0.png", path)
        assert entry.ends == (start, end)
        assert (
            entry.beside("b/./1.png") == f"{start}a/b/1.png{end}" and entry.beside("../2.png") == f"{start}2.png{end}"
        )


def test_hidden_members_and_folders_around_an_archive_do_not_count(tmp_path):
    names = ("data/cat/0.png", "data/dog/1.png", "__MACOSX/data/cat/._0.png", "data/cat/.2.png", ".x/3.png")
    found = list_archives([pack(tmp_path / "data.zip", *names)])
    assert [entry.name for entry in found.splits["train"]] == ["data/cat/0.png", "data/dog/1.png"]
    assert class_names(found) == ["cat", "dog"] and describe(found.left_out) == "1 hidden"
    found = list_archives([pack(tmp_path / "x.tar", "x/train/cat/0.png", "x/test/dog/1.png", "x/LICENSE.png")])
    assert {split: len(part) for split, part in found.splits.items()} == {"train": 1, "test": 1}
    assert class_names(found) == ["cat", "dog"]
    found = list_archives(
        [pack(tmp_path / f"{name}.zip", f"{name}/0.png") for name in ("train", "test")], ["train", "test"]
    )
    assert class_names(found) is None and list(found.splits) == ["train", "test"]
    assert class_names(list_archives([pack(tmp_path / f"{name}.zip", f"{name}/0.png") for name in "ab"])) == ["a", "b"]


def test_archives_are_of_their_splits(tmp_path):
    files = [pack(tmp_path / f"{i}.tar", "cat/0.png", f"dog/{i}.png") for i in range(2)]
    found = list_archives(files, ["train", "validation"])
    assert {split: [entry.name for entry in part] for split, part in found.splits.items()} == {
        "train": ["cat/0.png", "dog/0.png"],
        "validation": ["cat/0.png", "dog/1.png"],
    }
    assert len(list_archives(files).splits["train"]) == 4


def test_folders_at_several_depths_are_no_classes(tmp_path):
    write(tmp_path, "a/0.png", "b/c/1.png")
    assert class_names(list_images(tmp_path)) is None
    write(tmp_path, "b/2.png")
    (tmp_path / "b" / "c" / "1.png").unlink()
    assert class_names(list_images(tmp_path)) == ["a", "b"]


def test_pictures_and_arrays_are_recognized_by_content(tmp_path):
    write(tmp_path, "0")
    np.save(tmp_path / "1.npy", np.zeros((2, 2), np.uint8))
    (tmp_path / "2").write_bytes(bytes(range(256)))
    assert is_picture(tmp_path / "0") and not is_picture(tmp_path / "2")
    assert [is_image_bytes((tmp_path / name).read_bytes()) for name in ("0", "1.npy", "2")] == [True, True, False]
    assert not is_image_bytes("text") and not is_image_bytes(None)


def test_reasons_are_described_with_their_numbers():
    assert describe(Counter({"hidden": 1200, "arrays": 1})) == "1 arrays, 1,200 hidden" and describe(Counter()) == ""
