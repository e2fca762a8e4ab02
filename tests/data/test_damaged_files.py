"""Damaged lists, tables and archives are read, or refused in a sentence that names the file."""

import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages, read_rows
from tests.data.helpers import pack, picture
from tests.data.test_decoding import damaged, npy, npz

DAMAGES = 80


def content(folder, name: str) -> bytes:
    """A sound file of this name."""
    rows = {"file_name": ["0.png", "1.png"], "label": ["x", "y"]}
    lines = [dict(zip(rows, row)) for row in zip(*rows.values())]
    entries = {"image": [{"bytes": picture(i), "path": None} for i in range(3)], "label": ["a", "b", "a"]}
    files = ("c/0.png", "c/1.png", "d/0.png")
    match name:
        case "metadata.csv":
            return b"file_name,label\n0.png,x\n1.png,y\n"
        case "metadata.jsonl":
            return "\n".join(map(json.dumps, lines)).encode()
        case "dataset.json":
            return json.dumps({"labels": [["0.png", 0], ["1.png", 1]]}).encode()
        case "metadata.parquet" | "a.parquet":
            pa.parquet.write_table(pa.table(rows if name == "metadata.parquet" else entries), folder / name)
        case "a.arrow" | "state.json" | "dataset_info.json":
            datasets.Dataset.from_dict(entries | {"label": [0, 1, 0]}).save_to_disk(folder / "saved")
            return next((folder / "saved").glob(f"*{name[1:]}")).read_bytes()
        case "a.zip" | "a.tar":
            pack(folder / name, *files, **{"c/metadata.csv": "file_name,label\n0.png,x\n1.png,y\n"})
        case "classes.zip" | "classes.tar":
            pack(folder / name, *files, LICENSE="free")
        case "webdataset.tar":
            pack(folder / name, "0.png", "1.png", **{f"{i}.json": json.dumps({"label": "xy"[i]}) for i in range(2)})
        case "a.npz":
            return npz(np.zeros((3, 8, 8, 1), np.uint8))
        case "a.npy":
            return npy(np.zeros((3, 8, 8, 1), np.uint8))
    return (folder / name).read_bytes()


NAMES = ["metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json", "a.parquet", "a.arrow", "state.json"]
NAMES += ["dataset_info.json", "a.zip", "a.tar", "classes.zip", "classes.tar", "webdataset.tar", "a.npz", "a.npy"]


def read_everything(source: str, label: str, streaming: bool) -> None:
    found = open_dataset(source, streaming=streaming, label_column=label)
    label = label if label in (found.features or {}) else None
    if not streaming:
        images = Images(found, ImageFormat((8, 8), 1), label_column=label)
        images.broken()
        return
    images = StreamedImages(found, ImageFormat((8, 8), 1), label_column=label)
    for row in read_rows(images.dataset):
        try:
            images.decode(row[images.image_column])
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_damaged_file_is_read_or_named(tmp_path, name, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    sound, random, messages = content(tmp_path, name), np.random.default_rng(len(name) + streaming), []
    folder = tmp_path / ("saved" if name.endswith(("state.json", "info.json")) else "data")
    folder.mkdir(exist_ok=True)
    if name.startswith(("metadata", "dataset.")):
        for i in range(2):
            (folder / f"{i}.png").write_bytes(picture(i))
    for i in range(DAMAGES):
        (folder / name).write_bytes(damaged(sound, random) if i else sound)
        source = folder / name if name.startswith(("a.", "classes", "web")) and i % 2 else folder
        try:
            read_everything(str(source), "json.label" if name == "webdataset.tar" else "label", streaming)
        except ValueError as error:
            messages.append(str(error))
            named = (name, str(folder), "the stream", "column")
            assert "\n" not in messages[-1] and any(word in messages[-1] for word in named), messages[-1]
            assert i, messages[-1]  # the sound file is read
