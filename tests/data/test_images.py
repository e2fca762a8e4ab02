"""Images are decoded alike from the disk and from memory, and checked, split and labeled as documented."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from ddpm_hf.data.builtin import digits
from ddpm_hf.data.checking import validation_hash
from ddpm_hf.data.decoding import ImageFormat, UnreadableImage
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images, leave_out_broken
from tests.data.test_decoding import png


@pytest.fixture
def folder(tmp_path):
    """Photographs that scikit-learn ships, cut up, in two class folders."""
    photos = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    for name, photo in zip(("china", "flower"), photos):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(photo[i * 50 : i * 50 + 100, :160]).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_built_in_digits_are_read_like_any_data_set():
    images = Images(open_dataset("digits"), ImageFormat((8, 8), 1), label_column="label")
    batch = images[[0, 7]]
    assert batch["images"].shape == (2, 1, 8, 8) and batch["images"].dtype == torch.uint8
    assert batch["labels"].shape == (2,) and images.broken() == []


def test_images_are_the_same_in_memory_and_on_demand(folder):
    images = Images(open_dataset(str(folder)), ImageFormat((32, 48)), label_column="label")
    on_demand = images[[4, 1, 1]]
    images.keep_in_memory()
    in_memory = images[[4, 1, 1]]
    assert all(torch.equal(on_demand[key], in_memory[key]) for key in ("images", "labels"))
    assert images.num_bytes == 6 * 3 * 32 * 48


def test_pixels_are_unchanged_if_the_size_fits(folder):
    images = Images(open_dataset(str(folder)), ImageFormat((100, 160)))
    expected = load_sample_image("china.jpg")[:100, :160]
    np.testing.assert_array_equal(images[[0]]["images"][0].permute(1, 2, 0).numpy(), expected)


def one_image(image, tmp_path, size, channels, **save):
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / ("image.jpg" if "exif" in save else "image.png"), **save)
    return Images(open_dataset(str(tmp_path / "one")), ImageFormat(size, channels))[[0]]["images"][0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_is_converted_to_the_channels(tmp_path, mode, channels):
    image = Image.fromarray(load_sample_image("flower.jpg")[:40, :40]).convert(mode)
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / ("image.tiff" if mode == "CMYK" else "image.png"))
    images = Images(open_dataset(str(tmp_path / "one")), ImageFormat((20, 20), channels))
    assert images[[0]]["images"].shape == (1, channels, 20, 20)


def test_images_are_turned_upright_by_their_exif_tag(tmp_path):
    upright = Image.new("L", (32, 64), 0)
    upright.paste(255, (0, 0, 32, 32))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    pixels = one_image(upright.rotate(90, expand=True), tmp_path, (64, 32), 1, exif=exif)
    assert pixels[0, :28].min() > 200 and pixels[0, 36:].max() < 50


def test_broken_images_are_found_and_named_by_path(folder):
    whole = (folder / "china" / "1.png").read_bytes()
    (folder / "china" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "flower" / "2.png").write_bytes(b"no image at all")
    images = Images(open_dataset(str(folder)), ImageFormat((16, 16)))
    broken = images.broken()
    assert sorted(images.describe(i).split("/")[-2:] for i in broken) == [["china", "1.png"], ["flower", "2.png"]]
    leave_out_broken(images, is_allowed=True)
    assert len(images) == 4 and images.broken() == []


def validation_names(dataset, fraction):
    images = Images(dataset, ImageFormat((8, 8), 1))
    validation = images.split_validation(fraction)
    names = [{Path(part.describe(i)).name for i in range(len(part))} for part in (images, validation)]
    assert names[0].isdisjoint(names[1]) and len(names[0] | names[1]) == dataset.num_rows
    return names[1]


def test_validation_images_stay_when_others_are_added_or_moved(tmp_path):
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


def test_validation_hashes_are_uniform_and_depend_on_content():
    hashes = np.sort([validation_hash(str(i).encode()) for i in range(2000)])
    assert abs(hashes - np.linspace(0, 1, 2000)).max() < 1.95 / 2000**0.5  # Kolmogorov and Smirnov, 0.1 %
    assert validation_hash(b"a") == validation_hash(b"a")


def test_a_validation_fraction_that_selects_no_image_raises():
    with pytest.raises(ValueError, match="validation_fraction = 1e-09 selects 0 of 360 images"):
        Images(open_dataset("digits", split="test"), ImageFormat((8, 8), 1)).split_validation(1e-9)


def test_validation_split_is_the_same_in_memory_and_on_demand():
    images = Images(open_dataset("digits", split="test"), ImageFormat((8, 8), 1), label_column="label")
    images.keep_in_memory()
    validation = images.split_validation(0.3)
    other = Images(open_dataset("digits", split="test"), ImageFormat((8, 8), 1), label_column="label")
    expected = other.split_validation(0.3)
    for a, b in ((images, other), (validation, expected)):
        assert all(torch.equal(a[range(len(a))][key], b[range(len(b))][key]) for key in ("images", "labels"))


def test_16_bit_images_keep_their_depth_in_memory(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 999
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "eight.png")
    images = Images(open_dataset(str(tmp_path)), ImageFormat((8, 8), 1))
    on_demand = images[[0, 1]]["images"]
    images.keep_in_memory()
    assert torch.equal(images[[0, 1]]["images"], on_demand) and images.num_bytes == 2 * 64 * 2
    np.testing.assert_array_equal(on_demand[0, 0].numpy(), deep)
    rounded = Images(open_dataset(str(tmp_path)), ImageFormat((8, 8), 1, bits=8))
    assert rounded[[0, 1]]["images"].dtype == torch.uint8 and rounded.num_bytes == 2 * 64


def test_labels_are_checked_against_the_number_of_classes():
    images = Images(open_dataset("digits"), ImageFormat((8, 8), 1), label_column="label")
    images.check_labels(10)
    assert images.class_names == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="num_classes must be 10, the classes of the column 'label'.*got 9"):
        images.check_labels(9)
    plain = images.dataset.cast_column("label", datasets.Value("int64")).cast_column("image", datasets.Image())
    images = Images(plain, ImageFormat((8, 8), 1), label_column="label")
    images.check_labels(11)
    assert images.class_names is None
    with pytest.raises(ValueError, match=r"must be integers in 0..num_classes−1 = 4, got 0, 1, 2, .* 9"):
        images.check_labels(5)


@pytest.mark.parametrize(("kind", "width"), [("number", None), ("vector", 3)])
def test_labels_of_numbers_and_vectors_are_the_same_in_memory(kind, width):
    values = np.random.default_rng(0).random((10, *([width] if width else []))).tolist()
    pictures = [Image.new("L", (8, 8), i) for i in range(10)]
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": values}).cast_column("image", datasets.Image())
    images = Images(dataset, ImageFormat((8, 8), 1), label_column="label")
    images.check_conditions(width)
    assert images.class_names is None
    expected = torch.tensor(values)
    assert torch.equal(images.first_labels(4), expected[:4]) and torch.equal(images.first_labels(99), expected)
    for _ in range(2):
        assert torch.equal(images[[7, 2]]["labels"], expected[[7, 2]])
        assert torch.equal(images.subset([7, 2]).first_labels(9), expected[[7, 2]])
        images.keep_in_memory()
    with pytest.raises(ValueError, match="the labels in the column 'label' must be lists of 4 finite numbers"):
        images.check_conditions(4)


def test_image_checks_are_the_same_on_any_number_of_workers(tmp_path, monkeypatch):
    for i, row in enumerate(digits()["test"].select(range(12))):
        row["image"].save(tmp_path / f"{i:02d}.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "12.png")
    (tmp_path / "05.png").write_bytes(b"no image")
    dataset, used = open_dataset(str(tmp_path)), []
    run_map = datasets.Dataset.map
    monkeypatch.setattr(
        datasets.Dataset,
        "map",
        lambda *args, **options: (
            used.append(options["num_proc"]) or run_map(*args, **options, load_from_cache_file=False)
        ),
    )
    splits = []
    for num_workers, minimum in ((0, 1), (1, 1), (2, 1), (2, 14)):
        monkeypatch.setattr("ddpm_hf.data.images.MIN_IMAGES_FOR_WORKERS", minimum)
        images = Images(dataset, ImageFormat((8, 8), 1), num_workers=num_workers)
        assert images.broken() == [5] and images.num_bytes == 13 * 64 * 2
        leave_out_broken(images, is_allowed=True)
        validation = images.split_validation(0.5)
        splits.append([[part.describe(i) for i in range(len(part))] for part in (images, validation)])
    assert used == [None, None, 2, None]
    assert splits[0] == splits[1] == splits[2] == splits[3] and len(splits[0][0] + splits[0][1]) == 12


def test_broken_images_raise_unless_they_may_be_left_out(tmp_path, caplog):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    images = Images(open_dataset(str(tmp_path)), ImageFormat((8, 8), 1))
    for is_allowed in (False, True):  # no image would be left
        with pytest.raises(
            ValueError, match="2 of 2 photos cannot be read:\n.*a.png: neither an.*\n.*b.png: .*\n.*--skip_br"
        ):
            leave_out_broken(images, is_allowed, "photos")
    Image.new("L", (8, 8)).save(tmp_path / "c.png")
    images = Images(open_dataset(str(tmp_path)), ImageFormat((8, 8), 1))
    leave_out_broken(images, is_allowed=True)
    assert len(images) == 1 and "Leaving out 2 images" in caplog.text and "b.png" in caplog.text


def test_arrays_are_checked_split_and_kept_in_memory_like_pictures(tmp_path):
    r = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        np.save(tmp_path / f"class{i % 2}" / f"{i:02d}.npy", r.integers(0, 256, (8, 8, 5), np.uint8))
    np.save(tmp_path / "class0" / "z3.npy", np.zeros((8, 8, 3), np.uint8))
    np.save(tmp_path / "class1" / "z4.npy", np.zeros((8, 8, 5), np.float32))
    images = Images(open_dataset(str(tmp_path)), ImageFormat((8, 8), 5), label_column="label", num_workers=2)
    images.check_labels(2)
    with pytest.raises(
        ValueError, match="z3.npy: the array has 3 channels, and channels = 5\n.*must be uint8 or uint16"
    ):
        leave_out_broken(images, is_allowed=False)
    leave_out_broken(images, is_allowed=True)
    validation = images.split_validation(0.3)
    on_demand = [part[range(len(part))] for part in (images, validation)]
    assert len(images) + len(validation) == 40 and images.num_bytes == len(images) * 8 * 8 * 5
    for part, expected in zip((images, validation), on_demand):
        part.keep_in_memory()
        assert all(torch.equal(part[range(len(part))][key], expected[key]) for key in ("images", "labels"))
    first = np.load(images.describe(0))
    np.testing.assert_array_equal(images[[0]]["images"][0].permute(1, 2, 0), first)


def test_a_subset_leaves_the_images_it_is_taken_from_unchanged():
    images = Images(open_dataset("digits", split="test"), ImageFormat((8, 8), 1), label_column="label")
    for _ in range(2):
        everything = images[range(360)]
        subset = images.subset([7, 3])
        assert len(subset) == 2 and len(images) == 360
        assert all(torch.equal(subset[[0, 1]][key], everything[key][[7, 3]]) for key in ("images", "labels"))
        images.keep_in_memory()


def folder_of(tmp_path, **files: np.ndarray | bytes) -> str:
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / f"{name}.png").write_bytes(content)
        else:
            Image.fromarray(content).save(tmp_path / f"{name}.png")
    return str(tmp_path)


def deep_gray(greatest: int) -> np.ndarray:
    return np.linspace(100, greatest, 64).round().astype(np.uint16).reshape(8, 8)


@pytest.mark.parametrize(("greatest", "bits"), [(1000, 10), (4095, 12), (16383, 14)])
def test_values_far_below_16_bits_are_said_with_their_range(tmp_path, caplog, greatest, bits):
    source = folder_of(tmp_path, a=deep_gray(greatest), b=deep_gray(greatest // 2), c=np.full((8, 8), 255, np.uint8))
    leave_out_broken(Images(open_dataset(source), ImageFormat((4, 4), 1, crop="pad")), is_allowed=False)
    assert f"2 images of 16 bits have values from 100 to {greatest}, of 0 to 65535" in caplog.text
    assert f"the network gets -1.00 to {greatest / 32767.5 - 1:.2f}" in caplog.text
    assert f"--white_level {2**bits - 1} maps values of {bits} bits" in caplog.text


def test_values_of_16_bits_and_those_with_a_white_level_are_not_warned_of(tmp_path, caplog):
    for greatest, level in ((65535, None), (40000, None), (4095, 4095)):
        source = folder_of(tmp_path, a=deep_gray(greatest), b=deep_gray(300))
        leave_out_broken(Images(open_dataset(source), ImageFormat((8, 8), 1, white_level=level)), is_allowed=False)
    assert not caplog.text


def test_a_white_level_without_images_of_16_bits_is_warned_of(tmp_path, caplog):
    source = folder_of(tmp_path, a=np.zeros((8, 8), np.uint8))
    leave_out_broken(Images(open_dataset(source), ImageFormat((8, 8), 1, white_level=4095)), is_allowed=False)
    assert "white_level = [0.0, 4095.0] changes no image: none has more than 8 bits." in caplog.text


def test_lost_bits_and_unused_color_profiles_are_warned_of(tmp_path, caplog):
    colors = np.stack([deep_gray(65535)] * 3, -1)
    plain, profiled = Image.new("RGB", (8, 8)), tmp_path / "b.png"
    plain.save(profiled, icc_profile=b"no profile")
    source = folder_of(tmp_path, a=np.zeros((8, 8, 3), np.uint8), c=png(colors, 2))
    images = Images(open_dataset(source), ImageFormat((8, 8)))
    leave_out_broken(images, is_allowed=False)
    assert "1 color images have 16 bits and are read at 8 bits, as Pillow does; the first is" in caplog.text
    assert "1 images have a color profile that cannot be used, and are read as sRGB; the first is" in caplog.text
    assert "c.png" in caplog.messages[0] and "b.png" in caplog.messages[1] and len(images) == 3


def test_missing_images_are_left_out_by_number(caplog):
    whole = {"bytes": png(deep_gray(65535), 0), "path": None}
    rows = {"image": [whole, None]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image(decode=False)))
    images = Images(dataset, ImageFormat((8, 8), 1))
    assert images.broken() == [1]
    leave_out_broken(images, is_allowed=True)
    assert "number 1 of the data set: the image is missing: null" in caplog.text and len(images) == 1


def test_every_broken_image_is_listed_with_its_reason(tmp_path, caplog):
    whole = png(deep_gray(65535), 0)
    source = folder_of(tmp_path, cut=whole[:60], text=b"<html>", whole=whole)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "floats.tiff")
    images = Images(open_dataset(source), ImageFormat((8, 8), 1))
    leave_out_broken(images, is_allowed=True)
    for name, reason in (
        ("cut.png", "truncated"),
        ("text.png", "neither an array"),
        ("floats.tiff", "floats has no known range"),
    ):
        assert any(name in line and reason in line for line in caplog.text.splitlines()), name
    assert len(images) == 1


def test_an_image_that_breaks_after_the_check_is_named_with_its_reason(tmp_path):
    images = Images(open_dataset(folder_of(tmp_path, a=deep_gray(65535))), ImageFormat((8, 8), 1))
    assert images.broken() == []
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(UnreadableImage, match=r"a.png \(neither an array of NumPy nor a picture"):
        images[[0]]


def test_the_fingerprint_follows_content_order_and_labels():
    def fingerprint(rows, label_column="label"):
        return Images(rows, ImageFormat((8, 8), 1), label_column=label_column).fingerprint

    rows = digits()["train"].select(range(20))
    same = fingerprint(rows)
    assert fingerprint(digits()["train"].select(range(20))) == same
    other_label = rows.select(range(19)).to_list() + [{**rows[19], "label": (rows[19]["label"] + 1) % 10}]
    changed = [
        rows.select([1, 0, *range(2, 20)]),
        digits()["train"].select([*range(19), 25]),
        rows.select(range(19)),
        datasets.Dataset.from_list(other_label, features=rows.features),
    ]
    assert len({same, fingerprint(rows, None), *map(fingerprint, changed)}) == 6
