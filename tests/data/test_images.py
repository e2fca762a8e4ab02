"""Images of every kind come in as they should, broken ones are named, and order has an address."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from ddpm_hf.data.builtin import digits, photos
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images, validation_hash
from ddpm_hf.seeds import make_generator


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


def test_photos_are_patches_of_the_two_photographs_and_no_pixel_is_in_both_splits():
    splits = photos()
    assert {name: len(split) for name, split in splits.items()} == {"train": 4096, "test": 512}
    pictures = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    windows = [np.lib.stride_tricks.sliding_window_view(p, (32, 32), axis=(0, 1)) for p in pictures]
    for name, columns in (("train", range(0, 481)), ("test", range(512, 609))):
        labels = splits[name]["label"]
        assert labels.count(0) == labels.count(1) == len(labels) / 2
        for row in splits[name].select(range(0, len(labels), 37)):
            patch = np.asarray(row["image"])
            corner = (windows[row["label"]][..., 0, 0] == patch[0, 0]).all(-1)
            places = [(y, x) for y, x in np.argwhere(corner) if (windows[row["label"]][y, x] == patch.transpose(2, 0, 1)).all()]  # fmt: skip
            assert any(x in columns for _, x in places)
    again = photos()
    assert all(splits[name]._fingerprint == again[name]._fingerprint for name in splits)


def validation_names(dataset, fraction):
    images = Images(dataset, (8, 8), 1)
    validation = images.split_validation(fraction)
    names = [{Path(part.describe(i)).name for i in range(len(part))} for part in (images, validation)]
    assert names[0].isdisjoint(names[1]) and len(names[0] | names[1]) == dataset.num_rows
    return names[1]


def test_what_is_validation_stays_so_when_images_are_added_moved_and_reordered_and_grows_with_the_fraction(tmp_path):
    for i, row in enumerate(digits()["train"].select(range(120))):
        folder = tmp_path / ("some" if i < 80 else "more")
        folder.mkdir(exist_ok=True)
        row["image"].save(folder / f"{i}.png")
    some = validation_names(open_dataset(str(tmp_path / "some")), 0.2)
    shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    everything = open_dataset(str(tmp_path.with_name("moved")))
    both = validation_names(everything, 0.2)
    assert both & {f"{i}.png" for i in range(80)} == some
    assert validation_names(everything.shuffle(seed=1), 0.2) == both
    assert both < validation_names(everything, 0.5)
    assert 24 - 4 * 4.4 <= len(both) <= 24 + 4 * 4.4  # binomial: 120 images, deviation 4.4


def test_places_are_uniform_and_copies_of_a_file_are_on_one_side():
    places = np.sort([validation_hash(str(i).encode()) for i in range(2000)])
    assert abs(places - np.linspace(0, 1, 2000)).max() < 1.95 / 2000**0.5  # Kolmogorov and Smirnov, 0.1 %
    assert validation_hash(b"a") == validation_hash(b"a")


def test_a_fraction_that_leaves_one_side_empty_is_refused():
    with pytest.raises(ValueError, match="validation_fraction = 1e-09 holds out 0 of 360 images"):
        Images(open_dataset("digits", split="test"), (8, 8), 1).split_validation(1e-9)


def test_images_validation_of_memory_are_those_validation_of_a_file():
    images = Images(open_dataset("digits", split="test"), (8, 8), 1, label_column="label")
    images.keep_in_memory()
    validation = images.split_validation(0.3)
    other = Images(open_dataset("digits", split="test"), (8, 8), 1, label_column="label")
    expected = other.split_validation(0.3)
    for a, b in ((images, other), (validation, expected)):
        assert all(torch.equal(a[range(len(a))][key], b[range(len(b))][key]) for key in ("images", "labels"))


def test_grey_images_of_16_bits_stay_so_in_memory_and_count_two_bytes_a_pixel(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 999
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "eight.png")
    images = Images(open_dataset(str(tmp_path)), (8, 8), 1)
    on_demand = images[[0, 1]]["images"]
    images.keep_in_memory()
    assert torch.equal(images[[0, 1]]["images"], on_demand) and images.num_bytes == 2 * 64 * 2
    np.testing.assert_array_equal(on_demand[0, 0].numpy(), deep)
    rounded = Images(open_dataset(str(tmp_path)), (8, 8), 1, bits=8)
    assert rounded[[0, 1]]["images"].dtype == torch.uint8 and rounded.num_bytes == 2 * 64


def test_a_folder_of_parquet_files_is_a_data_set(tmp_path):
    digits()["test"].to_parquet(tmp_path / "test.parquet")
    assert len(open_dataset(str(tmp_path), split="test")) == 360


def test_one_split_saved_alone_is_no_validation_split_as_well(tmp_path):
    digits()["test"].save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        open_dataset(str(tmp_path / "saved"), split="test")


def test_a_revision_of_what_has_none_is_refused(folder):
    for name in ("digits", str(folder)):
        with pytest.raises(ValueError, match="dataset_revision 'main' is of data sets on the Hub"):
            open_dataset(name, revision="main")


def test_a_folder_that_has_the_name_of_an_embedded_data_set_is_not_mistaken_for_it(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'photos' is embedded here and is a folder too: './photos' is the folder"):
        open_dataset("photos")


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
        return torch.rand(4, generator=make_generator("cpu", *address)).tolist()

    assert numbers(1, "noise", 5) == numbers(1, "noise", 5)
    others = [numbers(1, "noise", 6), numbers(2, "noise", 5), numbers(1, "flip", 5), numbers(5, "noise", 1)]
    assert all(other != numbers(1, "noise", 5) for other in others)


def test_labels_are_checked_against_the_number_of_classes_and_their_names_are_known():
    images = Images(open_dataset("digits"), (8, 8), channels=1, label_column="label")
    images.check_labels(10)
    assert images.class_names == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="num_classes must be 10, the classes of the column 'label'.*got 9"):
        images.check_labels(9)
    plain = images.dataset.cast_column("label", datasets.Value("int64")).cast_column("image", datasets.Image())
    images = Images(plain, (8, 8), channels=1, label_column="label")
    images.check_labels(11)
    assert images.class_names is None
    with pytest.raises(ValueError, match=r"must be integers in 0..num_classes−1 = 4, got \[0, 1, 2, 3, 4\] ... 9"):
        images.check_labels(5)
