"""Images of every kind come in as they should, broken ones are named, and order has an address."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from ddpm_hf.data import (
    Images,
    digits,
    open_dataset,
)
from ddpm_hf.seeds import addressed_generator


@pytest.fixture
def folder(tmp_path):
    """Photographs that scikit-learn ships, cut up, in two class folders."""
    photos = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    for name, photo in zip(("china", "flower"), photos):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(photo[i * 50 : i * 50 + 100, :160]).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_the_digits_are_those_of_scikit_learn_split_without_overlap():
    splits = digits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    original = {image.tobytes() for image in (load_digits().images * (255 / 16)).round().astype(np.uint8)}
    seen = [np.asarray(row["image"]).tobytes() for split in splits.values() for row in split]
    assert set(seen) == original and len(seen) == 1797
    labels = np.bincount(splits["test"]["label"])
    assert labels.min() >= 34 and labels.max() <= 38


def test_digits_pass_through_the_same_code_as_any_other_data_set():
    images = Images(open_dataset("digits"), (8, 8), channels=1, label_column="label")
    batch = images[[0, 7]]
    assert batch["images"].shape == (2, 1, 8, 8) and batch["images"].dtype == torch.uint8
    assert batch["labels"].shape == (2,) and images.broken() == []


def test_in_memory_and_decoded_on_demand_are_the_same(folder):
    images = Images(open_dataset(str(folder)), (32, 48), label_column="label")
    on_demand = images[[4, 1, 1]]
    images.keep_in_memory()
    in_memory = images[[4, 1, 1]]
    assert all(torch.equal(on_demand[key], in_memory[key]) for key in ("images", "labels"))
    assert images.num_bytes == 6 * 3 * 32 * 48


def test_pixels_of_an_image_of_the_right_size_are_untouched(folder):
    images = Images(open_dataset(str(folder)), (100, 160))
    expected = load_sample_image("china.jpg")[:100, :160]
    np.testing.assert_array_equal(images[[0]]["images"][0].permute(1, 2, 0).numpy(), expected)


def one_image(image, tmp_path, size, channels, **save):
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / ("image.jpg" if "exif" in save else "image.png"), **save)
    return Images(open_dataset(str(tmp_path / "one")), size, channels)[[0]]["images"][0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_image_is_converted_to_the_channels_asked_for(tmp_path, mode, channels):
    image = Image.fromarray(load_sample_image("flower.jpg")[:40, :40]).convert(mode)
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / ("image.tiff" if mode == "CMYK" else "image.png"))
    images = Images(open_dataset(str(tmp_path / "one")), (20, 20), channels)
    assert images[[0]]["images"].shape == (1, channels, 20, 20)


def test_an_image_turned_by_its_exif_tag_comes_in_upright(tmp_path):
    upright = Image.new("L", (32, 64), 0)
    upright.paste(255, (0, 0, 32, 32))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    pixels = one_image(upright.rotate(90, expand=True), tmp_path, (64, 32), 1, exif=exif)
    assert pixels[0, :28].min() > 200 and pixels[0, 36:].max() < 50


def test_a_broken_image_is_found_and_named_by_its_path(folder):
    whole = (folder / "china" / "1.png").read_bytes()
    (folder / "china" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "flower" / "2.png").write_bytes(b"no image at all")
    images = Images(open_dataset(str(folder)), (16, 16))
    broken = images.broken()
    assert sorted(images.describe(i).split("/")[-2:] for i in broken) == [["china", "1.png"], ["flower", "2.png"]]
    images.without(broken)
    assert len(images) == 4 and images.broken() == []


def test_a_folder_without_images_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match="holds no image"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_a_folder_that_is_not_there_says_so(name):
    with pytest.raises(ValueError, match="neither 'digits' nor 'photos', nor a folder"):
        open_dataset(name)


def test_a_split_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['train', 'test'\]"):
        open_dataset("digits", split="validation")


def test_a_folder_made_by_save_to_disk_is_opened(tmp_path):
    digits()["test"].save_to_disk(str(tmp_path / "saved"))
    assert len(open_dataset(str(tmp_path / "saved"))) == 360


def test_a_column_is_chosen_when_there_is_one_and_asked_for_when_there_are_more():
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    picture = Image.new("RGB", (8, 8))
    dataset = datasets.Dataset.from_dict({"a": [picture], "b": [picture]}, features=features)
    with pytest.raises(ValueError, match=r"image_column must be one of \['a', 'b'\]"):
        Images(dataset, (8, 8))
    assert Images(dataset, (8, 8), image_column="b").image_column == "b"


def test_random_numbers_depend_on_seed_purpose_and_index_alone():
    def numbers(*address):
        return torch.rand(4, generator=addressed_generator("cpu", *address)).tolist()

    assert numbers(1, "noise", 5) == numbers(1, "noise", 5)
    others = [numbers(1, "noise", 6), numbers(2, "noise", 5), numbers(1, "flip", 5), numbers(5, "noise", 1)]
    assert all(other != numbers(1, "noise", 5) for other in others)
