"""Images and masks in any form, as the tensors that editing and inversion compute with."""

import logging
import os
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ddpm_hf.checks import ArgumentTypeError, check_list, shown
from ddpm_hf.data.decoding import ImageFormat, convert_image, read_entry, read_image, to_signed
from ddpm_hf.data.pictures import upright_in_srgb
from ddpm_hf.models.builders import image_size
from ddpm_hf.pipelines.arguments import check_size

logger = logging.getLogger(__name__)

Picture = Image.Image | str | os.PathLike  # a picture, or the name of a file
GivenImages = torch.Tensor | np.ndarray | Picture | Sequence
FORMS = "a tensor (B, C, H, W), an array (B, H, W, C), a PIL image, the name of a file, or a list of these"


def to_images(pipe: DiffusionPipeline, name: str, images: GivenImages, in_range: bool = True) -> torch.Tensor:
    """Images for the pipeline's network, float32 (B, C, H, W) in [-1, 1].

    Args:
        name: of the argument, for error messages.
        images: one of these, or a list of images of these kinds:
            - a tensor (B, C, H, W), floating point in [-1, 1], or uint8; in a list (C, H, W) too;
            - an array (B, H, W, C), (H, W, C) or (H, W), floating point in [0, 1], as a call with `output_type="np"`
              returns it, or uint8 or uint16;
            - a PIL image, or the name of a file. It is turned upright, cropped at the center, resized, and converted to
              the channels of the network, as training images are by default. Transparent parts become white.
        in_range: refuse floating-point values outside the range.

    Logs a warning for a tensor that looks like images in [0, 1]. Raises ValueError or TypeError that names the argument.
    """
    if isinstance(images, (Image.Image, str, os.PathLike)):
        config = pipe.unet.config
        x = to_signed(_convert_picture(name, images, image_size(config), config.in_channels))[None]
    elif isinstance(images, np.ndarray):
        x = _from_array(name, images, in_range)
    elif isinstance(images, torch.Tensor):
        x = to_signed(images) if images.dtype == torch.uint8 else images
        _warn_if_unit(name, images)
    else:
        return _join(name, [to_images(pipe, name, _batched(item), in_range) for item in _items(name, images)])
    check_images(pipe, name, x, in_range)
    return x.float()


def to_mask(mask: GivenImages, images: torch.Tensor) -> torch.Tensor:
    """The mask as booleans that broadcast against the images, (B, C, H, W): True for a pixel to fill in.

    `mask`: 1 or True for such a pixel, (H, W), or (B, C, H, W) where B and C may be 1; (B, H, W, C) as an array, which
    may also hold 0 and 255. A PIL image, or the name of a file: white for such a pixel; of gray values, the lighter half.
    It is converted to the size of the images as they are. A list holds one mask for each image.
    """
    if isinstance(mask, (Image.Image, str, os.PathLike)):
        pixels = _convert_picture("mask", mask, tuple(images.shape[2:]), 1)
        mask = (to_signed(pixels) >= 0)[None]
    elif isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biuf":
            raise ArgumentTypeError(f"mask must be an array of numbers or of bool, got {mask.dtype}.")
        is_8_bit = mask.dtype == np.uint8 and mask.max(initial=0) > 1
        mask = torch.from_numpy(
            np.ascontiguousarray(mask // 255 if is_8_bit and np.isin(mask, (0, 255)).all() else mask)
        )
        mask = mask.permute(0, 3, 1, 2) if mask.ndim == 4 else mask
    elif not isinstance(mask, torch.Tensor):
        masks = [to_mask(item, images[:1]) for item in _items("mask", mask)]
        mask = _join("mask", masks)
    return _check_mask(mask, images)


def check_images(pipe: DiffusionPipeline, name: str, images: torch.Tensor, in_range: bool = True) -> None:
    """Images must be a floating-point tensor (B, C, H, W) of the model's channels, in [-1, 1] if `in_range`."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ArgumentTypeError(
            f"{name} must be a floating-point tensor (B, C, H, W){in_range * ' in [-1, 1]'}, got {kind}."
        )
    channels = pipe.unet.config.in_channels
    if images.ndim != 4 or images.shape[1] != channels or not len(images):
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {tuple(images.shape)}.")
    check_size(name, pipe.unet, images.shape)
    # Written so that NaN is refused.
    if in_range and not images.abs().max() <= 1 + 1e-4:
        low, high = images.min().item(), images.max().item()
        hint = " Values of 0 to 255 are x / 127.5 - 1 there." if low >= 0 and 2 < high <= 255 else ""
        raise ValueError(f"{name} must lie in [-1, 1], got {low:g} to {high:g}.{hint}")


def _items(name: str, values) -> list:
    if not isinstance(values, (list, tuple)):
        raise ArgumentTypeError(f"{name} must be {FORMS}, got {shown(values)}.")
    return check_list(name, values, lambda _, item: item)


def _batched(item):
    return item[None] if isinstance(item, torch.Tensor) and item.ndim == 3 else item


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if len(shapes := {tuple(part.shape[1:]) for part in parts}) > 1:
        raise ValueError(f"{name} must have one shape, got {sorted(shapes)}.")
    return torch.cat(parts)


def _convert_picture(name: str, picture: Picture, size: tuple[int, int] | None, channels: int) -> torch.Tensor:
    """A picture as (channels, *size), uint8 or uint16. `size` None: its own."""
    source = f" {os.fspath(picture)!r}" if isinstance(picture, (str, os.PathLike)) else ""
    try:
        if isinstance(picture, Image.Image):
            image = upright_in_srgb(picture)
        else:
            image = read_image(read_entry({"bytes": None, "path": os.path.expanduser(os.fspath(picture))}))
        own_size = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        return convert_image(image, ImageFormat(size or own_size, channels))
    except Exception as error:  # of many types, by decoder
        raise ValueError(f"{name}{source} cannot be read: {error}") from error


def _from_array(name: str, array: np.ndarray, in_range: bool) -> torch.Tensor:
    """An array as to_images takes it, in [-1, 1]."""
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        array = array / (256**array.dtype.itemsize - 1)
    elif array.dtype.kind != "f":
        raise ArgumentTypeError(f"{name} must be an array of floats in [0, 1], uint8 or uint16, got {array.dtype}.")
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4:
        raise ValueError(f"{name} must be an array (B, H, W, C), (H, W, C) or (H, W), got shape {array.shape}.")
    if in_range and array.size and not (array.min() >= -1e-4 and array.max() <= 1 + 1e-4):
        hint = "tensors are in [-1, 1], arrays in [0, 1], as a pipeline returns them; those of 0 to 255 are uint8"
        raise ValueError(f"{name} must lie in [0, 1], got {array.min():g} to {array.max():g}: {hint}.")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2), np.float32)) * 2 - 1


def _warn_if_unit(name: str, x: torch.Tensor) -> None:
    if x.is_floating_point() and x.numel() and x.min() >= 0 and x.max() <= 1:
        advice = "images 2 * x - 1, if x is in [0, 1] as a pipeline returns it"
        logger.warning("%s has no value below 0: tensors of images are in [-1, 1]. Give %s.", name, advice)


def _check_mask(mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    mask = mask.reshape(1, 1, *mask.shape) if mask.ndim == 2 else mask
    B, C, *size = images.shape
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[1] not in (1, C) or [*mask.shape[2:]] != size:
        raise ValueError(f"mask must have shape {tuple(size)} or {tuple(images.shape)}, got {tuple(mask.shape)}.")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold only 0 (known pixel) and 1 (pixel to fill in).")
    return mask == 1
