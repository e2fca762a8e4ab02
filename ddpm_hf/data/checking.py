"""What a check of one image finds: whether it can be decoded, and which bits and colors it loses."""

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ddpm_hf.data.arrays import ARRAY_STARTS
from ddpm_hf.data.decoding import ImageFormat, UnreadableImage, convert_image, read_entry, read_image, value_range
from ddpm_hf.data.pictures import losses

FEW_VALUES = 32767  # 16-bit values that are all at most this have 15 bits or fewer
LOSSES = {
    "reduced": "color images have 16 bits and are read at 8 bits, as Pillow does; the first is {first}.",
    "unprofiled": "images have a color profile that cannot be used, and are read as sRGB; the first is {first}.",
}
RANGE = (
    "images of 16 bits have values from {low:.0f} to {high:.0f}, of 0 to 65535: the network gets {least:.2f} to "
    "{greatest:.2f}, of -1 to 1; the first is {first}. --white_level {white} maps values of {bits} bits to all of that range."
)


def validation_hash(data: bytes) -> float:
    """A number in [0, 1) that depends on the bytes of an image file. The image is for validation if the number is less
    than `validation_fraction`.

    So an image stays on its side when others are added, removed or moved, a larger fraction adds validation images to
    the same ones, and copies of a file are on one side.
    """
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2**48


# `datasets` finds the results in its cache by the name of this function: with other results, it needs another name.
def check_image(entry: dict | None, form: ImageFormat) -> dict[str, str | bool | float]:
    """What `datasets.map` collects in a column for each key: the "problem" of a broken image, or "", whether it has more than
    8 bits ("deep"), and if so its "low" and "high" values, its losses (see `LOSSES`), and its `validation_hash` ("hash")."""
    try:
        data = read_entry(entry)
        return inspect(data, form)[1] | {"problem": "", "hash": validation_hash(data)}
    except UnreadableImage as error:
        nothing = {"deep": False, "low": math.nan, "high": math.nan, **dict.fromkeys(LOSSES, False)}
        return nothing | {"problem": str(error), "hash": 1.0}


def inspect(data: bytes, form: ImageFormat) -> tuple[torch.Tensor, dict[str, bool | float]]:
    """The decoded image of a file, as of `decode_image`, and its depth, range and losses."""
    image = read_image(data)
    tensor = convert_image(image, form)
    low, high = value_range(image) or (math.nan, math.nan)
    lost = dict.fromkeys(LOSSES, False) if data.startswith(ARRAY_STARTS) else losses(data)
    return tensor, {"deep": tensor.dtype == torch.uint16, "low": low, "high": high, **lost}


def describe_losses(
    checks: Mapping[str, np.ndarray], form: ImageFormat, name_of: Callable[[int], str], number: str = "{:d}"
) -> dict[str, str]:
    """Sentences, by kind, about the images that lose bits or colors, and about a range of values that leaves most of 16 bits
    unused.

    Args:
        checks: columns of the values of `check_image`.
        name_of: the name of an image of that index.
        number: how the number of images is said.
    """
    found = {kind: (np.flatnonzero(checks[kind]), text) for kind, text in LOSSES.items()}
    with_range, values = np.flatnonzero(~np.isnan(checks["high"])), {}
    if len(with_range) and form.white_level is None:
        low, high = checks["low"][with_range].min(), checks["high"][with_range].max()
        bits = max(1, int(high).bit_length())
        values = {"low": low, "high": high, "least": low / 32767.5 - 1, "greatest": high / 32767.5 - 1}
        values |= {"bits": bits, "white": 2**bits - 1}
        if high <= FEW_VALUES:
            found["range"] = with_range, RANGE
    return {
        kind: f"{number.format(len(images))} {text.format(first=name_of(int(images[0])), **values)}"
        for kind, (images, text) in found.items()
        if len(images)
    }
