"""Images that a pipeline returns as one picture, or as an animation."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from ddpm_hf.checks import ArgumentTypeError, check_choice, check_int, shown

ANIMATIONS = ("GIF", "WEBP", "MP4")
MODES = ("L", "RGB", "RGBA")


def image_grid(
    images: Sequence[Image.Image] | np.ndarray | torch.Tensor,
    columns: int | None = None,
    *,
    scale: int = 1,
    padding: int = 0,
) -> Image.Image:
    """The images in rows of `columns`, as one picture.

    Args:
        images: what a call of a pipeline returns: a list of PIL images, an array (B, H, W, C) or a tensor (B, C, H, W),
            the last two in [0, 1], or uint8. Of images with 2 channels, or more than 4, the first three are red, green
            and blue. All have one size.
        columns: images per row. None: as many as make the grid about square.
        scale: enlarges every pixel to a square of this side.
        padding: white pixels between the images.

    Raises ValueError or TypeError that names the argument.

    Example:
        >>> ddpm_hf.image_grid(pipe(16, seed=0).images).save("samples.png")
    """
    scale, padding = check_int("scale", scale, 1), check_int("padding", padding, 0)
    pictures = [_to_picture(image) for image in _check_images(images)]
    columns = math.ceil(len(pictures) ** 0.5) if columns is None else check_int("columns", columns, 1)
    columns, size = min(columns, len(pictures)), pictures[0].size
    if sizes := {picture.size for picture in pictures} - {size}:
        raise ValueError(f"images must have one size, got {size} and {sizes.pop()}.")
    mode = max((picture.mode for picture in pictures), key=MODES.index)
    width, height = (side * scale + padding for side in size)
    rows = -(-len(pictures) // columns)
    grid = Image.new(mode, (columns * width - padding, rows * height - padding), "white")
    for i, picture in enumerate(pictures):
        enlarged = picture.convert(mode).resize((size[0] * scale, size[1] * scale), Image.Resampling.NEAREST)
        grid.paste(enlarged, (i % columns * width, i // columns * height))
    return grid


def animation_bytes(frames: Sequence[Image.Image], format: str = "GIF", seconds: float = 4.0) -> bytes:
    """Pictures of one size as an animated GIF or WebP file, repeated for ever, or as an MP4 file. The last one stays for
    half as long again as all of them take, `seconds`. Raises ValueError for MP4 if imageio or its PyAV is not installed."""
    check_choice("format", format, ANIMATIONS)
    stream, frames = io.BytesIO(), [frame.convert("RGB") for frame in frames]
    if format == "MP4":
        return _video_bytes(frames, seconds)
    durations = [max(20, round(1000 * seconds / len(frames)))] * len(frames)
    durations[-1] += round(500 * seconds)
    frames[0].save(stream, format, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return stream.getvalue()


def check_video() -> None:
    """Raise ValueError if the libraries for MP4 files are not installed."""
    try:
        import av  # noqa: F401
        import imageio.v3  # noqa: F401
    except ImportError as error:
        raise ValueError("an MP4 file needs imageio and PyAV: pip install imageio av.") from error


def _video_bytes(frames: list[Image.Image], seconds: float) -> bytes:
    check_video()
    import imageio.v3

    rate = max(1, round(len(frames) / seconds))
    width, height = frames[0].size
    border = (0, 0, width % 2, height % 2)  # H.264 has even sides only
    pictures = [np.asarray(ImageOps.expand(frame, border, "white")) for frame in frames]
    pictures += [pictures[-1]] * round(rate * seconds / 2)
    options = {"codec": "libx264", "fps": rate, "out_pixel_format": "yuv420p"}  # what browsers play
    return imageio.v3.imwrite("<bytes>", np.stack(pictures), extension=".mp4", plugin="pyav", **options)


def _check_images(images) -> list:
    if isinstance(images, torch.Tensor):
        images = images.detach().permute(0, 2, 3, 1).cpu().numpy() if images.ndim == 4 else images.numpy(force=True)
    if isinstance(images, np.ndarray) and (images.ndim != 4 or not images.size):
        raise ValueError(f"images must have shape (B, H, W, C), or (B, C, H, W) as a tensor, got {images.shape}.")
    if isinstance(images, np.ndarray) and images.dtype != np.uint8:
        if images.dtype.kind != "f":
            raise ArgumentTypeError(f"images must be floats in [0, 1] or uint8, got {images.dtype}.")
        if not (images.min() >= -1e-4 and images.max() <= 1 + 1e-4):
            hint = "x / 2 + 0.5 is, if x is in [-1, 1]"
            raise ValueError(f"images must be in [0, 1], got {images.min():g} to {images.max():g}: {hint}.")
        images = (images.clip(0, 1) * 255).round().astype(np.uint8)
    if not isinstance(images, (list, tuple, np.ndarray)) or not len(images):
        raise ArgumentTypeError(f"images must be a list of PIL images, an array or a tensor, got {shown(images)}.")
    return list(images)


def _to_picture(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image if image.mode in MODES else image.convert("RGB")
    if not isinstance(image, np.ndarray):
        raise ArgumentTypeError(f"images must be PIL images, an array or a tensor, got a list with {shown(image)}.")
    if image.shape[-1] not in (1, 3, 4):
        image = np.pad(image[..., :3], [(0, 0), (0, 0), (0, max(0, 3 - image.shape[-1]))])
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
