"""Images in files of NumPy arrays."""

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from PIL import Image

MAX_CHANNELS = 8
ARRAY_STARTS = (b"\x93NUMPY", b"PK\x03\x04")  # the first bytes of a .npy file, and of a .npz file, which is a zip file


def read_array(data: bytes) -> np.ndarray:
    """The image (H, W, C), uint8 or uint16, in a .npy file, or in a .npz file with one array. Nothing is unpickled.

    Raises ValueError, which says what is accepted, for an array of another type or shape, and for a broken file.
    """
    try:
        _check_unpacked_size(data)
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


def array_file(array: np.ndarray) -> bytes:
    """The content of a .npy file with this array."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _check_unpacked_size(data: bytes) -> None:
    """Raises ValueError for a .npz file that unpacks to more than the largest image of 16 bits, by Pillow's limit."""
    if data.startswith(ARRAY_STARTS[1]) and Image.MAX_IMAGE_PIXELS is not None:
        size, limit = sum(part.file_size for part in zipfile.ZipFile(io.BytesIO(data)).infolist()), 4 * MAX_CHANNELS
        if size > limit * Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"it unpacks to {size} bytes, more than {limit * Image.MAX_IMAGE_PIXELS}")
