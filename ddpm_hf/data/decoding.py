"""Image files of every kind -> tensors of one size and number of channels."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CROPS = ("center", "pad")
DEEP = 257  # 65535 / 255: an 8-bit value times this is the same brightness in 16 bits
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFormat:
    """What every image of a data set is brought to.

    It is turned upright by its EXIF tag. Where `channels` is 1 or 3, transparent parts are laid on `background`. Then it
    is scaled by LANCZOS: to cover `size`, and cut at the center (`crop="center"`), or to fit inside, and filled up with
    `background`, or transparent where `channels` is 4 (`crop="pad"`).

    Args:
        size: (H, W). channels: 1 (gray), 3 (RGB) or 4 (RGBA); images of another kind are converted.
        crop: "center" or "pad". background: a color that Pillow knows, such as "white" or "#808080".
        bits: 8 rounds deeper images to 8 bits; None keeps them at 16. (Gray ones: Pillow reads color at 8.)
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    background: str = "white"
    bits: int | None = None

    def __post_init__(self):
        if self.channels not in PILLOW_MODES:
            raise ValueError(f"channels must be one of {list(PILLOW_MODES)}, got {self.channels!r}.")
        if self.bits not in (None, 8):
            raise ValueError(f"bits must be 8 or None, got {self.bits!r}.")
        check_crop_and_background(self.crop, self.background)
        object.__setattr__(self, "size", tuple(self.size))


def check_crop_and_background(crop: str, background: str) -> None:
    """ValueError for a crop or a color that is none."""
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {list(CROPS)}, got {crop!r}.")
    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a color such as 'white' or '#808080', got {background!r}.") from error


def read_entry(entry: dict) -> bytes:
    """The file of an undecoded image ({"bytes", "path"}), which may lie on the Hub."""
    if entry["bytes"] is not None:
        return entry["bytes"]
    if "://" not in entry["path"]:
        return Path(entry["path"]).read_bytes()
    with fsspec.open(entry["path"], "rb") as file:
        return file.read()


def decode_image(data: bytes, form: ImageFormat) -> torch.Tensor:
    """An image file to (C, H, W), uint8 or, where it has more than 8 bits, uint16.

    Raises one of `UNREADABLE` for a broken image, and for one whose range of values nothing tells.
    """
    with Image.open(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("an image of floats has no range of values that could be taken to [-1, 1]")
        pixels = _decode_deep(image, form) if image.mode.startswith("I") else _decode(image, form)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def reads_at_8_bits(data: bytes) -> bool:
    """Whether the file is a PNG of 16 bits whose colors or transparency Pillow reads at 8."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[24] == 16 and data[25] != 0


def _decode(image: Image.Image, form: ImageFormat) -> np.ndarray:
    mode = PILLOW_MODES[form.channels]
    if form.channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, form.background), image)
    with warnings.catch_warnings():
        # A palette whose transparency is given in bytes: Pillow says that RGBA would keep it, which it is or was made.
        warnings.simplefilter("ignore", UserWarning)
        image = image.convert(mode)
    fill = (0, 0, 0, 0) if form.channels == 4 else ImageColor.getcolor(form.background, mode)
    return np.array(_resize(image, form, fill)).reshape(*form.size, form.channels)


def _decode_deep(image: Image.Image, form: ImageFormat) -> np.ndarray:
    """Gray of 16 bits, in floats: Pillow's own conversion to fewer bits clips instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integers from {values.min()} to {values.max()} are not those of 16 bits, 0..65535")
    opaque = np.ones_like(values)
    if (transparent := image.info.get("transparency")) is not None:
        opaque = (values != transparent).astype(np.int64)
    background = ImageColor.getcolor(form.background, "L") * DEEP
    if form.channels != 4:
        values = np.where(opaque, values, background)

    def scaled(plane: np.ndarray, fill: int) -> np.ndarray:
        floats = _resize(Image.fromarray(plane.astype(np.float32)), form, fill)
        return np.asarray(floats).round().clip(0, 65535).astype(np.int64)

    planes = [scaled(values, 0 if form.channels == 4 else background)] * min(form.channels, 3)
    if form.channels == 4:
        planes.append(scaled(opaque * 65535, 0))
    pixels = np.stack(planes, axis=-1)
    return ((pixels + DEEP // 2) // DEEP).astype(np.uint8) if form.bits == 8 else pixels.astype(np.uint16)


def _resize(image: Image.Image, form: ImageFormat, fill) -> Image.Image:
    H, W = form.size
    if image.size == (W, H):
        return image
    if form.crop == "center":
        return ImageOps.fit(image, (W, H), method=Image.Resampling.LANCZOS)
    return ImageOps.pad(image, (W, H), method=Image.Resampling.LANCZOS, color=fill)


def stack_images(images: Sequence[torch.Tensor], dim: int | None = None) -> torch.Tensor:
    """(N, C, H, W) of images (or, along `dim`, of batches); uint16 where one of them is, with 8-bit ones taken there."""
    if any(image.dtype == torch.uint16 for image in images):
        images = [x if x.dtype == torch.uint16 else (x.int() * DEEP).to(torch.uint16) for x in images]
    return torch.stack(list(images)) if dim is None else torch.cat(list(images), dim)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 images 0..255, or uint16 ones 0..65535, to float32 in [-1, 1]. An 8-bit value is the same either way."""
    values = images.to(torch.float32)
    return (values / DEEP if images.dtype == torch.uint16 else values) / 127.5 - 1
