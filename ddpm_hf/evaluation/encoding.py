"""Sampled images as integers and as PNG files. Needs numpy and Pillow alone."""

import io

import numpy as np
from PIL import Image

from ddpm_hf.checks import check_choice

PNG_CHANNELS = (1, 2, 3, 4)  # gray, gray and alpha, RGB, RGBA


def quantize(images: np.ndarray, bits: int) -> np.ndarray:
    """Images in [0, 1] rounded to 2^bits levels, as uint8 or uint16. Raises ValueError for `bits` other than 8 and 16."""
    check_choice("bits", bits, (8, 16))
    levels = (np.clip(images, 0, 1).astype(np.float64) * (2**bits - 1)).round()
    return levels.astype(np.uint8 if bits == 8 else np.uint16)


def png_bytes(image: np.ndarray) -> bytes:
    """An image (H, W, C) as a PNG file: uint8 with 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA) channels, or uint16
    gray. Raises ValueError for another image; Pillow writes no color of 16 bits."""
    channels = PNG_CHANNELS if image.dtype == np.uint8 else PNG_CHANNELS[:1]
    if image.dtype not in (np.uint8, np.uint16) or image.ndim != 3 or image.shape[-1] not in channels:
        raise ValueError(f"image must be uint8 (H, W, 1 to 4) or uint16 (H, W, 1), got {image.dtype} {image.shape}.")
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return stream.getvalue()
