"""A stream is shared among processes, shuffled and resumed exactly, without broken and validation images."""

import gc
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.data.builtin import digits
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages, StreamError
from tests.data.test_decoding import png
from tests.hub import HubServer

EXAMPLES = 90


def parquet(dataset: datasets.Dataset) -> bytes:
    stream = io.BytesIO()
    dataset.to_parquet(stream)
    return stream.getvalue()


def parquet_files(shards: int) -> dict[str, bytes]:
    """Some digits as a repository has them."""
    some = digits()["train"].select(range(EXAMPLES))
    names = [f"data/train-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]
    return {name: parquet(some.shard(shards, i)) for i, name in enumerate(names)}


def write(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same digits in five files and in one."""
    return {shards: write(parquet_files(shards), tmp_path_factory.mktemp(f"{shards}_files")) for shards in (5, 1)}


def stream(folder, **options):
    source = open_dataset(str(folder), streaming=True)
    return StreamedImages(source, ImageFormat((8, 8), 1), **({"shuffle_buffer": 32, "label_column": "label"} | options))


def batches(images, steps=12, first_step=0, rank=0, processes=1, **options):
    return MicroBatches(images, 12, 7, first_step, steps, rank, processes, **options)


def keys(found) -> list[bytes]:
    """What tells one image from another, in order."""
    return [image.numpy().tobytes() for batch in found for image in batch["images"]]


def every_image(folder) -> Counter:
    return Counter(keys([Images(open_dataset(str(folder)), ImageFormat((8, 8), 1))[range(EXAMPLES)]]))


def test_conditions_of_a_stream_are_batched_and_checked_at_its_start(tmp_path):
    some = digits()["train"].select(range(EXAMPLES)).remove_columns("label")
    vectors = np.random.default_rng(0).random((EXAMPLES, 3)).tolist()
    some.add_column("label", vectors).to_parquet(tmp_path / "train.parquet")
    images = stream(tmp_path)
    images.check_conditions(3)
    torch.testing.assert_close(images.first_labels(5), torch.tensor(vectors[:5]))
    by_image = dict(zip(keys([Images(open_dataset(str(tmp_path)), ImageFormat((8, 8), 1))[range(EXAMPLES)]]), vectors))
    for batch in batches(images, steps=3):
        expected = torch.tensor([by_image[key] for key in keys([batch])])
        torch.testing.assert_close(batch["labels"], expected)
    with pytest.raises(ValueError, match="must be finite numbers, got 3: "):
        images.check_conditions(None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_vector_of_another_length_later_in_a_stream_ends_the_run(tmp_path, num_workers):
    some = digits()["train"].select(range(EXAMPLES)).remove_columns("label")
    some.add_column("label", [[0.5] * (2 if i == 80 else 3) for i in range(EXAMPLES)]).to_parquet(
        tmp_path / "a.parquet"
    )
    images = stream(tmp_path)
    images.check_conditions(3)
    with pytest.raises(
        StreamError, match="labels in the column 'label' do not fit together: expected sequence of length"
    ):
        list(batches(images, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("wrong", [2, -1, None, 1.0])
def test_a_label_that_is_no_class_ends_the_run(tmp_path, wrong, num_workers):
    """Label 2 of 2 classes would train the null class."""
    some = digits()["train"].select(range(EXAMPLES)).remove_columns("label")
    labels = [float(i % 2) if isinstance(wrong, float) else i % 2 for i in range(EXAMPLES)]
    labels[80] = wrong
    some.add_column("label", labels).to_parquet(tmp_path / "a.parquet")
    images = stream(tmp_path)
    images.check_labels(2)
    with pytest.raises(
        StreamError, match=r"labels in the column 'label' must be integers in 0..num_classes−1 = 1, got"
    ):
        list(batches(images, num_workers=num_workers))


@pytest.mark.parametrize("shards", [5, 1])
@pytest.mark.parametrize("lanes", [1, 3])
def test_every_epoch_of_a_lane_has_its_images_once(folders, shards, lanes):
    found = keys(batches(stream(folders[shards], num_lanes=lanes), steps=60))
    everything = every_image(folders[shards])
    by_lane = [[found[i] for i in range(len(found)) if i % 12 // (12 // lanes) == lane] for lane in range(lanes)]
    assert sum((Counter(set(lane)) for lane in by_lane), Counter()) == everything  # each image is of one lane
    for lane in by_lane:
        size = len(set(lane))
        epochs = [lane[i : i + size] for i in range(0, len(lane) - size + 1, size)]
        assert len(epochs) >= 4 and all(set(epoch) == set(lane) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_an_epoch_is_shuffled_within_the_buffer_and_across_files(folders):
    order = [image for image in keys([Images(open_dataset(str(folders[5])), ImageFormat((8, 8), 1))[range(EXAMPLES)]])]
    epochs = [[order.index(k) for k in keys(batches(stream(folders[5], shuffle_buffer=b), steps=7))] for b in (1, 32)]
    unshuffled, shuffled = epochs
    # Without a buffer the files' order alone is random: 18 digits of a file follow each other.
    assert sum(b - a == 1 for a, b in zip(unshuffled, unshuffled[1:])) >= 84 - 6 and unshuffled != sorted(unshuffled)
    assert sum(b - a == 1 for a, b in zip(shuffled, shuffled[1:])) < 10


def test_labels_stay_with_their_images(folders):
    every = keys([Images(open_dataset(str(folders[5])), ImageFormat((8, 8), 1))[range(EXAMPLES)]])
    label = dict(zip(every, digits()["train"]["label"]))
    assert len(every) == EXAMPLES
    for batch in batches(stream(folders[5])):
        assert [label[k] for k in keys([batch])] == batch["labels"].tolist()


@pytest.mark.parametrize("shards", [5, 1])
def test_batches_are_the_same_on_any_processes_and_micro_batches(folders, shards):
    images = stream(folders[shards], num_lanes=4)
    one = [keys([batch]) for batch in batches(images)]
    for processes, parts in ((2, 1), (4, 3), (1, 4)):
        shares = [list(batches(images, rank=r, processes=processes, micro_batches=parts)) for r in range(processes)]
        for step in range(12):
            assert sum((keys(share[step * parts : (step + 1) * parts]) for share in shares), []) == one[step]


@pytest.mark.parametrize(("shards", "lanes"), [(5, 2), (1, 2), (5, 1)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumes_exactly_with_and_without_workers(folders, shards, lanes, workers):
    images = stream(folders[shards], num_lanes=lanes)
    straight = keys(batches(images, steps=20))
    for stop in (1, 5, 8, 13):
        before = batches(images, steps=20, num_workers=workers)
        done = keys(islice(before, stop))
        state = json.loads(json.dumps(before.gather_state(list)))
        after = batches(images, steps=20, first_step=stop, state=state, num_workers=workers)
        assert done + keys(after) == straight


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_words_as_labels_resumes_exactly(tmp_path, workers):
    some = digits()["train"].select(range(EXAMPLES))
    words = [f"class {label}" for label in some["label"]]
    rows = some.remove_columns("label").add_column("info", [{"kind": {"word": word}} for word in words])
    for i in range(3):
        rows.shard(3, i).to_parquet(tmp_path / f"{i}.parquet")
    source = open_dataset(str(tmp_path), streaming=True, label_column="info.kind.word")
    images = StreamedImages(source, ImageFormat((8, 8), 1), label_column="info.kind.word", shuffle_buffer=32)
    assert images.class_names == sorted(set(words))
    label = dict(zip(keys([Images(some, ImageFormat((8, 8), 1))[range(EXAMPLES)]]), some["label"]))
    straight = [(key, n) for batch in batches(images) for key, n in zip(keys([batch]), batch["labels"].tolist())]
    assert all(label[key] == n for key, n in straight)
    before = batches(images, num_workers=workers)
    done = keys(islice(before, 5))
    state = json.loads(json.dumps(before.gather_state(list)))
    after = batches(images, first_step=5, state=state, num_workers=workers)
    assert done + keys(after) == [key for key, _ in straight]


def test_a_stream_resumes_on_two_processes_with_its_number_of_lanes(folders):
    straight = keys(batches(stream(folders[5], num_lanes=2)))
    before = batches(stream(folders[5], num_lanes=2))
    done, state = keys(islice(before, 4)), before.gather_state(list)
    images = stream(folders[5])  # no number given: that of the run
    shares = [list(batches(images, first_step=4, rank=r, processes=2, state=state)) for r in (0, 1)]
    assert done + [key for pair in zip(*shares) for key in keys(pair)] == straight
    with pytest.raises(ValueError, match="stream_lanes = 4, but the run to resume has 2"):
        batches(stream(folders[5], num_lanes=4), first_step=4, state=state)


def test_lanes_that_cannot_be_shared_evenly_raise(folders):
    with pytest.raises(ValueError, match="stream_lanes = 3 must be a multiple of the 2 processes"):
        batches(stream(folders[5], num_lanes=3), processes=2)
    with pytest.raises(ValueError, match="stream_lanes = 5 .*divide the batch of 12"):
        batches(stream(folders[5], num_lanes=5))


def test_resuming_rereads_the_unfinished_block_only(folders, monkeypatch):
    """The state says where the block starts, so that no earlier epoch is read again."""
    images = stream(folders[5], shuffle_buffer=16)
    before = batches(images, steps=100)
    keys(islice(before, 90))
    reads = []
    monkeypatch.setattr(StreamedImages, "is_validation", lambda *_: reads.append(1))
    resumed = batches(images, steps=100, first_step=90, state=before.gather_state(list))
    next(resumed)
    assert len(reads) <= 3 * 16 + 12


def test_validation_images_are_those_of_the_set_and_not_trained_on(folders):
    whole = Images(open_dataset(str(folders[5])), ImageFormat((8, 8), 1))
    validation = whole.split_validation(0.2)
    images = stream(folders[5])
    streamed = images.split_validation(0.2)
    expected = Counter(keys([validation[range(len(validation))]]))
    assert Counter(keys([streamed[range(len(streamed))]])) == expected and 5 <= len(validation) <= 35
    trained = set(keys(batches(images, steps=30)))
    assert trained == set(every_image(folders[5])) - set(expected)


@pytest.fixture
def with_broken(tmp_path):
    for i, row in enumerate(digits()["train"].select(range(30))):
        row["image"].save(tmp_path / f"{i:02d}.png")
    (tmp_path / "17.png").write_bytes((tmp_path / "17.png").read_bytes()[:60])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_can_be_skipped(with_broken, workers, caplog):
    images = stream(with_broken, label_column=None)
    images.validation_fraction = 0.01
    with pytest.raises(ValueError, match="cannot be read: .*17.png.*--skip_broken_images"):
        keys(batches(images, num_workers=workers))
    images.skip_broken = True
    found = keys(batches(images, num_workers=workers))
    assert len(found) == 144 and len(set(found)) in (28, 29)
    assert workers or "17.png" in caplog.text


def test_images_of_a_folder_are_streamed_with_their_labels(tmp_path):
    for name, split in zip(("a", "b"), (range(6), range(6, 12))):
        (tmp_path / name).mkdir()
        for i in split:
            Image.fromarray(np.full((10, 20, 3), 20 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    images = StreamedImages(open_dataset(str(tmp_path), streaming=True), ImageFormat((8, 8), 3), label_column="label")
    batch = next(batches(images))
    assert sorted(batch["images"][:, 0, 0, 0].tolist()) == [20 * i for i in range(12)]
    assert all((value >= 120) == label for value, label in zip(batch["images"][:, 0, 0, 0], batch["labels"]))


@pytest.mark.parametrize("workers", [0, 1])
def test_losses_of_a_stream_are_said_once_at_its_first_image(tmp_path, workers, caplog):
    gray = np.linspace(100, 4000, 64).round().astype(np.uint16).reshape(8, 8)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(np.stack([gray] * 3, -1), 2))
        Image.fromarray(gray).save(tmp_path / f"{i} gray.png")
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i} profiled.png", icc_profile=b"no profile")
    source = open_dataset(str(tmp_path), streaming=True)
    run = batches(StreamedImages(source, ImageFormat((8, 8), 1), shuffle_buffer=4), steps=9, num_workers=workers)
    with caplog.at_level("WARNING"):
        next(run)
        first = len(caplog.messages)
        list(run)
    assert first >= 1 and len(caplog.messages) == 3
    for part in ("Some color images have 16 bits", "Some images have a color profile", "from 100 to 4000"):
        (message,) = [text for text in caplog.messages if part in text]
        assert str(tmp_path) in message


def test_a_damaged_part_of_a_stream_ends_the_run_with_its_number(folders, tmp_path):
    files = sorted(folders[5].rglob("*.parquet"))
    for i, name in enumerate(files):
        data = name.read_bytes()
        (tmp_path / name.name).write_bytes(data if i != 2 else data[:4] + bytes(2000) + data[2004:])
    with pytest.raises(StreamError, match="part 3 of 5 of the stream cannot be read: "):
        list(batches(stream(tmp_path, label_column=None), steps=30))
    with pytest.raises(ValueError, match="the stream cannot be read: "):
        stream(tmp_path, label_column=None).split_validation(0.9)


def test_numbers_of_classes_that_are_known_need_not_be_given(folders, tmp_path):
    rows = digits()["train"].select(range(EXAMPLES)).cast_column("label", datasets.Value("int64"))
    rows.to_parquet(tmp_path / "a.parquet")
    source = open_dataset(str(tmp_path), streaming=True, label_column="label")
    assert StreamedImages(source, ImageFormat((8, 8), 1), label_column="label").count_classes() == 10
    with pytest.raises(ValueError, match="num_classes must be given"):
        stream(tmp_path).count_classes()


CLIENT = """
import json, sys, torch
from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages

def keys(found):
    return [image.numpy().tobytes().hex() for batch in found for image in batch["images"]]

name, old = "user/digits", sys.argv[1]
out = {"plain": keys([(i := Images(open_dataset(name), ImageFormat((8, 8), 1)))[range(len(i))]])}
out["old"] = len(open_dataset(name, revision=old))
images = StreamedImages(open_dataset(name, streaming=True), ImageFormat((8, 8), 1), shuffle_buffer=32)
out["resolved at old"] = sum(1 for _ in open_dataset(name, revision=old, streaming=True))
for workers in (0, 1):
    first = MicroBatches(images, 12, 7, 0, 15, num_workers=workers)
    done = keys(next(first) for _ in range(6))
    state = first.gather_state(list)
    out[f"stopped {workers}"] = done + keys(MicroBatches(images, 12, 7, 6, 15, num_workers=workers, state=state))
out["straight"] = keys(MicroBatches(images, 12, 7, 0, 15))
out["errors"] = []
for wrong in ({"name": "user/nothing"}, {"name": name, "revision": "v9"}, {"name": name, "split": "test", "streaming": True}):
    try:
        open_dataset(**wrong)
    except ValueError as error:
        out["errors"].append(str(error))
print(json.dumps(out))
"""


def test_a_data_set_on_the_hub_is_read_by_revision_and_streamed(tmp_path, folders):
    with HubServer() as hub:
        hub.add_user("user")
        few = parquet(digits()["train"].select(range(10)))
        repo = hub.add_repo("user/digits", {"data/train-00000-of-00001.parquet": few}, kind="datasets")
        old = repo.at("main").oid
        repo.add(parquet_files(1))
        online = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }
        command = [sys.executable, "-c", CLIENT, old]
        done = subprocess.run(command, env={**os.environ, **online}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert Counter(bytes.fromhex(key) for key in out["plain"]) == every_image(folders[1])
    assert out["old"] == out["resolved at old"] == 10
    assert out["straight"] == out["stopped 0"] == out["stopped 1"]
    assert Counter(out["straight"][:EXAMPLES]) == Counter(out["plain"])
    nothing, revision, split = out["errors"]
    assert "'user/nothing'" in nothing and "doesn't exist" in nothing
    assert "dataset_revision 'v9'" in revision and "no split 'test'; it has ['train']" in split


def test_a_stream_without_declared_features_finds_its_images():
    rows = digits()["train"].select(range(24))
    source = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert source.features is None
    images = StreamedImages(source, ImageFormat((8, 8), 1), label_column="label")
    assert images.image_column == "image" and images.class_names is None
    expected = keys([Images(rows, ImageFormat((8, 8), 1))[range(24)]])
    assert Counter(keys(batches(images, steps=2))) == Counter(expected)


def test_broken_validation_images_of_a_stream_are_left_out(with_broken, caplog):
    images = stream(with_broken, label_column=None)
    assert len(images.split_validation(1.0)) == 29 and "17.png" in caplog.text
    with pytest.raises(ValueError, match="validation_fraction = 1e-09 selects no image of the stream"):
        images.split_validation(1e-9)


def test_workers_end_after_an_error_without_garbage_collection(with_broken):
    before = multiprocessing.active_children()

    def run() -> None:
        with suppress(StreamError):
            keys(batches(stream(with_broken, label_column=None), num_workers=1))

    gc.disable()
    try:
        run()
        assert multiprocessing.active_children() == before
    finally:
        gc.enable()
