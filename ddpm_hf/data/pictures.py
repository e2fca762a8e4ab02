"""Pictures as Pillow reads them, turned upright and converted to sRGB."""

import io
import re
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, TiffTags

ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_INTEGERS = {3: "H", 4: "L"}  # the types SHORT and LONG
PROFILE_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # by the color space in the header of a profile
SRGB_TOLERANCE = 2  # levels of 255: profiles of sRGB by different makers differ by their rounding


def read_picture(data: bytes) -> Image.Image:
    """The picture of a file, turned upright, with colors of 8 bits in sRGB.

    The orientation is that of the EXIF tag, or else of XMP; what cannot be read of either counts as upright. A color
    profile that cannot be used is ignored: see `losses`. Raises what Pillow raises for a broken file.
    """
    return upright_in_srgb(Image.open(io.BytesIO(data)))


def upright_in_srgb(image: Image.Image) -> Image.Image:
    """What `read_picture` makes of a picture that Pillow has opened."""
    if image.format == "TIFF":
        _load_tiff(image)  # turns it upright
    else:
        image.load()
        if (method := TRANSPOSES.get(read_orientation(image.info))) is not None:
            image = image.transpose(method)
    try:
        transform = _srgb_transform(image)
    except ValueError:
        transform = None
    if transform is None or is_deep(image):
        return image
    converted = transform.apply(image.convert(transform.input_mode))
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def is_deep(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits: integers or floats, one channel."""
    return image.mode[0] in "IF"


def read_orientation(info: dict) -> int | None:
    """The orientation 1..8 in the EXIF or XMP data of `Image.info`, from the one tag alone. None if there is none."""
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:  # of a PNG by ImageMagick
        exif = _from_hex(info["Raw profile type exif"])
    if (orientation := _read_exif_orientation(exif or b"")) is not None:
        return orientation
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp.encode() if isinstance(xmp, str) else xmp)
    return int(found[1]) if found else None


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def _read_exif_orientation(exif: bytes) -> int | None:
    # Pillow's reader fails on other tags, and reads all of them.
    exif = re.sub(b"^(Exif\0\0){1,2}", b"", exif)
    if (order := {b"II": "<", b"MM": ">"}.get(exif[:2])) is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "L", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == ORIENTATION and kind in EXIF_INTEGERS:
                return struct.unpack_from(order + EXIF_INTEGERS[kind], exif, entry + 8)[0]
    except struct.error:  # the directory is cut off
        pass
    return None


def _load_tiff(image: Image.Image) -> None:
    """Load a TIFF without the tags that Pillow would read, and fail on, besides those of the picture."""
    if not isinstance(image.info.get("xmp"), bytes):
        image.info.pop("xmp", None)
    exif = image.getexif()
    for tag in TiffTags.TAGS_V2_GROUPS:
        if tag in exif:
            del exif[tag]
    image.load()


def _srgb_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The transform of a picture's colors to sRGB; None if it needs none. Raises ValueError for a profile that is broken,
    or of other colors than the picture."""
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    mode = PROFILE_MODES.get(profile[16:20]) if isinstance(profile, bytes) else None
    is_gray = image.mode in ("1", "L", "LA", "La") or is_deep(image)
    # The profile of a gray picture may be that of RGB, and a picture with a palette has the profile of its colors.
    if mode is None or (mode == "L") > is_gray or (mode == "CMYK") != (image.mode == "CMYK"):
        raise ValueError(f"a profile of {mode} for a picture of {image.mode}")
    return _profile_transform(profile, mode)


@lru_cache(maxsize=32)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"a broken profile ({error})") from error
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
    colors = Image.fromarray(colors if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    change = np.asarray(transform.apply(colors), int) - np.asarray(colors.convert("RGB"), int)
    return transform if abs(change).max() > SRGB_TOLERANCE else None


def losses(data: bytes) -> dict[str, bool]:
    """What is lost when the picture of a file is read.

    "reduced": it has more than 8 bits per color, such as a 16-bit PNG of RGB, and Pillow reads it at 8. "unprofiled": its
    color profile would change its colors, but is broken, or of other colors than the picture, or of a picture of more
    than 8 bits, which `ImageCms` does not convert.
    """
    with Image.open(io.BytesIO(data)) as image:
        return {"reduced": _reads_at_8_bits(image, data), "unprofiled": _has_unused_profile(image)}


def _has_unused_profile(image: Image.Image) -> bool:
    try:
        return _srgb_transform(image) is not None and is_deep(image)
    except ValueError:
        return True


def _reads_at_8_bits(image: Image.Image, data: bytes) -> bool:
    if is_deep(image):
        return False
    if image.format == "PNG":
        return data[24] == 16
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,))) > 8  # BitsPerSample
    if image.format == "PPM":
        arguments = image.tile[0].args  # "RGB" for a maximum of 255, else ("RGB", maximum)
        return image.mode == "RGB" and isinstance(arguments, tuple) and arguments[1] > 255
    if image.format == "JPEG2000":
        size = data.find(b"\xff\x4f\xff\x51")  # the SIZ segment, with the depth of each component
        (count,) = struct.unpack_from(">H", data, size + 40)
        return max((depth & 0x7F) + 1 for depth in data[size + 42 : size + 42 + 3 * count : 3]) > 8
    if image.format == "AVIF":
        return bool(data[data.find(b"av1C") + 6] & 0x40)  # high_bitdepth
    return image.format == "SGI" and data[3] == 2
