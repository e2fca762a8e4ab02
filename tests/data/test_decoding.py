"""Images of every depth, transparency, palette and shape are decoded to what they show."""

import contextlib
import io
import os
import socket
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps
from sklearn.datasets import load_sample_image

from ddpm_hf.data.decoding import (
    ImageFormat,
    UnreadableImage,
    check_crop_and_background,
    decode_image,
    match_depth,
    read_entry,
    to_signed,
)
from ddpm_hf.data.pictures import losses

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
    assert losses(png(colors, 2))["reduced"] and not losses(png(RAMP, 0))["reduced"]
    assert not losses(file(Image.fromarray(RAMP)))["reduced"] and not losses(file(Image.new("RGB", (4, 4))))["reduced"]
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
    with pytest.raises(UnreadableImage, match="no known range of values|integers from 70000"):
        pixels(Image.fromarray(values), (4, 4), 1, "TIFF")


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(*arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, *arrays)
    return stream.getvalue()


def random_array(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2"])
@pytest.mark.parametrize("channels", range(1, 9))
def test_an_array_of_the_size_keeps_every_value(channels, dtype):
    array = random_array(6, 10, channels, dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)
    for data in (npy(array), npz(np.asfortranarray(array))):
        found = decode_image(data, ImageFormat((6, 10), channels))
        assert found.dtype == (torch.uint8 if dtype == np.uint8 else torch.uint16)
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), array)
    if channels == 1:
        np.testing.assert_array_equal(decode_image(npy(array[..., 0]), ImageFormat((6, 10), 1)), found)


@pytest.mark.parametrize("crop", ["center", "pad"])
@pytest.mark.parametrize("into", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_array_of_8_bits_is_converted_as_the_picture_of_its_pixels(channels, into, crop):
    array, form = random_array(20, 30, channels), ImageFormat((8, 8), into, crop, background="#204060")
    if channels == into == 4:
        array[..., 3] = 255  # otherwise, a picture's colors are weighted by its alpha
    picture = decode_image(file(Image.fromarray(array.squeeze())), form)
    found = decode_image(npy(array), form)
    np.testing.assert_allclose(found.int(), picture.int(), atol=1 if channels == into == 4 else 0)


@pytest.mark.parametrize("into", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_array_of_16_bits_is_converted_like_one_of_8_bits(channels, into):
    array, form = random_array(8, 8, channels), ImageFormat((8, 8), into, background="#204060")
    deep = decode_image(npy(array.astype(np.uint16) * 257), form)
    assert deep.dtype == torch.uint16
    np.testing.assert_allclose(deep.float() / 257, decode_image(npy(array), form).float(), atol=1.01)


def test_a_16_bit_array_is_resized_as_the_png_of_its_values():
    for form in (ImageFormat((8, 12), 1), ImageFormat((8, 12), 1, bits=8)):
        png_file, array = (decode_image(data, form) for data in (file(Image.fromarray(RAMP)), npy(RAMP)))
        assert png_file.dtype == array.dtype and torch.equal(png_file, array)


@pytest.mark.parametrize("channels", [2, 4, 5, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_channels_of_an_array_are_resized_one_by_one(channels, dtype):
    array = random_array(20, 30, channels, dtype=dtype)
    found = decode_image(npy(array), ImageFormat((8, 12), channels))
    for plane in range(channels):
        exact = Image.fromarray(array[..., plane].astype(np.float32)).resize((12, 8), Image.Resampling.LANCZOS)
        expected = np.asarray(exact).clip(0, np.iinfo(dtype).max)
        np.testing.assert_allclose(found[plane].float(), expected, atol=0.51)


def test_padding_of_an_array_is_gray_in_every_channel():
    found = decode_image(npy(random_array(4, 8, 5)), ImageFormat((8, 8), 5, "pad", "#102030"))
    assert (found[:, :2] == 29).all() and (found[:, 6:] == 29).all()


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        (npy(np.zeros((4, 4, 5), np.uint8)), 3, "the array has 5 channels, and channels = 3"),
        (npy(np.zeros((4, 4, 3), np.uint16)), 5, "the array has 3 channels, and channels = 5"),
        (file(Image.new("RGB", (4, 4))), 5, "a picture has 1, 3 or 4 channels, and channels = 5: use arrays"),
        (npy(np.zeros((4, 4), np.float32)), 1, r"uint8 or uint16, got float32.*converts floats x in \[0, 1\]"),
        (npy(np.zeros((4, 4), np.int64)), 1, "an array must be uint8 or uint16, got int64"),
        (npy(np.zeros((4, 4), bool)), 1, "an array must be uint8 or uint16, got bool"),
        (npy(np.zeros((5, 4, 9), np.uint8)), 5, r"\(H, W, C\) with C of 1 to 8, got \(5, 4, 9\)"),
        (npy(np.zeros((1, 4, 4, 3), np.uint8)), 3, r"got \(1, 4, 4, 3\)"),
        (npy(np.zeros((0, 4), np.uint8)), 1, r"got \(0, 4\)"),
        (npz(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)), 1, "nor a .npz file with one array"),
        (npy(np.zeros((4, 4), np.uint8))[:90], 1, "not a .npy file, nor a .npz file"),
        (npz(np.zeros((4, 4), np.uint8))[:90], 1, "not a .npy file, nor a .npz file"),
    ],
)
def test_arrays_that_are_not_accepted_raise_with_what_is(data, channels, message):
    with pytest.raises(ValueError, match=message):
        decode_image(data, ImageFormat((4, 4), channels))


def test_damaged_arrays_raise_as_unreadable():
    random = np.random.default_rng(0)
    for data in (npy(random_array(6, 6, 3)), npz(random_array(6, 6, 3))):
        for _ in range(300):
            damaged = bytearray(data)
            damaged[random.integers(4, len(data))] ^= 1 << random.integers(8)
            with contextlib.suppress(UnreadableImage):
                assert decode_image(bytes(damaged), ImageFormat((6, 6), 3)).shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 9}, "channels must be an integer in 1..8, got 9"),
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_of_ordinary_files_are_those_of_plain_pillow(kind, channels):
    data = file(Image.fromarray(load_sample_image("china.jpg")[:90, :120]), kind)
    plain = Image.open(io.BytesIO(data)).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    for crop, shrink in (("center", ImageOps.fit), ("pad", ImageOps.pad)):
        fill = {} if crop == "center" else {"color": {1: 255, 3: (255,) * 3, 4: (0,) * 4}[channels]}
        expected = np.asarray(shrink(plain, (32, 32), Image.Resampling.LANCZOS, **fill)).reshape(32, 32, channels)
        found = decode_image(data, ImageFormat((32, 32), channels, crop)).permute(1, 2, 0)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 5000)])
