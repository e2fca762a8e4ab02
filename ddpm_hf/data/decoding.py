"""Decode image files of any kind into tensors of one size and number of channels."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps

from ddpm_hf.checks import check_choice, check_int

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DEEP = 257  # 65535 / 255: an 8-bit value times this is the same brightness in 16 bits
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFormat:
    """The size, channels and depth that every image of a data set is converted to.

    An image is turned upright by its EXIF tag. With 1 or 3 channels, transparent parts are composited onto `background`.
    The image is then resized with LANCZOS: to cover `size`, and cropped at the center (`crop="center"`), or to fit inside
    it, and padded with `background`, or with transparency for 4 channels (`crop="pad"`).

    Args:
        size: (H, W) in pixels.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA). Other images are converted.
        crop: "center" (or its British spelling) or "pad".
        background: a color that Pillow knows, such as "white" or "#808080".
        bits: 8 rounds 16-bit images to 8 bits; None keeps 16 bits. Only gray images have 16: Pillow reads color at 8.

    Raises:
        ValueError: for an argument that is not one of these.
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    background: str = "white"
    bits: int | None = None

    def __post_init__(self):
        check_choice("channels", self.channels, PILLOW_MODES)
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

    Raises one of `UNREADABLE` for a broken image, and for one whose range of values is unknown.
    """
    with Image.open(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("an image of floats has no known range of values to map to [-1, 1]")
        pixels = _decode_deep(image, form) if image.mode.startswith("I") else _decode(image, form)
    # Transposed by NumPy: threads of torch may hang in a forked process.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def reads_at_8_bits(data: bytes) -> bool:
    """Whether the file is a 16-bit PNG with color or alpha, which Pillow reads at 8 bits."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[24] == 16 and data[25] != 0


def _decode(image: Image.Image, form: ImageFormat) -> np.ndarray:
    mode = PILLOW_MODES[form.channels]
    if form.channels != 4 and image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, form.background), image.convert("RGBA"))
    fill = (0, 0, 0, 0) if form.channels == 4 else ImageColor.getcolor(form.background, mode)
    return np.array(_resize(image.convert(mode), form, fill)).reshape(*form.size, form.channels)


def _decode_deep(image: Image.Image, form: ImageFormat) -> np.ndarray:
    # In float32, which holds 16 bits exactly: Pillow's conversion to 8 bits clips instead of scaling.
    values = np.asarray(image, np.float32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integers from {values.min():.0f} to {values.max():.0f} exceed 16 bits, 0..65535")
    alpha = np.where(values == image.info.get("transparency", -1), np.float32(0), np.float32(65535))
    background = 0
    if form.channels != 4:
        background = ImageColor.getcolor(form.background, "L") * DEEP
        values = np.where(alpha > 0, values, np.float32(background))
    planes = [_resize(Image.fromarray(values), form, background)] * min(form.channels, 3)
    if form.channels == 4:
        planes.append(_resize(Image.fromarray(alpha), form, 0))
    pixels = np.stack(planes, axis=-1).round().clip(0, 65535)
    return (pixels / DEEP).round().astype(np.uint8) if form.bits == 8 else pixels.astype(np.uint16)


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
