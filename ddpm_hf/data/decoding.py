"""Decode pictures of any kind, and arrays of NumPy, into tensors of one size and number of channels."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ddpm_hf.checks import check_choice, check_int

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_CHANNELS = 8
ARRAY_STARTS = (b"\x93NUMPY", b"PK\x03\x04")  # the first bytes of a .npy file, and of a .npz file, which is a zip file
DEEP = 257  # 65535 / 255: an 8-bit value times this is the same brightness in 16 bits
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFormat:
    """The size, channels and depth that every image of a data set is converted to.

    An image is turned upright by its EXIF tag. With 1 or 3 channels, transparent parts are composited onto `background`.
    The image is then resized with LANCZOS: to cover `size`, and cropped at the center (`crop="center"`), or to fit inside
    it, and padded with `background`, or with transparency for 4 channels (`crop="pad"`).

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

    Raises:
        ValueError: for an argument that is not one of these.
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    background: str = "white"
    bits: int | None = None

    def __post_init__(self):
        check_int("channels", self.channels, 1, MAX_CHANNELS)
        check_choice("bits", self.bits, (8, None))
        object.__setattr__(self, "crop", check_crop_and_background(self.crop, self.background))
        object.__setattr__(self, "size", tuple(check_int("size", length, 1) for length in self.size))


def check_crop_and_background(crop: str, background: str) -> str:
    """The crop in its standard spelling. Raises ValueError for an unknown crop or color."""
    crop = "center" if crop == "centre" else crop  # as older runs wrote it to config.yaml
    check_choice("crop", crop, ("center", "pad"))
    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a color such as 'white' or '#808080', got {background!r}.") from error
    return crop


def read_entry(entry: dict) -> bytes:
    """The file of an undecoded image ({"bytes", "path"}). The path may be a URL, on the Hub for example."""
    if entry["bytes"] is not None:
        return entry["bytes"]
    if "://" not in entry["path"]:
        return Path(entry["path"]).read_bytes()
    with fsspec.open(entry["path"], "rb") as file:
        return file.read()


def decode_image(data: bytes, form: ImageFormat) -> torch.Tensor:
    """The image of a file as (C, H, W): uint16 if it has more than 8 bits and `form` keeps them, uint8 otherwise.

    Raises one of `UNREADABLE` for a broken image, for one whose range of values is unknown, and for one that cannot be
    converted to the channels of `form`.
    """
    if data.startswith(ARRAY_STARTS):
        pixels = _decode_array(read_array(data), form)
    else:
        if form.channels not in PILLOW_MODES:
            raise ValueError(f"a picture has 1, 3 or 4 channels, and channels = {form.channels}: use arrays")
        try:
            opened = Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            raise ValueError("neither an array of NumPy nor a picture that Pillow knows") from error
        with opened as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("an image of floats has no known range of values to map to [-1, 1]")
            pixels = _decode_deep(image, form) if image.mode.startswith("I") else _decode(image, form)
    # Transposed by NumPy: threads of torch may hang in a forked process.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_array(data: bytes) -> np.ndarray:
    """The image (H, W, C), uint8 or uint16, in a .npy file, or in a .npz file with one array. Nothing is unpickled.

    Raises ValueError, which says what is accepted, for an array of another type or shape, and for a broken file.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(array, Mapping):
            (array,) = array.values()
    except Exception as error:  # zipfile and its decompressors raise errors of many types
        raise ValueError(f"not a .npy file, nor a .npz file with one array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "u" or array.dtype.itemsize > 2:
        problem = f"an array must be uint8 or uint16, got {getattr(array, 'dtype', 'no array')}"
        if isinstance(array, np.ndarray) and array.dtype.kind == "f":
            problem += (
                ", whose range of values is unknown; (65535 * x).round().astype('uint16') converts floats x in [0, 1], "
                "and x = (y + 1) / 2 those in [-1, 1]"
            )
        raise ValueError(problem)
    image = array[..., None] if array.ndim == 2 else array
    if image.ndim != 3 or not image.size or image.shape[2] > MAX_CHANNELS:
        accepted = f"(H, W), or (H, W, C) with C of 1 to {MAX_CHANNELS}"
        raise ValueError(f"an array must have shape {accepted}, got {array.shape}")
    return image.astype(image.dtype.newbyteorder("="))


def reads_at_8_bits(data: bytes) -> bool:
    """Whether the file is a 16-bit PNG with color or alpha, which Pillow reads at 8 bits."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[24] == 16 and data[25] != 0


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
    return _decode_planes(planes, alpha, form, is_deep)


def _decode_deep(image: Image.Image, form: ImageFormat) -> np.ndarray:
    # In float32, which holds 16 bits exactly: Pillow's conversion to 8 bits clips instead of scaling.
    values = np.asarray(image, np.float32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integers from {values.min():.0f} to {values.max():.0f} exceed 16 bits, 0..65535")
    alpha = np.where(values == image.info.get("transparency", -1), np.float32(0), np.float32(65535))
    return _decode_planes([values], alpha, form, True)


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
    return ImageOps.fit(image, size, method) if form.crop == "center" else ImageOps.pad(image, size, method, fill)


def match_depth(images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same images, or batches of images: uint16, with 8-bit ones scaled up, if one of them is uint16."""
    if any(image.dtype == torch.uint16 for image in images):
        images = [x if x.dtype == torch.uint16 else (x.int() * DEEP).to(torch.uint16) for x in images]
    return list(images)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 images 0..255, or uint16 images 0..65535, as float32 in [-1, 1]. Both depths map a brightness to one value."""
    values = images.to(torch.float32)
    return (values / DEEP if images.dtype == torch.uint16 else values) / 127.5 - 1
