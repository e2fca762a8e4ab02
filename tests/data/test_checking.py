"""A check of an image says whether it can be read and what it loses; the images that lose something are counted."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data.checking import check_image, describe_losses, inspect, validation_hash
from ddpm_hf.data.decoding import ImageFormat, UnreadableImage, decode_image
from tests.data.test_decoding import file, npy, png

FORM = ImageFormat((8, 8), 1)
GRAY = np.linspace(100, 4000, 64).round().astype(np.uint16).reshape(8, 8)
COLORS = png(np.stack([GRAY] * 3, -1), 2)
PROFILED = file(Image.new("RGB", (8, 8)), icc_profile=b"no profile")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(GRAY, 0), {"deep": True, "low": 100, "high": 4000}),
        (npy(GRAY), {"deep": True, "low": 100, "high": 4000}),
        (COLORS, {"reduced": True}),
        (PROFILED, {"unprofiled": True}),
        (npy(np.zeros((8, 8), np.uint8)), {}),
    ],
)
def test_a_check_finds_depth_range_and_losses(data, expected):
    image, found = inspect(data, FORM)
    assert torch.equal(image, decode_image(data, FORM))
    nothing = {"deep": False, "low": math.nan, "high": math.nan, "reduced": False, "unprofiled": False}
    np.testing.assert_equal(found, nothing | expected)
    whole = check_image({"bytes": data, "path": None}, FORM)
    np.testing.assert_equal(whole, found | {"problem": "", "hash": validation_hash(data)})


def test_a_check_of_a_broken_image_has_the_same_columns():
    whole, broken = (check_image({"bytes": data, "path": None}, FORM) for data in (COLORS, COLORS[:50]))
    assert whole.keys() == broken.keys() and "truncated" in broken["problem"]
    assert "null" in check_image(None, FORM)["problem"]
    with pytest.raises(UnreadableImage):
        inspect(COLORS[:50], FORM)


def test_losses_are_counted_and_the_first_image_is_named():
    files = [PROFILED, COLORS, png(GRAY, 0), COLORS, png(GRAY // 4, 0)]
    rows = [check_image({"bytes": data, "path": None}, FORM) for data in files]
    columns = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    found = describe_losses(columns, FORM, "image {{{}}}".format)
    assert found["reduced"].startswith("2 color images have 16 bits") and found["reduced"].endswith("is image {1}.")
    assert found["unprofiled"].startswith("1 images have a color profile") and "is image {0}." in found["unprofiled"]
    assert (
        found["range"].startswith("2 images of 16 bits have values from 25 to 4000") and "image {2}" in found["range"]
    )
    assert "--white_level 4095 maps values of 12 bits" in found["range"]
    windowed = describe_losses(columns, ImageFormat((8, 8), 1, white_level=4095), str, "Some")
    assert windowed.keys() == {"reduced", "unprofiled"} and windowed["reduced"].startswith("Some color")