def test_padding_keeps_a_pixel_of_very_long_images(shape):
    for array in (np.full(shape, 9, np.uint8), np.full(shape, 9 * 257, np.uint16)):
        found = pixels(Image.fromarray(array), (64, 64), 1, crop="pad")[..., 0]
        rows = (found == array[0, 0]).any(axis=int(shape[0] < shape[1]))
        assert rows.sum() == 1 and not rows[[0, -1]].any()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_white_level_maps_its_window_to_the_whole_range(dtype):
    values = np.array([[0, 500], [1000, 4095]]).astype(dtype)
    for window, black, white in ((4095, 0, 4095), ((500, 1000), 500, 1000), ([100.5, 3000.25], 100.5, 3000.25)):
        found = pixels(Image.fromarray(values), (2, 2), 1, "TIFF", white_level=window)[..., 0]
        exact = ((values.astype(float) - black) / (white - black)).clip(0, 1) * 65535
        assert found.dtype == np.uint16
        np.testing.assert_allclose(found, exact, atol=0.51)
        eight = pixels(Image.fromarray(values), (2, 2), 1, "TIFF", white_level=window, bits=8)[..., 0]
        np.testing.assert_allclose(eight, exact / 257, atol=0.51)


def test_a_white_level_maps_arrays_but_not_their_alpha():
    array = random_array(4, 4, 4, dtype=np.uint16) // 16
    array[..., 3] = 65535
    exact = (array[..., :3] / 2000).clip(0, 1) * 65535
    found = decode_image(npy(array), ImageFormat((4, 4), 3, white_level=2000)).permute(1, 2, 0)
    np.testing.assert_allclose(found.numpy(), exact, atol=0.51)


