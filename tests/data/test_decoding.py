"""Images of every depth, transparency, palette and shape are decoded to what they show."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from sklearn.datasets import load_sample_image

from ddpm_hf.data.decoding import (
    UNREADABLE,
    ImageFormat,
    check_crop_and_background,
    decode_image,
    match_depth,
    reads_at_8_bits,
    to_signed,
)

RAMP = np.linspace(0, 65535, 16 * 16).round().astype(np.uint16).reshape(16, 16)


def file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image, size, channels, kind="PNG", save=None, **options) -> np.ndarray:
    """(H, W, C)"""
    return (
        decode_image(file(image, kind, **(save or {})), ImageFormat(size, channels, **options)).permute(1, 2, 0).numpy()
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_gray_keeps_every_value(kind, channels):
    found = pixels(Image.fromarray(RAMP), (16, 16), channels, kind)
    assert found.dtype == np.uint16 and found.shape == (16, 16, channels)
    for plane in range(min(channels, 3)):
        np.testing.assert_array_equal(found[..., plane], RAMP)
    if channels == 4:
        assert (found[..., 3] == 65535).all()
    signed = to_signed(torch.from_numpy(found))
    np.testing.assert_allclose(signed[..., 0], RAMP / 32767.5 - 1.0, atol=2e-7)


def test_resizing_keeps_the_precision_of_16_bits():
    found = pixels(Image.fromarray(RAMP), (8, 8), 1)[..., 0].astype(float)
    exact = np.asarray(Image.fromarray(RAMP.astype(np.float32)).resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(found, exact.clip(0, 65535), atol=0.51)
    assert (found % 257 != 0).mean() > 0.9  # more than 8 bits scaled up


def test_16_bits_are_rounded_to_8_on_request():
    found = pixels(Image.fromarray(RAMP), (16, 16), 1, bits=8)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found[..., 0], RAMP / 257, atol=0.501)


def test_8_bit_images_keep_their_values_among_16_bit_ones():
    eight = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    deep = torch.from_numpy(RAMP)[None]
    both = torch.stack(match_depth([eight, deep]))
    assert both.dtype == torch.uint16 and torch.equal(both[1], deep)
    assert torch.equal(to_signed(both)[0], to_signed(eight))
    assert torch.stack(match_depth([eight, eight])).dtype == torch.uint8


def test_signed_pixels_span_minus_one_to_one():
    for values in (torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0, 65535], dtype=torch.uint16)):
        assert to_signed(values).tolist() == [-1.0, 1.0]


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """Two rows: red (or its gray) opaque, and red fully transparent."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 4, 8, 8))
    if mode in ("RGBA", "LA"):
        return image.convert(mode), {}
    indices = Image.new("P", (8, 8), 0)
    indices.putpalette([255, 0, 0, 255, 0, 0])
    indices.paste(1, (0, 4, 8, 8))
    if mode == "P":
        return indices, {"transparency": 1}
    if mode == "P, by entry":
        return indices, {"transparency": bytes([255, 0])}
    gray = Image.new("L", (8, 8), 76)
    gray.paste(200, (0, 4, 8, 8))
    return gray, {"transparency": 200}


