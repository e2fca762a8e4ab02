"""Pictures are turned upright and converted to sRGB, whatever else their files hold, and what is lost is noticed."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from sklearn.datasets import load_sample_image

from ddpm_hf.data.pictures import losses, read_orientation, read_picture
from tests.data.test_decoding import RAMP, file, png

PHOTO = Image.fromarray(load_sample_image("flower.jpg")[200:240, 300:364])
COLORS = np.stack([RAMP] * 3, -1)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


def exif(*entries: tuple[int, int, int, bytes], order: str = ">") -> bytes:
    """EXIF data with these entries: tag, type, count and the four bytes of the value."""
    packed = b"".join(struct.pack(order + "HHL4s", *entry) for entry in entries)
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HL", 42, 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + packed + bytes(4)


def orientation(value: int, order: str = ">", kind: int = 3) -> tuple[int, int, int, bytes]:
    return (0x112, kind, 1, struct.pack(order + ("H2x" if kind == 3 else "L"), value))


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_plain_pillow_turns_them(kind, value):
    tags = Image.Exif()
    tags[0x112] = value
    data = file(PHOTO, kind, exif=tags)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == (PHOTO.size if value < 5 else PHOTO.size[::-1])
    assert same(read_picture(data), expected)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", range(14))
def test_no_other_exif_tag_fails_a_picture_or_its_orientation(kind, order):
    warnings.simplefilter("ignore")  # Pillow's, about the tags
    expected = Image.open(io.BytesIO(file(PHOTO, "JPEG"))).transpose(Image.Transpose.ROTATE_270)
    for tag in (0x10F, 0x110, 0x11A, 0x128, 0x132, 0x8298, 0x8769, 0x8825, 0xA005, 0xB000):
        for count in (0, 1, 2, 5, 2**31):
            for value in (bytes(4), b"\xff" * 4, b"\x00\x00\x00\x40"):
                entries = sorted([orientation(6, order), (tag, kind, count, value)])
                assert same(read_picture(file(PHOTO, "JPEG", exif=exif(*entries, order=order))), expected)


def tiff(values: np.ndarray, *extra: tuple[int, int, int]) -> bytes:
    """A TIFF of 16-bit RGB, which Pillow does not write, with more tags: number, type and value."""
    height, width, _ = values.shape
    count = 9 + len(extra)
    depths = 14 + 12 * count
    tags = [(256, 3, width), (257, 3, height), (258, 3, depths), (259, 3, 1), (262, 3, 2), (273, 4, depths + 6)]
    tags += [(277, 3, 3), (278, 3, height), (279, 4, values.size * 2), *extra]
    entries = [struct.pack("<HHLL", tag, kind, 3 if tag == 258 else 1, value) for tag, kind, value in sorted(tags)]
    head = b"II*\0" + struct.pack("<LH", 8, count) + b"".join(entries) + bytes(4)
    return head + struct.pack("<3H", 16, 16, 16) + values.astype("<u2").tobytes()


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("tag", [700, 34665, 34853, 40965])
def test_no_directory_of_other_tags_fails_a_tiff(tag, kind):
    warnings.simplefilter("ignore")  # Pillow's, about the tags
    plain = Image.open(io.BytesIO(tiff(COLORS[:8])))
    expected = plain.transpose(Image.Transpose.ROTATE_270)
    for value in (0, 7, 9, 60, 60_000):
        assert same(read_picture(tiff(COLORS[:8], (274, 3, 6), (tag, kind, value))), expected)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, None),
        ({"exif": exif(orientation(6))}, 6),
        ({"exif": b"Exif\0\0" + exif(orientation(6, "<", 4), order="<")}, 6),
        ({"exif": exif((0x112, 2, 1, b"6\0\0\0"))}, None),
        ({"exif": exif(orientation(6))[:-8]}, None),
        ({"exif": b"Exif\0\0nothing"}, None),
        ({"Raw profile type exif": "\nexif\n  32\n" + exif(orientation(8)).hex()}, 8),
        ({"Raw profile type exif": "\nexif\n  32\nno hex"}, None),
        ({"xmp": b'<x tiff:Orientation="3"/>'}, 3),
        ({"XML:com.adobe.xmp": "<tiff:Orientation>3</tiff:Orientation>"}, 3),
        ({"exif": exif(orientation(1)), "xmp": b'tiff:Orientation="3"'}, 1),
    ],
)
def test_the_orientation_is_that_of_exif_or_else_of_xmp(info, expected):
    assert read_orientation(info) == expected


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">l", round(value * 65536)) for value in values)


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.4, of these tags (ICC.1:2001-04)."""
    table, contents, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table, contents = table + struct.pack(">4sLL", name, at + len(contents), len(value)), contents + value
    size = at + len(contents)
    head = struct.pack(">L4sL4s4s4s12x4s", size, b"", 0x02400000, b"mntr", space, pcs, b"acsp")
    head = (head + bytes(28) + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0")
    return head + struct.pack(">L", len(tags)) + table + contents


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">LH", 1, round(gamma * 256))


