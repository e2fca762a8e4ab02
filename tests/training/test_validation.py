"""The validation images of a run are chosen by its config, and their loss depends on the weights alone."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from ddpm_hf.scripts import train
from PIL import Image
from sklearn.datasets import load_sample_image

from ddpm_hf.data.builtin import digits
from ddpm_hf.training.build import build
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import load_images
from ddpm_hf.training.validation import ValidationLoss, count_validation_images, load_validation_images
from tests.conftest import TINY_TRAINING, flags

TINY = flags(**TINY_TRAINING, total_images=192, seed=3)


def test_validation_loss_is_repeatable_and_spans_all_timesteps():
    config = parse_config([*TINY, "--validation_images", "100"])
    unet, scheduler = build(config)
    loss = ValidationLoss(load_validation_images(config), scheduler.diffusion, 0, Accelerator(), 16)
    assert loss.timesteps.tolist() == list(range(5, 1000, 10))
    unet.train()
    first = loss(unet)
    torch.randn(3)
    assert loss(unet) == first and unet.training
    # The network is initialized to give 0, so that the loss is the mean square of the noise.
    assert first == pytest.approx(1, abs=4 * (2 / (100 * 64)) ** 0.5)


def test_validation_loss_depends_on_the_labels_of_a_conditional_network():
    options = ["--label_column", "label", "--num_classes", "10", "--label_dropout", "0.1"]
    options += ["--validation_fraction", "0.1", "--validation_images", "32"]
    config = parse_config([*TINY, *options])
    unet, scheduler = build(config)
    for parameter in unet.parameters():  # some are initialized to 0
        torch.nn.init.normal_(parameter, std=0.1)
    _, validation = load_images(config)
    images = load_validation_images(config, validation)
    assert len(images) == 32 < len(validation)
    loss = ValidationLoss(images, scheduler.diffusion, 0, Accelerator(), 16)
    given = loss(unet)
    images._memory["labels"] = (images._memory["labels"] + 1) % 10
    assert loss(unet) != given


def test_validation_loss_is_the_same_for_any_images_at_a_time(make_unet):
    config = parse_config([*TINY, "--validation_images", "70"])
    _, scheduler = build(config)
    images = load_validation_images(config)
    unet = make_unet(in_channels=1, out_channels=1)
    losses = [ValidationLoss(images, scheduler.diffusion, 0, Accelerator(), n)(unet) for n in (16, 7, 100)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_missing_default_validation_split_means_no_validation(tmp_path):
    source = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8), 9 * i) for i in range(20)]})
    source = source.cast_column("image", datasets.Image())
    source.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=source, extra=source.select(range(5))).save_to_disk(tmp_path / "splits")
    for name in ("plain", "splits"):
        config = parse_config([*TINY, "--dataset", str(tmp_path / name)])
        assert load_validation_images(config) is None
    config = parse_config([*TINY, "--dataset", str(tmp_path / "splits"), "--validation_split", "extra"])
    assert len(load_validation_images(config)) == 5
    for name in ("plain", "splits"):
        config = parse_config([*TINY, "--dataset", str(tmp_path / name), "--validation_split", "test"])
        with pytest.raises(ValueError, match="has no split 'test'"):
            load_validation_images(config)


def test_no_validation_images_are_loaded_without_validation():
    assert load_validation_images(parse_config([*TINY, "--validate_every_steps", "0"])) is None
    assert load_validation_images(parse_config([*TINY, "--streaming"])) is None  # its split would be downloaded


def test_images_of_a_test_split_are_counted_without_validation(tmp_path):
    off = [*TINY, "--validate_every_steps", "0"]
    assert count_validation_images(parse_config(off)) == len(digits()["test"])
    config = parse_config([*off, "--validation_fraction", "0.1"])
    _, validation = load_images(config)
    assert count_validation_images(config, validation) == len(validation) < len(digits()["test"])
    digits()["train"].select(range(9)).save_to_disk(tmp_path)
    assert count_validation_images(parse_config([*off, "--dataset", str(tmp_path)])) == 0
    named = parse_config([*off, "--dataset", str(tmp_path), "--validation_split", "nowhere"])
    assert count_validation_images(named) == 0  # a finished run does not fail over it


def test_a_broken_validation_image_is_named_before_training(tmp_path):
    photo = Image.fromarray(load_sample_image("china.jpg")[:64, :64])
    for split, number in (("train", 20), ("test", 3)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(number):
            photo.save(tmp_path / "photos" / split / f"{i}.png")
    (tmp_path / "photos" / "test" / "1.png").write_bytes(b"nothing")
    options = [*TINY, "--dataset", str(tmp_path / "photos"), "--channels", "3", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="1 of 3 validation images cannot be read:\\n.*1.png"):
        train.main(options)
    assert not (tmp_path / "out").exists()
    assert len(load_validation_images(parse_config([*options, "--skip_broken_images"]))) == 2
