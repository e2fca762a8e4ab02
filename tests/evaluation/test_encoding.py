"""PNG files and arrays hold the pixels of an image, rounded to 8 or 16 bits."""

import io

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.evaluation.encoding import png_bytes, quantize


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_holds_the_pixels_rounded_to_8_bits(channels):
    image = np.random.default_rng(0).random((5, 7, channels))
    pixels = np.asarray(Image.open(io.BytesIO(png_bytes(quantize(image, 8))))).reshape(5, 7, channels)
    assert np.abs(pixels / 255 - image).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize(("bits", "channels"), [(8, 1), (8, 2), (8, 3), (8, 4), (16, 1)])
def test_png_holds_every_level_of_every_channel(bits, channels):
    levels = np.random.default_rng(0).integers(0, 2**bits, (5, 7, channels))
    png = png_bytes(quantize(levels / (2**bits - 1), bits))
    assert png[24] == bits  # the depth in the header
    with Image.open(io.BytesIO(png)) as image:
        image.load()  # checks every checksum
        assert np.array_equal(np.asarray(image).reshape(5, 7, channels), levels)


@pytest.mark.parametrize("bits", [8, 16])
def test_quantize_rounds_to_the_nearest_level_and_clips(bits):
    top = 2**bits - 1
    levels = quantize(np.array([-0.1, 0.0, 0.49 / top, 0.51 / top, 1.0, 1.5]), bits)
    assert levels.tolist() == [0, 0, 0, 1, top, top] and levels.dtype == f"uint{bits}"


def test_images_that_a_png_cannot_hold_raise():
    with pytest.raises(ValueError, match="bits must be one of .* got 12"):
        quantize(np.zeros((5, 7, 1)), 12)
    for image in (np.zeros((5, 7, 3), np.uint16), np.zeros((5, 7, 5), np.uint8), np.zeros((5, 7, 1))):
        with pytest.raises(ValueError, match=r"uint16 \(H, W, 1\), got \w+ \(5, 7, \d\)"):
            png_bytes(image)