# The columns are the primaries in XYZ, relative to D50, as in the profiles of Adobe and Apple.
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def rgb_profile(primaries: np.ndarray, gamma: float = 2.19921875) -> bytes:
    colors = {
        name + b"XYZ": b"XYZ " + bytes(4) + fixed(*column) for name, column in zip((b"r", b"g", b"b"), primaries.T)
    }
    curves = {name + b"TRC": gamma_curve(gamma) for name in (b"r", b"g", b"b")}
    return profile(b"RGB ", b"XYZ ", colors | curves)


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("primaries", [ADOBE_RGB, DISPLAY_P3])
def test_colors_of_an_rgb_profile_are_converted_to_srgb(primaries, mode):
    image = PHOTO.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    data = file(image, icc_profile=rgb_profile(primaries))
    found, colors = read_picture(data), np.asarray(image.convert("RGB")) / 255
    expected = srgb_levels(colors**2.19921875 @ primaries.T @ np.linalg.inv(SRGB_TO_XYZ).T)
    assert abs(expected - 255 * colors).max() > 5 and not losses(data)["unprofiled"]
    np.testing.assert_allclose(np.asarray(found.convert("RGB")), expected, atol=2)
    assert found.mode == ("RGBA" if mode == "RGBA" else "RGB")
    if mode == "RGBA":
        assert same(found.getchannel("A"), image.getchannel("A"))


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_gray_values_of_a_gray_profile_are_converted_to_srgb(mode):
    image = Image.linear_gradient("L").convert(mode)
    found = read_picture(file(image, icc_profile=profile(b"GRAY", b"XYZ ", {b"kTRC": gamma_curve(1.8)})))
    expected = srgb_levels((np.asarray(image.convert("L")) / 255) ** 1.8)
    np.testing.assert_allclose(np.asarray(found.convert("L")), expected, atol=2)


def test_colors_of_a_cmyk_profile_are_converted_to_srgb():
    """A profile whose lightness L* falls from 100 to 0 with black alone."""
    identity = bytes(range(256))
    corners = b"".join(bytes([0 if i % 2 else 255, 128, 128]) for i in range(16))  # black varies fastest
    table = bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * identity + corners + 3 * identity
    cmyk = profile(b"CMYK", b"Lab ", {b"A2B0": b"mft1" + bytes(4) + table})
    black = np.arange(0, 256, 5, dtype=np.uint8)[None]
    inks = np.stack([np.full_like(black, 90), black[:, ::-1], np.zeros_like(black), black], -1)
    found = read_picture(file(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=cmyk))
    lightness = 100 * (1 - black / 255)
    f = (lightness + 16) / 116
    luminance = np.where(lightness > 8, f**3, lightness / 903.3)
    assert found.mode == "RGB"
    np.testing.assert_allclose(np.asarray(found), np.stack([srgb_levels(luminance)] * 3, -1), atol=2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_profile_of_srgb_changes_no_pixel(mode):
    image = PHOTO.convert(mode)
    data = file(image, icc_profile=SRGB)
    assert same(read_picture(data), image) and not losses(data)["unprofiled"]


@pytest.mark.parametrize(
    ("image", "icc"),
    [
        (PHOTO, b"no profile"),
        (PHOTO, rgb_profile(ADOBE_RGB)[:200]),
        (PHOTO, profile(b"RGB ", b"XYZ ", {})),
        (PHOTO, profile(b"GRAY", b"XYZ ", {b"kTRC": gamma_curve(1.0)})),
        (PHOTO, profile(b"CMYK", b"Lab ", {})),
        (Image.fromarray(RAMP), profile(b"GRAY", b"XYZ ", {b"kTRC": gamma_curve(1.0)})),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_noticed(image, icc):
    data = file(image, icc_profile=icc)
    assert same(read_picture(data), image) and losses(data)["unprofiled"]
    assert not losses(file(image))["unprofiled"]


def ppm(values: np.ndarray, maximum: int) -> bytes:
    kind = b"P6" if values.ndim == 3 else b"P5"
    head = b"%s\n%d %d\n%d\n" % (kind, values.shape[1], values.shape[0], maximum)
    return head + values.astype(">u2" if maximum > 255 else "u1").tobytes()


def with_depth(data: bytes, at: int, depths: bytes) -> bytes:
    return data[:at] + depths + data[at + len(depths) :]


@pytest.mark.parametrize(
    ("deep", "shallow"),
    [
        (png(COLORS, 2), file(PHOTO)),
        (tiff(COLORS), file(PHOTO, "TIFF")),
        (ppm(COLORS, 65535), ppm(COLORS // 257, 255)),
        (ppm(COLORS // 64, 1023), ppm(RAMP, 65535)),
    ],
)
def test_colors_of_16_bits_that_are_read_at_8_are_noticed(deep, shallow):
    assert losses(deep)["reduced"] and not losses(shallow)["reduced"]
    found = np.asarray(read_picture(deep))
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, COLORS / 257, atol=1)


def test_depths_of_jpeg_2000_avif_and_sgi_colors_are_noticed():
    jpeg = file(PHOTO, "JPEG2000")
    at = jpeg.index(b"\xff\x4f\xff\x51") + 42
    assert not losses(jpeg)["reduced"] and losses(with_depth(jpeg, at, b"\x0f\1\1\x0f\1\1\x0f"))["reduced"]
    assert not losses(file(Image.fromarray(RAMP), "JPEG2000"))["reduced"]  # gray, of which all bits are read
    avif = file(PHOTO, "AVIF")
    ten = avif.replace(b"pixi\0\0\0\0\3\x08\x08\x08", b"pixi\0\0\0\0\3\x0a\x0a\x0a").replace(
        b"av1C\x81\0\x0c", b"av1C\x81\0\x4c"
    )
    assert not losses(avif)["reduced"] and losses(ten)["reduced"]
    sgi = file(PHOTO, "SGI")
    assert not losses(sgi)["reduced"] and losses(file(PHOTO, "SGI", bpc=2))["reduced"]
