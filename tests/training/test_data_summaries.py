"""The summary of a run says what was found in every kind of data, or an error says what to do."""

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from accelerate import Accelerator
from PIL import Image

from ddpm_hf.data.builtin import digits
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import open_images
from ddpm_hf.training.run_summary import describe_data, describe_run
from tests.conftest import TINY_TRAINING, flags
from tests.data.helpers import pack, picture

TINY = flags(**TINY_TRAINING, channels=1, resolution=8)


def write(folder: Path, *names: str, form: str = "PNG", **texts: str | bytes) -> Path:
    """Pictures of these names, and other files."""
    files = {name: picture(i % 256, form) for i, name in enumerate(names)}
    for name, content in (files | texts).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def parquet(file: Path, **columns) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), file)
    return file


def saved(folder: Path, features=None, **columns) -> Path:
    datasets.Dataset.from_dict(columns, features=features and datasets.Features(features)).save_to_disk(folder)
    return folder


ENTRY = {"bytes": picture(), "path": None}
SAMPLES = {
    f"{i}.{suffix}": text for i in range(3) for suffix, text in (("json", json.dumps({"a": {"b": "xy"[i % 2]}})),)
}
NUMBERS = {f"{i}.cls": str(i % 2) for i in range(3)}
CLASS_FOLDERS = ("cat/0.png", "cat/1.png", "dog/0.png")


def linked(folder: Path) -> Path:
    write(folder / "data", "0.png", "1.png", "2.png"), write(folder / "far", *(f"{i}.png" for i in range(12)))
    (folder / "data" / "more").symlink_to(folder / "far")
    (folder / "far" / "loop").symlink_to(folder / "data")
    return folder / "data"


def odd_entries(folder: Path) -> Path:
    write(folder, "0.png", "1.png")
    os.mkfifo(folder / "pipe.png"), (folder / "folder.png").mkdir(), (folder / "nothing.png").symlink_to("/nowhere")
    return folder


def deep(folder: Path) -> Path:
    for i in range(2):
        Image.fromarray(np.full((8, 8), 4000 + i, np.uint16)).save(folder / f"{i}.png")
    return folder


def stack(file: Path) -> Path:
    np.savez(file, np.zeros((4, 8, 8, 1), np.uint8))
    return file


