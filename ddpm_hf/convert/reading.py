"""The weights in a checkpoint of any repository. No code in a pickle is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm_hf.model_files import check_readable

# Where checkpoints that hold more than weights keep them.
PLACES = {
    "ema": (("ema_model",), ("ema", "shadow"), ("ema",)),
    "model": (("net_model",), ("model",), ("state_dict",)),
}


def read_weights(path: str | Path, which: str | None = None) -> dict[str, Tensor]:
    """The weights in a .safetensors file, or in a file of `torch.save`, by name.

    Args:
        which: "ema" or "model", of a checkpoint that has averaged weights and others; None: the averaged ones, or else the
            others.

    Raises FileNotFoundError, OSError for a file that is damaged or could run code, and ValueError for one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is no file.")
    check_readable(path)
    is_safe = path.suffix == ".safetensors"
    content = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    found = {kind: weights for kind in PLACES if (weights := _at_one_of(content, PLACES[kind]))}
    if not found and _is_weights(content):  # which does not say whether it is averaged
        found = {kind: content for kind in ([which] if which else ["ema"])}
    if not found or (which is not None and which not in found):
        wanted = "weights" if which is None else f"weights {which!r}"
        raise ValueError(f"checkpoint {path} must hold {wanted}, tensors by their names; it has {list(content)[:8]}.")
    weights = found.get(which or "ema", found.get("model"))
    is_parallel = all(name.startswith("module.") for name in weights)  # of a model in DataParallel
    return {name.removeprefix("module.") if is_parallel else name: tensor for name, tensor in weights.items()}


def _at_one_of(content: Any, places: tuple[tuple[str, ...], ...]) -> Mapping[str, Tensor] | None:
    for place in places:
        value = content
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if _is_weights(value):
            return value
    return None


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(entry, Tensor) for entry in value.values())
