"""Files of samples: write them, and read those of training/sample.py or of another program, through the decoder of training
images."""

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch

from ddpm_hf.data.arrays import array_file
from ddpm_hf.data.columns import find_column
from ddpm_hf.data.decoding import ImageFormat, convert_image, read_entry, read_image
from ddpm_hf.data.listing import list_images
from ddpm_hf.evaluation.encoding import png_bytes

Files = Callable[[int], tuple[str, bytes]]  # from an index, the name of an image and its file


def read_samples(source: str, num_samples: int, size: tuple[int, int], channels: int) -> torch.Tensor:
    """The first `num_samples` images, uint8 (N, C, H, W).

    Args:
        source: a folder of pictures, or of arrays, with its subfolders, in the order of their paths; a .npz file with
            images (N, H, W, C), uint8 or uint16, as `arr_0` or the only array; or a .parquet file with a column of images.
        num_samples: how many are read.
        size: (H, W) of every image.
        channels: to which images are converted.

    Raises ValueError if there are fewer images, and for one that cannot be read or has another size.
    """
    path = Path(source).expanduser()
    readers = {".npz": _npz_images, ".parquet": _parquet_images}
    if path.is_dir():
        total, read = _folder_images(path)
    elif path.is_file() and path.suffix.lower() in readers:
        total, read = readers[path.suffix.lower()](path)
    else:
        raise ValueError(f"samples must be a folder, a .npz or a .parquet file, got {source!r}.")
    if total < num_samples:
        raise ValueError(f"--samples {source!r} holds {total} images, num_samples is {num_samples}.")
    form, images = ImageFormat(size, channels, bits=8), []
    for i in range(num_samples):
        name = f"image {i}"
        try:
            name, data = read(i)
            image = read_image(data)
            images.append(convert_image(image, form))
        except (OSError, ValueError) as error:
            raise ValueError(f"samples {source!r}: {name} cannot be read: {error}") from error
        found = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        if found != tuple(size):
            raise ValueError(f"samples must have the model's resolution {tuple(size)}: {name} is {found}.")
    return torch.stack(images)


def _folder_images(folder: Path) -> tuple[int, Files]:
    entries = sorted(entry for entries in list_images(folder).splits.values() for entry in entries)
    if not entries:
        raise ValueError(f"the folder {str(folder)!r} holds no image.")
    return len(entries), lambda i: (entries[i].name, entries[i].read())


def _npz_images(file: Path) -> tuple[int, Files]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            name = arrays.files[0] if len(arrays.files) == 1 else "arr_0"
            images = arrays[name] if name in arrays.files else None
            found = f"the arrays {arrays.files}" if images is None else f"{images.dtype} {images.shape}"
    except Exception as error:  # zipfile and its decompressors raise errors of many types
        raise ValueError(f"samples {str(file)!r} cannot be read: {error}") from error
    if images is None or images.ndim != 4 or images.dtype not in (np.uint8, np.uint16):
        accepted = "uint8 or uint16 (N, H, W, C) as arr_0 or the only array"
        raise ValueError(f"samples {str(file)!r} must hold {accepted}, got {found}.")
    return len(images), lambda i: (f"image {i}", array_file(images[i]))


def _parquet_images(file: Path) -> tuple[int, Files]:
    rows = datasets.Dataset.from_parquet(str(file))
    kinds = (datasets.Image, datasets.Array3D)
    column = find_column(rows, kinds, None, "the image column of samples")
    if isinstance(rows.features[column], datasets.Array3D):  # color of 16 bits
        rows = rows.with_format("numpy", dtype=np.dtype(rows.features[column].dtype))
        return len(rows), lambda i: (f"image {i}", array_file(rows[i][column]))
    rows = rows.cast_column(column, datasets.Image(decode=False))
    return len(rows), lambda i: (f"image {i}", read_entry(rows[i][column]))


# ---------------------------------------------------------------------- writing


def npz_file(images: np.ndarray, labels: list | None) -> bytes:
    """A .npz file with images (N, H, W, C) and, if there are any, their labels."""
    stream = io.BytesIO()
    # The names arr_0 and arr_1 are those that evaluation code for diffusion models reads.
    np.savez(stream, images, *([] if labels is None else [np.array(labels)]))
    return stream.getvalue()


def parquet_file(images: np.ndarray, labels: list | None) -> bytes:
    """A data set with a column `image` and, for a class-conditional model, `label`. `images`: uint8 or uint16 (N, H, W, C)."""
    if images.dtype == np.uint16 and images.shape[-1] > 1:  # no PNG: Pillow writes no color of 16 bits
        columns, features = {"image": list(images)}, {"image": datasets.Array3D(images.shape[1:], "uint16")}
    else:
        columns = {"image": [{"bytes": png_bytes(image), "path": None} for image in images]}
        features = {"image": datasets.Image()}
    if labels is not None:
        value = datasets.Value("int64" if np.array(labels).dtype.kind == "i" else "float64")
        columns["label"], features["label"] = labels, datasets.List(value) if np.ndim(labels) == 2 else value
    stream = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(stream)
    return stream.getvalue()