def save_array(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir()
        np.save(folder / name / "0.npy", np.zeros((8, 8, 1), np.uint8))
    return folder


def digits_in(file: Path, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    digits()["test"].select(range(6)).to_parquet(file)
    return file


def latin(folder: Path) -> Path:
    write(folder, "0.png")
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.png"), "wb") as file:
        file.write(picture())
    return folder


ODD_NAMES = ("a b.png", 'it\'s "q".png', "100%25.png", "ünï.png", "line\nbreak.png", "a::b.png", "[x]*?.png", "#.png")

# What is opened in a folder, options, and what the summary says.
FOUND = {
    "built in": (lambda f: "digits", [], ["1,437 images", "Found       built in; splits train, test", "10 in the column"]),
    "split names": (lambda f: write(f, *(f"{i}.png" for i in range(11)), "train.png"), [], ["12 images", "of pictures\n"]),
    "bus, train, car": (lambda f: write(f, "bus/0.png", "train/0.png", "car/0.png"), [], ["3 in the column 'label': bus, car, train"]),
    "brackets": (lambda f: (write(f / "run1", "0.png"), write(f / "run[1]", "0.png", "1.png"))[1], [], ["2 images"]),
    "links": (linked, [], ["15 images", "Left out    1 links to a folder"]),
    "formats": (lambda f: write(write(f, "0.png"), "1.avif", form="AVIF"), [], ["2 images"]),
    "no suffix": (lambda f: write(f, "0.png", "1", LICENSE="free"), [], ["2 images", "Left out    1 not images (without suffix)"]),
    "metadata": (lambda f: write(f, "0.png", "1.png", "2.png", **{"metadata.csv": "file_name,label\n0.png,x\n1.png,y\n"}), [], ["3 images", "with metadata.csv"]),
    "parquet and preview": (lambda f: digits_in(write(f, "preview.png") / "test.parquet").parent, ["--split", "test"], ["6 images", "a .parquet file", "Left out    1 pictures or arrays beside tables"]),
    "EDM": (lambda f: pack(f / "edm.zip", "0/a.png", "0/b.png", LICENSE="x", **{"dataset.json": '{"labels": [["0/a.png", 1], ["0/b.png", 0]]}'}), ["--label_column", "label"], ["2 images", "a .zip file of pictures with dataset.json", "Left out    1 not images"]),
    "zip of classes": (lambda f: pack(f / "a.zip", *CLASS_FOLDERS, LICENSE="x"), [], ["3 images", "a .zip file of pictures in 2 folders of classes", "cat, dog"]),
    "tar of classes": (lambda f: pack(f / "a.tar", *(f"./{name}" for name in CLASS_FOLDERS)), [], ["3 images", "a .tar file", "cat, dog"]),
    "bytes": (lambda f: parquet(f / "a.parquet", picture=[picture(), picture()]), [], ["2 images"]),
    "entries": (lambda f: parquet(f / "a.parquet", picture=[ENTRY, ENTRY]), [], ["2 images"]),
    ".parquet": (lambda f: digits_in(f / "a.parquet"), ["--label_column", "label"], ["6 images", "10 in the column 'label': 0, 1, 2"]),
    ".npz": (lambda f: stack(f / "a.npz"), [], ["4 images", "a .npz file of images"]),
    ".csv": (lambda f: write(f, "0.png", "1.png", **{"a.csv": "file_name\n0.png\n"}) / "a.csv", [], ["1 images", "a .csv file"]),
    "null": (lambda f: parquet(f / "a.parquet", picture=[ENTRY, None]), ["--skip_broken_images"], ["1 images"]),
    "odd entries": (odd_entries, ["--skip_broken_images"], ["2 images", "1 folders named like a picture, 1 not a regular file"]),
    "arrays": (save_array, [], ["2 images", "of arrays in 2 folders of classes", "a, b"]),
    "16 bits": (deep, [], ["Values      4000 to 4001 in images of more than 8 bits"]),
    # Neighbors.
    "odd names": (lambda f: write(f, *ODD_NAMES), [], ["8 images"]),
    "odd names in a zip": (lambda f: pack(f / "a::b%20 [1].zip", *ODD_NAMES), [], ["8 images"]),
    "odd names in a tar": (lambda f: pack(f / "a b.tar", *ODD_NAMES), [], ["8 images"]),
    "upper case": (lambda f: write(write(f, "0.PNG"), "1.JPEG", "2.JfIf", form="JPEG"), [], ["3 images"]),
    "not Unicode": (latin, [], ["1 images", "Left out    1 names that are not Unicode"]),
    "nested classes": (lambda f: write(f, "animals/cat/0.png", "animals/dog/0.png", "cars/bus/0.png"), [], ["3 in the column 'label': bus, cat, dog"]),
    "classes in splits": (lambda f: write(f, "train/a/0.png", "test/b/0.png", "x.png"), [], ["1 images", "splits train, test", "2 in the column", "1 beside the folders"]),
    "an empty class": (lambda f: ((write(f, *CLASS_FOLDERS) / "empty").mkdir(), f)[1], [], ["2 in the column 'label': cat, dog"]),
    "one image": (lambda f: write(f, "0.png"), [], ["1 images", "a folder of pictures\n"]),
    "parquet below": (lambda f: (digits_in(f / "x" / "0.parquet"), digits_in(f / "y" / "0.parquet"), f)[2], [], ["12 images", "2 .parquet files"]),
    "two image columns": (lambda f: saved(f / "s", {"a": datasets.Image(), "b": datasets.Image()}, a=[ENTRY], b=[ENTRY]), ["--image_column", "b"], ["1 images", "a folder of save_to_disk"]),
    "arrays saved": (lambda f: saved(f / "s", {"x": datasets.Array3D((8, 8, 1), "uint8")}, x=[np.zeros((8, 8, 1), np.uint8)]), [], ["1 images"]),
    "nested lists": (lambda f: saved(f / "s", {"x": datasets.List(datasets.List(datasets.Value("uint8")))}, x=[[[0] * 8] * 8]), [], ["1 images"]),
    "absolute names": (lambda f: write(f, "0.png", **{"metadata.csv": f"file_name,label\n{f}/0.png,x\n"}), [], ["1 images"]),
    "a list of files": (lambda f: write(f / "l", **{"a.csv": f"file_name\n{write(f / 'far', '0.png')}/0.png\n../far/0.png\n"}) / "a.csv", [], ["2 images"]),
    "Windows names": (lambda f: write(f, "a/0.png", **{"metadata.csv": "file_name,label\r\na\\0.png,x\r\n"}), [], ["1 images"]),
    "byte order mark": (lambda f: write(f, "0.png", **{"metadata.jsonl": '\ufeff{"file_name": "0.png", "label": "x"}\n'}), ["--label_column", "label"], ["1 in the column 'label': x"]),
    "semicolons": (lambda f: write(f, "0.png", "1.png", **{"metadata.csv": '\ufeff"file_name"; label\n0.png; b\n1.png; a\n'}), ["--label_column", "label"], ["2 in the column 'label': a, b"]),
    "truth values": (lambda f: write(f, "0.png", "1.png", **{"metadata.jsonl": '{"file_name": "0.png", "l": true}\n{"file_name": "1.png", "l": false}'}), ["--label_column", "l"], ["2 in the column 'l': False, True"]),
    "names of digits": (lambda f: write(f, "001", "002", **{"metadata.csv": "file_name,label\n001,NA\n002,none\n"}), ["--label_column", "label"], ["2 in the column 'label': NA, none"]),
    "words in parquet": (lambda f: parquet(f / "a.parquet", x=[ENTRY] * 3, kind=["b", "a", "b"]), ["--label_column", "kind"], ["2 in the column 'kind': a, b"]),
    "fields in parquet": (lambda f: parquet(f / "a.parquet", x=[ENTRY] * 2, json=[{"a": {"b": "y"}}, {"a": {"b": "x"}}]), ["--label_column", "json.a.b"], ["2 in the column 'json.a.b': x, y"]),
    "WebDataset": (lambda f: pack(f / "a.tar", "0.png", "1.png", "2.png", **NUMBERS), ["--label_column", "cls"], ["3 images", "a .tar file of WebDataset"]),
    "WebDataset of JSON": (lambda f: pack(f / "a.tar", "0.png", "1.jpg", "2.png", **SAMPLES), ["--label_column", "json.a.b"], ["3 images", "2 in the column 'json.a.b': x, y"]),
    "WebDataset shards": (lambda f: (pack(f / "train-0.tar", "0.png", **{"0.cls": "b"}), pack(f / "test-1.tar", "0.png", **{"0.cls": "a"}), f)[2], ["--label_column", "cls"], ["1 images", "splits train, test", "2 .tar files of WebDataset", "a, b"]),
    "two archives": (lambda f: (pack(f / "train.zip", "cat/0.png", "dog/0.png"), pack(f / "test.zip", "cow/0.png"), f)[2], [], ["2 images", "splits train, test", "2 .zip files", "cat, cow, dog"]),
    "two parts": (lambda f: (pack(f / "part1.tar", *CLASS_FOLDERS), pack(f / "part2.tar", *CLASS_FOLDERS), f)[2], [], ["6 images", "2 .tar files", "cat, dog"]),
    "folders around": (lambda f: (pack(f / "train.zip", "train/0.png", "train/1.png"), pack(f / "test.zip", "test/2.png"), f)[2], [], ["2 images", "splits train, test", "of pictures;"]),
    "archives of classes": (lambda f: (pack(f / "cat.zip", "cat/0.png"), pack(f / "dog.tar", "dog/0.png"), f)[2], [], ["2 images", "2 .tar/.zip files", "cat, dog"]),
    "an empty shard": (lambda f: (digits_in(f / "0.parquet"), digits()["test"].select([]).to_parquet(f / "1.parquet"), f)[2], [], ["6 images"]),
    "metadata names a pipe": (lambda f: (os.mkfifo(f / "p"), write(f, "0.png", **{"metadata.csv": "file_name\n0.png\np\n"}))[1], ["--skip_broken_images"], ["1 images"]),
    "zip with metadata": (lambda f: pack(f / "a.zip", "x/0.png", "x/1.png", **{"x/metadata.csv": "file_name,l\n1.png,b\n0.png,a\n"}), ["--label_column", "l"], ["2 images", "a, b"]),
}  # fmt: skip

# What is opened in a folder, options, and what the error says.
REFUSED = {
    "packed": (lambda f: (shutil.make_archive(str(f / "a"), "gztar", write(f / "x", "0.txt")), f)[1], [], r"it has 1 not images \(.gz\).*Unpack the archive"),
    "a table in a zip": (lambda f: pack(f / "a.zip", **{"a.parquet": b"x"}), [], "Unpack the archive"),
    "an empty table": (lambda f: parquet(f / "a.parquet", x=pa.array([], pa.binary())), [], "a.parquet has no rows"),
    "only metadata": (lambda f: write(f, **{"metadata.csv": "file_name\n0.png"}), [], "1 of 1 images cannot be read"),
    "another encoding": (lambda f: write(f, "0.png", **{"metadata.csv": "file_name,l\n0.png,é".encode("latin1")}), [], "metadata.csv cannot be read: it is not text in UTF-8"),
    "longer rows": (lambda f: write(f, "0.png", **{"metadata.csv": "file_name,l\n0.png,a,b"}), [], "metadata.csv cannot be read: .*Length of header"),
    "a device": (lambda f: "/dev/zero", [], "must be a folder or a file, and '/dev/zero' is neither"),
    "a named pipe": (lambda f: (os.mkfifo(f / "a.png"), f / "a.png")[1], [], "must be a folder or a file"),
    "two columns": (lambda f: saved(f / "s", {"a": datasets.Image(), "b": datasets.Image()}, a=[ENTRY], b=[ENTRY]), [], r"image_column must be one of \['a', 'b'\]"),
    "lists of images": (lambda f: saved(f / "s", {"a": datasets.List(datasets.Image())}, a=[[ENTRY]]), [], r"the columns \['a'\] hold lists of images; make one row of each"),
    "no image": (lambda f: write(f, **{"a.txt": "x"}), [], "holds no image .*it has 1 not images"),
    "no column": (lambda f: parquet(f / "a.parquet", x=[1]), [], r"image_column must be one of \[\], .*x \(int64\)"),
    "integers": (lambda f: saved(f / "s", x=[[[0] * 8] * 8]), [], "must be uint8 or uint16, got int64"),
    "a folder outside": (lambda f: write(f, "0.png", **{"metadata.csv": "file_name\n/etc/0.png"}), [], "file_name must be a path inside"),
    "an empty zip": (lambda f: pack(f / "a.zip"), [], "a.zip' holds no image"),
    "a text": (lambda f: write(f, **{"a.txt": "x"}) / "a.txt", [], "must be one of .parquet"),
    "compressed": (lambda f: shutil.make_archive(str(f / "a"), "gztar", write(f / "x", "0.png")), [], "one of .*a.tar.gz"),
    "missing files": (lambda f: write(f, "0.png", **{"metadata.csv": "file_name\n1.png"}), [], "1 of 2 images cannot be read:\n.*1.png: .*No such file"),
    "captions": (lambda f: write(f, "0.png", **{"metadata.csv": "file_name,l\n0.png,"}), ["--label_column", "l"], "must be integers"),
    "labels missing": (lambda f: write(f, "0.png", "1.png", **{"metadata.csv": "file_name,l\n0.png,x"}), ["--label_column", "l"], "must be integers .*None"),
}  # fmt: skip


def summary(source, options) -> str:
    config = parse_config([*TINY, "--dataset", str(source), *options])
    images, _ = open_images(config)
    data = describe_data(images)
    return describe_run(config, Accelerator(cpu=True), (1000, 1000), (images.num_examples, 0), 0, data)


@pytest.mark.parametrize("name", FOUND)
def test_the_summary_says_what_was_found(tmp_path, name):
    make, options, expected = FOUND[name]
    text = summary(make(tmp_path), options)
    assert not [part for part in expected if part not in text], text


@pytest.mark.parametrize("name", FOUND)
def test_the_summary_of_a_stream_says_what_was_found(tmp_path, name):
    make, options, expected = FOUND[name]
    text = summary(make(tmp_path), [*options, "--streaming"])
    known = [part for part in expected if not part.endswith(" images") and not part.startswith("Values")]
    assert not [part for part in known if part not in text] and "a stream of images" in text, text


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path, name):
    make, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        summary(make(tmp_path), options)