def test_a_white_level_leaves_images_of_8_bits_unchanged():
    photo = Image.fromarray(load_sample_image("china.jpg")[:30, :30])
    for data, channels in ((file(photo), 3), (npy(np.asarray(photo)), 4), (npy(random_array(30, 30, 5)), 5)):
        forms = [ImageFormat((20, 20), channels, white_level=level) for level in (None, 100)]
        assert torch.equal(*(decode_image(data, form) for form in forms))


TINY_FILE = file(Image.new("RGB", (4, 4)))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header states another size than its pixels have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return TINY_FILE[:8] + chunk(b"IHDR", header) + TINY_FILE[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (TINY_FILE[:45], "truncated|broken"),
        (b"", "neither an array of NumPy nor a picture"),
        (png_of_size(100_000, 100_000), "10000000000 pixels.* exceeds limit of .* decompression bomb"),
        (b"P6\n100000 100000\n255\n", "10000000000 pixels.* exceeds limit of .* decompression bomb"),
        (file(Image.fromarray(np.array([[-1024, 3071]], np.int32)), "TIFF"), "from -1024 to 3071 .*white_level"),
        (file(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF"), "floats has no known range.*white_level"),
    ],
)
def test_the_reason_why_a_picture_cannot_be_read_is_said(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(data, ImageFormat((4, 4)))


def test_floats_that_are_not_finite_are_refused_with_a_white_level():
    data = file(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")
    with pytest.raises(UnreadableImage, match="NaN or infinite"):
        decode_image(data, ImageFormat((4, 4), 1, white_level=1))


@pytest.mark.parametrize("entry", [None, {"bytes": None, "path": None}])
def test_a_missing_image_is_unreadable(entry):
    with pytest.raises(UnreadableImage, match="the image is missing: null"):
        read_entry(entry)


def test_a_file_that_cannot_be_opened_is_unreadable(tmp_path):
    for path in (tmp_path, tmp_path / "absent.png", "nul\0.png"):
        with pytest.raises(UnreadableImage, match="not a file but a folder|No such file|null byte"):
            read_entry({"bytes": None, "path": str(path)})
    (tmp_path / "here.png").write_bytes(b"here")
    assert read_entry({"bytes": None, "path": str(tmp_path / "here.png")}) == b"here"


@pytest.mark.parametrize(("kind", "reason"), [("fifo", "a named pipe"), ("device", "a device"), ("socket", "a socket")])
def test_special_files_are_refused_without_waiting(tmp_path, kind, reason):
    path = {"device": "/dev/zero"}.get(kind, str(tmp_path / "a.png"))
    if kind == "fifo":
        os.mkfifo(path)
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "socket":
            server.bind(path)
        (tmp_path / "link.png").symlink_to(path)
        reads = [path, f"file://{path}", str(tmp_path / "link.png")]
        with ThreadPoolExecutor(3) as pool:
            results = [pool.submit(read_entry, {"bytes": None, "path": read}) for read in reads]
            try:
                for result in results:
                    with pytest.raises(UnreadableImage, match=f"not a file but {reason}"):
                        result.result(timeout=20)
            finally:
                if kind == "fifo":  # lets threads that wait go on
                    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """The file with some bytes changed, cut off, left out or repeated."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 6)):
        changed[random.integers(len(data))] = random.choice([0, 1, 127, 128, 255, random.integers(256)])
    start, stop = sorted(random.integers(len(data), size=2))
    way = random.integers(6)
    return bytes(changed[:stop] if way == 0 else changed[:start] + changed[stop:] if way == 1 else changed)


def test_every_damaged_file_is_read_or_refused_with_a_reason():
    warnings.simplefilter("ignore")  # Pillow's, about damaged tags
    random, read, refused = np.random.default_rng(0), 0, 0
    photo, tags = Image.fromarray(load_sample_image("flower.jpg")[:24, :16]), Image.Exif()
    tags[0x112], tags[0x110] = 6, "camera"
    options = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "exif": tags}
    form = ImageFormat((8, 8), 3, white_level=(0, 255))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO"):
        data = file(photo, kind, **(options if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}))
        for _ in range(300):
            try:
                changed = damaged(data, random)
                image = decode_image(changed, form)
                assert image.shape == (3, 8, 8) and image.dtype in (torch.uint8, torch.uint16)
                assert all(isinstance(lost, bool) for lost in losses(changed).values())
                read += 1
            except UnreadableImage as error:
                assert str(error)
                refused += 1
    assert read > 200 and refused > 200 and read + refused == 3000
