"""The images of a run are opened, checked, split and kept in memory as its config says."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data.builtin import digits
from ddpm_hf.data.decoding import to_signed
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import load_images, open_images, open_split, with_num_classes
from tests.conftest import TINY_TRAINING, flags

TINY = flags(**TINY_TRAINING, total_images=192, seed=3)


def contents(images):
    return [row.numpy().tobytes() for row in images[range(len(images))]["images"]]


def test_validation_images_are_not_trained_on():
    config = parse_config([*TINY, "--validation_fraction", "0.2"])
    images, validation = load_images(config)
    everything, none = load_images(parse_config(TINY))
    rows = [contents(part) for part in (images, validation)]
    assert none is None and len(rows[0]) + len(rows[1]) == len(everything) == 1437
    assert set(rows[0]).isdisjoint(rows[1]) and 220 <= len(rows[1]) <= 350


@pytest.mark.parametrize(("limit", "in_memory"), [(1437 * 64, True), (1437 * 64 - 1, False)])
def test_images_up_to_the_memory_limit_are_kept_in_memory(limit, in_memory):
    images, _ = load_images(parse_config([*TINY, "--memory_limit_bytes", str(limit)]))
    assert images.num_bytes == 1437 * 64 and images.in_memory == in_memory


def test_a_stream_has_the_validation_images_of_the_whole_set(tmp_path):
    digits()["train"].select(range(60)).to_parquet(tmp_path / "train.parquet")
    config = [*TINY, "--dataset", str(tmp_path), "--validation_fraction", "0.2"]
    _, validation = load_images(parse_config(config))
    stream, streamed = load_images(parse_config([*config, "--streaming", "--shuffle_buffer", "7"]))
    assert isinstance(stream, StreamedImages) and stream.shuffle_buffer == 7 and streamed.in_memory
    assert sorted(contents(streamed)) == sorted(contents(validation)) and stream.validation_fraction == 0.2


def test_images_have_the_format_and_columns_of_the_config(tmp_path):
    pictures = {name: [Image.fromarray(np.full((6, 12), value, np.uint8))] for name, value in (("a", 9), ("b", 200))}
    source = datasets.Dataset.from_dict(pictures)
    source = source.cast_column("a", datasets.Image()).cast_column("b", datasets.Image())
    source.save_to_disk(tmp_path / "two")
    options = ["--dataset", str(tmp_path / "two"), "--image_column", "b", "--crop", "pad", "--background", "black"]
    config = parse_config([*TINY, *options, "--num_workers", "3"])
    images = open_split(config, "train")
    assert images.num_workers == 3 and images.format.crop == "pad"
    assert images[[0]]["images"][0, 0, :, 4].tolist() == [0, 0, 200, 200, 200, 200, 0, 0]


@pytest.mark.parametrize(("options", "black", "white"), [(["4095"], 0, 4095), (["-1000", "3000"], -1000, 3000)])
def test_the_white_level_of_the_config_spans_the_range(tmp_path, options, black, white):
    values = np.array([[black, white], [(black + white) / 2, white]]).repeat(4, 0).repeat(4, 1)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "slice.tiff")
    images = open_split(parse_config([*TINY, "--dataset", str(tmp_path), "--white_level", *options]), "train")
    found = to_signed(images[[0]]["images"])[0, 0, ::4, ::4]
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [0.0, 1.0]]), atol=5e-4, rtol=0)


def test_wrong_numbers_of_classes_raise_before_training():
    options = [*TINY, "--label_column", "label", "--num_classes", "9"]
    for streaming in ([], ["--streaming"]):
        with pytest.raises(ValueError, match="num_classes must be 10, the classes of the column 'label'.*got 9"):
            open_images(parse_config([*options, *streaming]))


def save_labels(folder, labels, feature=None) -> str:
    images = [Image.new("L", (8, 8))] * len(labels)
    found = datasets.Dataset.from_dict({"image": images, "label": labels})
    if feature is not None:
        found = found.cast_column("label", feature)
    found.save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [([0, 1, 0], datasets.ClassLabel(names=["a", "b", "c"]), 3), ([0, 4, 2], None, 5)],
)
def test_number_of_classes_is_that_of_the_data(tmp_path, labels, feature, expected):
    config = parse_config(
        [*TINY, "--dataset", save_labels(tmp_path / "data", labels, feature), "--label_column", "label"]
    )
    images, _ = open_images(config)
    assert with_num_classes(config, images).num_classes == expected
    given = replace(config, num_classes=7)
    assert with_num_classes(given, images) is given


def test_number_of_classes_that_the_data_do_not_tell_must_be_given(tmp_path):
    folder = save_labels(tmp_path / "data", [0, 4, 2])
    (arrow,) = Path(folder).glob("*.arrow")
    with pytest.raises(ValueError, match="num_classes must be given: the classes of the column 'label' have no names"):
        open_images(parse_config([*TINY, "--dataset", str(arrow), "--label_column", "label", "--streaming"]))
    folder = save_labels(tmp_path / "numbers", [0.5, 2.0])
    with pytest.raises(ValueError, match="the labels in the column 'label' must be integers, got 0.5, 2.0"):
        open_images(parse_config([*TINY, "--dataset", folder, "--label_column", "label"]))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_words_are_classes_with_names_unless_labels_are_conditions(tmp_path, streaming):
    folder = save_labels(tmp_path / "words", ["dog", "cat", "dog"])
    options = [*TINY, "--dataset", folder, "--label_column", "label"]
    config = parse_config([*options, *streaming])
    images, _ = open_images(config)
    assert images.class_names == ["cat", "dog"] and with_num_classes(config, images).num_classes == 2
    with pytest.raises(ValueError, match="must be finite numbers, got 'dog'"):
        open_images(parse_config([*options, *streaming, "--class_embed_type", "timestep"]))