@pytest.mark.parametrize("background", ["white", "black", "#808080"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P, by entry", "L"])
def test_transparent_parts_show_the_background(mode, background):
    warnings.simplefilter("error")
    image, save = transparent(mode)
    red = [76, 76, 76] if mode in ("LA", "L") else [255, 0, 0]
    found = pixels(image, (8, 8), 3, save=save, background=background)
    assert (found[:4] == red).all() and (found[4:] == ImageColor.getrgb(background)).all()
    gray = pixels(image, (8, 8), 1, save=save, background=background)
    assert (gray[:4] == 76).all() and (gray[4:] == ImageColor.getcolor(background, "L")).all()
    alpha = pixels(image, (8, 8), 4, save=save, background=background)[..., 3]
    assert (alpha[:4] == 255).all() and (alpha[4:] == 0).all()


def test_half_transparent_parts_blend_with_the_background():
    found = pixels(Image.new("RGBA", (4, 4), (200, 100, 0, 128)), (4, 4), 3, background="#0000ff")
    a = 128 / 255
    np.testing.assert_allclose(found[0, 0], [200 * a, 100 * a, 255 * (1 - a)], atol=1)


def test_transparent_parts_of_16_bits_show_the_background():
    ramp = RAMP.copy()
    ramp[:4] = 1000
    found = decode_image(with_transparent_value(ramp, 1000), ImageFormat((16, 16), 1))[0].numpy()
    assert (found[:4] == 65535).all()
    np.testing.assert_array_equal(found[4:], ramp[4:])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, color: int, *extra: bytes) -> bytes:
    """A PNG of 16 bits a channel: Pillow writes gray ones alone."""
    rows = values.astype(">u2").reshape(len(values), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_transparent_value(values: np.ndarray, value: int) -> bytes:
    return png(values, 0, chunk(b"tRNS", struct.pack(">H", value)))


def test_16_bit_color_is_detected_and_read_at_8_bits():
    colors = np.stack([RAMP, RAMP, RAMP], -1)
    assert reads_at_8_bits(png(colors, 2)) and not reads_at_8_bits(png(RAMP, 0))
    assert not reads_at_8_bits(file(Image.fromarray(RAMP))) and not reads_at_8_bits(file(Image.new("RGB", (4, 4))))
    found = decode_image(png(colors, 2), ImageFormat((16, 16), 3))
    assert found.dtype == torch.uint8
    np.testing.assert_allclose(found[0], RAMP / 257, atol=1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_padding_keeps_the_whole_image_and_adds_background(channels):
    photo = Image.fromarray(load_sample_image("china.jpg")[:100, :200])
    found = pixels(photo, (32, 32), channels, crop="pad", background="#102030").astype(int)
    whole = photo.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]).resize((32, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found[8:24], np.asarray(whole).reshape(16, 32, channels))
    fill = {1: [29], 3: [16, 32, 48], 4: [0, 0, 0, 0]}[channels]
    assert (found[:8] == fill).all() and (found[24:] == fill).all()


def test_padding_of_16_bit_images_adds_background():
    found = pixels(Image.fromarray(RAMP[:8]), (16, 16), 1, crop="pad", background="#808080")[..., 0]
    np.testing.assert_array_equal(found[4:12], RAMP[:8])
    assert (found[:4] == 128 * 257).all()
    with_alpha = pixels(Image.fromarray(RAMP[:8]), (16, 16), 4, crop="pad")[..., 3]
    assert (with_alpha[4:12] == 65535).all() and (with_alpha[:4] == 0).all()


def test_cropping_takes_the_center():
    image = Image.new("L", (64, 32), 0)
    image.paste(255, (16, 0, 48, 32))
    assert pixels(image, (16, 16), 1).min() >= 235  # white but for the ringing of the scaling
    assert pixels(image, (8, 16), 1)[:, :3].max() <= 5  # the same aspect ratio: nothing is cropped


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_images_of_unknown_range_raise(values):
    with pytest.raises(UNREADABLE, match="no known range of values|integers from 70000"):
        pixels(Image.fromarray(values), (4, 4), 1, "TIFF")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, r"channels must be one of \[1, 3, 4\], got 2"),
        ({"crop": "left"}, r"crop must be one of \['center', 'pad'\], got 'left'"),
        ({"size": (0, 8)}, "size must be an integer of at least 1, got 0"),
        ({"size": (8.0, 8)}, "size must be an integer of at least 1, got 8.0"),
        ({"background": "whitish"}, "background must be a color"),
        ({"bits": 16}, r"bits must be one of \[8, None\], got 16"),
    ],
)
def test_a_wrong_image_format_raises(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFormat(**({"size": (8, 8)} | options))


def test_british_spelling_of_crop_is_accepted():
    assert ImageFormat((8, 8), crop="centre") == ImageFormat((8, 8), crop="center")
    assert check_crop_and_background("centre", "white") == "center"
