"""Convert pictures of any kind, and arrays of NumPy, to tensors of one size and number of channels."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps

from ddpm_hf.checks import check_choice, check_float, check_int, check_list
from ddpm_hf.data.archives import read_member
from ddpm_hf.data.arrays import ARRAY_STARTS, MAX_CHANNELS, read_array
from ddpm_hf.data.pictures import is_deep, read_picture
from ddpm_hf.data.reasons import reason

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DEEP = 257  # 65535 / 255: an 8-bit value times this is the same brightness in 16 bits
SPECIAL = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}


class UnreadableImage(ValueError):
    """An image that cannot be read or converted. The message is the reason; the caller names the file."""


@contextmanager
def _reasons() -> Iterator[None]:
    """Raise every error as UnreadableImage: decoders raise errors of many types for damaged files."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(reason(error)) from error


@dataclass(frozen=True)
class ImageFormat:
    """The size, channels and depth that every image of a data set is converted to.

    A picture is turned upright by its EXIF tag, and its colors are converted to sRGB. With 1 or 3 channels, transparent
    parts are composited onto `background`. The image is then resized with LANCZOS: to cover `size`, and cropped at the
    center (`crop="center"`), or to fit inside it, and padded with `background`, or with transparency for 4 channels
    (`crop="pad"`).

    An array with as many channels as `channels` is resized channel by channel: 4 channels need not be RGBA. Otherwise an
    array of 1, 3 or 4 channels is converted like a picture. Arrays of other numbers of channels are not converted, and are
    padded with the gray value of `background`.

    Args:
        size: (H, W) in pixels.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA), to which pictures are converted, or the number that all arrays have, 1 to 8.
        crop: "center" (or its British spelling) or "pad".
        background: a color that Pillow knows, such as "white" or "#808080".
        bits: 8 rounds 16-bit images to 8 bits; None keeps 16 bits. Only arrays and gray pictures have 16: Pillow reads color
            at 8.
        white_level: the values that become black and white, or the latter alone if black is 0, in images of more than 8
            bits. Values outside are clipped. None: 0 and 65535, the range of 16 bits; images with other values, and of
            floats, are refused then. Kept as a tuple (black, white).

    Raises:
        ValueError: for an argument that is not one of these.
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    background: str = "white"
    bits: int | None = None
    white_level: tuple[float, float] | Sequence[float] | float | None = None

    def __post_init__(self):
        check_int("channels", self.channels, 1, MAX_CHANNELS)
        check_choice("bits", self.bits, (8, None))
        object.__setattr__(self, "white_level", check_white_level(self.white_level))
        object.__setattr__(self, "crop", check_crop_and_background(self.crop, self.background))
        object.__setattr__(self, "size", tuple(check_list("size", self.size, partial(check_int, minimum=1))))
        if len(self.size) != 2:
            raise ValueError(f"size must be (H, W), got {self.size}.")


def check_crop_and_background(crop: str, background: str) -> str:
    """The crop in its standard spelling. Raises ValueError for an unknown crop or color."""
    crop = "center" if isinstance(crop, str) and crop == "centre" else crop  # as older runs wrote it to config.yaml
    check_choice("crop", crop, ("center", "pad"))
    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a color such as 'white' or '#808080', got {background!r}.") from error
    return crop


def check_white_level(white_level: Sequence[float] | float | None) -> tuple[float, float] | None:
    """The values (black, white) of a `white_level`. Raises ValueError if white is not above black."""
    if white_level is None:
        return None
    levels = check_list("white_level", [white_level] if isinstance(white_level, Real) else white_level, check_float)
    black, white = (0.0, *levels) if len(levels) == 1 else levels if len(levels) == 2 else (0.0, 0.0)
    if not black < white:
        accepted = "a value above 0, or two: those of black and of white, the second above the first"
        raise ValueError(f"white_level must be {accepted}, got {white_level!r}.")
    return black, white


@_reasons()
def read_entry(entry: dict | None) -> bytes:
    """The file of an undecoded image ({"bytes", "path"}). The path may be a URL, on the Hub for example, or that of a file in
    an archive (see `archives`).

    Raises UnreadableImage for a missing image (None), and a file that cannot be read or is none, such as a named pipe.
    """
    if entry is None or (entry["bytes"] is None and entry["path"] is None):
        raise UnreadableImage("the image is missing: null")
    if entry["bytes"] is not None:
        return entry["bytes"]
    path = entry["path"].removeprefix("file://")
    if "://" not in path:
        _check_is_file(path)
        return Path(path).read_bytes()
    if (data := read_member(path)) is not None:
        return data
    with fsspec.open(path, "rb") as file:
        return file.read()


def _check_is_file(path: str) -> None:
    # Reading a pipe or a device would wait for ever.
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in SPECIAL.items() if test(mode)), "a device")
        raise UnreadableImage(f"not a file but {kind}")


@_reasons()
def read_image(data: bytes) -> Image.Image | np.ndarray:
    """The image of a file, not converted yet: a picture, or an array (H, W, C). Raises UnreadableImage for a broken image."""
    return read_array(data) if data.startswith(ARRAY_STARTS) else read_picture(data)


def decode_image(data: bytes, form: ImageFormat) -> torch.Tensor:
    """The image of a file as (C, H, W): uint16 if it has more than 8 bits and `form` keeps them, uint8 otherwise.

    Raises UnreadableImage for a broken image, for one whose range of values is unknown, and for one that cannot be
    converted to the channels of `form`.
    """
    return convert_image(read_image(data), form)


@_reasons()
def convert_image(image: Image.Image | np.ndarray, form: ImageFormat) -> torch.Tensor:
    """The image of `read_image` as `decode_image` returns it. Raises UnreadableImage if it cannot be converted."""
    if isinstance(image, np.ndarray):
        pixels = _decode_array(image, form)
    elif form.channels not in PILLOW_MODES:
        raise ValueError(f"a picture has 1, 3 or 4 channels, and channels = {form.channels}: use arrays")
    else:
        pixels = _decode_deep(image, form) if is_deep(image) else _decode(image, form)
    # Transposed by NumPy: threads of torch may hang in a forked process.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def value_range(image: Image.Image | np.ndarray) -> tuple[float, float] | None:
    """The least and the greatest value in an image of `read_image` with more than 8 bits; None for one with 8."""
    if is_deep(image) if isinstance(image, Image.Image) else image.dtype == np.uint16:
        values = np.asarray(image)
        return float(values.min()), float(values.max())
    return None


def _decode(image: Image.Image, form: ImageFormat) -> np.ndarray:
    mode = PILLOW_MODES[form.channels]
    if form.channels != 4 and image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, form.background), image.convert("RGBA"))
    fill = (0, 0, 0, 0) if form.channels == 4 else ImageColor.getcolor(form.background, mode)
    return np.array(_resize(image.convert(mode), form, fill)).reshape(*form.size, form.channels)


def _decode_array(image: np.ndarray, form: ImageFormat) -> np.ndarray:
    channels, is_deep = image.shape[2], image.dtype == np.uint16
    is_converted = channels != form.channels
    if is_converted and not {channels, form.channels} <= PILLOW_MODES.keys():
        raise ValueError(f"the array has {channels} channels, and channels = {form.channels}")
    if not is_deep and (is_converted or channels in (1, 3)):  # as a picture with these pixels
        return _decode(Image.fromarray(image.squeeze(2) if channels == 1 else image), form)
    planes = list(np.moveaxis(image.astype(np.float32) * (1 if is_deep else DEEP), 2, 0))
    alpha = planes.pop() if is_converted and channels == 4 else None
    if is_deep:
        planes = [_apply_white_level(plane, form) for plane in planes]
    return _decode_planes(planes, alpha, form, is_deep)


def _decode_deep(image: Image.Image, form: ImageFormat) -> np.ndarray:
    # In float32, which holds 16 bits exactly: Pillow's conversion to 8 bits clips instead of scaling.
    values, advice = np.asarray(image, np.float32), "white_level maps the values of black and white to [-1, 1]"
    if form.white_level is None and image.mode == "F":
        raise ValueError(f"an image of floats has no known range of values to map to [-1, 1]; {advice}")
    if not np.isfinite(values).all():
        raise ValueError("some values are NaN or infinite")
    if form.white_level is None and (values.min() < 0 or values.max() > 65535):
        found = f"integers from {values.min():.0f} to {values.max():.0f} exceed 16 bits, 0..65535"
        raise ValueError(f"{found}; {advice}")
    alpha = np.where(values == image.info.get("transparency", -1), np.float32(0), np.float32(65535))
    return _decode_planes([_apply_white_level(values, form)], alpha, form, True)


def _apply_white_level(values: np.ndarray, form: ImageFormat) -> np.ndarray:
    """float32 values with those between black and white scaled to 0..65535, and others clipped."""
    if form.white_level is None:
        return values
    black, white = form.white_level
    return ((values - np.float32(black)) * np.float32(65535 / (white - black))).clip(0, 65535)


def _decode_planes(planes: list[np.ndarray], alpha: np.ndarray | None, form: ImageFormat, is_deep: bool) -> np.ndarray:
    """(H, W, C) of channels (h, w), float32 in 0..65535, one by one: Pillow has no color of floats. They are as many as
    those of `form`, or gray or RGB, with or without `alpha`."""
    is_color = form.channels == 3
    background = np.float32(ImageColor.getcolor(form.background, "RGB" if is_color else "L")) * DEEP
    fill = [0] * 4 if form.channels == 4 else np.broadcast_to(background, form.channels)
    if len(planes) == 1:
        planes = planes * min(form.channels, 3)
    elif len(planes) == 3 and form.channels == 1:
        planes = [0.299 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]]  # ITU-R 601, as Pillow's "L"
    if form.channels == 4 and len(planes) == 3:
        planes = [*planes, np.full_like(planes[0], 65535) if alpha is None else alpha]
    elif alpha is not None:
        planes = [color * (alpha / 65535) + back * (1 - alpha / 65535) for color, back in zip(planes, fill)]
    resized = [np.asarray(_resize(Image.fromarray(plane), form, float(back))) for plane, back in zip(planes, fill)]
    pixels = np.stack(resized, axis=-1).round().clip(0, 65535)
    return pixels.astype(np.uint16) if is_deep and form.bits != 8 else (pixels / DEEP).round().astype(np.uint8)


def _resize(image: Image.Image, form: ImageFormat, fill) -> Image.Image:
    size, method = form.size[::-1], Image.Resampling.LANCZOS
    if form.crop == "center":
        return ImageOps.fit(image, size, method)
    width, height = image.size
    if round(height / width * size[0]) == 0:  # less than half a pixel, which versions of Pillow refuse
        image = image.resize((size[0], 1), method)
    elif round(width / height * size[1]) == 0:
        image = image.resize((1, size[1]), method)
    return ImageOps.pad(image, size, method, fill)


def match_depth(images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same images, or batches of images: uint16, with 8-bit ones scaled up, if one of them is uint16."""
    if any(image.dtype == torch.uint16 for image in images):
        images = [x if x.dtype == torch.uint16 else (x.int() * DEEP).to(torch.uint16) for x in images]
    return list(images)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 images 0..255, or uint16 images 0..65535, as float32 in [-1, 1]. Both depths map a brightness to one value."""
    values = images.to(torch.float32)
    return (values / DEEP if images.dtype == torch.uint16 else values) / 127.5 - 1
