"""The files of a model folder, read with checks. Errors name the file and what is wrong with it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ddpm_hf.checks import shown

WEIGHTS_NAME = "diffusion_pytorch_model"
# How files begin that are often found in the place of weights.
IMPOSTORS = {
    b"version https://git-lfs": "it is a pointer of Git LFS: run `git lfs pull` in its repository",
    b"<": "it is a web page, or another text",
    b"{": "it is a text",
    b"PK": "it is a pickle, or another archive, under the name of safetensors",
    b"\x80": "it is a pickle under the name of safetensors",
}
PICKLES = (b"PK", b"\x80")


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object. Raises OSError if it cannot be read, ValueError for another content."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the encoding, the syntax, or too many brackets
        raise ValueError(f"{path} is not a JSON file: {error or 'it is empty'}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object {{...}}, got {shown(content)}.")
    return content


def class_name(path: str | Path, content: dict, default: str) -> str:
    """The class that a configuration file names. Raises ValueError if that cannot be a class's name."""
    name = content.get("_class_name", default)
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"{path} must name a class, got _class_name {shown(name)}.")
    return name


def check_shard_index(path: Path) -> None:
    """Raise ValueError unless the index of sharded weights maps names to files beside it, FileNotFoundError if one of these
    is missing."""
    index = read_json_object(path)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{path} must hold the objects 'metadata' and 'weight_map', got {shown(index)}.")
    for shard in shards.values():
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise ValueError(f"{path} must name files of its own folder, got {shown(shard)}.")
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path} names the file {shard}, which is not in its folder.")


def check_readable(path: Path) -> None:
    """Raise OSError, with the reason, if a file of weights is not whole. Of safetensors only the header is read. No code of
    a pickle is run."""
    reason = "it is damaged or cut short"
    with open(path, "rb") as file:
        start = file.read(64)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return
        except SafetensorError as error:
            reason += f" ({error})"
    elif start.startswith(PICKLES):
        try:
            content = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # of many types
            raise OSError(f"{path} does not hold weights: it is damaged, or reading it could run code.") from error
        if isinstance(content, dict):
            return
        raise OSError(f"{path} does not hold weights: it holds {type(content).__name__}, not tensors by their names.")
    reasons = [text for begin, text in IMPOSTORS.items() if start.lstrip().startswith(begin)]
    raise OSError(f"{path} does not hold weights: {[*reasons, reason][0] if start else 'it is empty'}.")


def explain_unreadable(folder: Path, cause: OSError) -> None:
    """Raise OSError that says which file of weights in the folder is damaged, if one is."""
    for path in sorted(folder.glob(f"{WEIGHTS_NAME}*")):
        if path.suffix in (".safetensors", ".bin") and path.is_file():
            try:
                check_readable(path)
            except OSError as error:
                raise error from cause


def check_weights(
    source: str, found: Mapping[str, Any], expected: Mapping[str, torch.Tensor], check_shapes: bool
) -> None:
    """Raise ValueError unless `found` holds finite floating-point tensors of the names and shapes of `expected`.

    One pass over the values. `source` is what the message calls the files.
    """
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or extra:
        parts = [
            f"{what} {_listed(names)}" for what, names in (("lacks", missing), ("has the unknown", extra)) if names
        ]
        raise ValueError(f"{source} does not fit its configuration: it {' and '.join(parts)}.")
    for name, tensor in found.items():
        problem = _problem(tensor, expected[name].shape if check_shapes else None)
        if problem:
            raise ValueError(f"{source} cannot be used: {name} {problem}.")


def _problem(tensor: Any, shape: torch.Size | None) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"must be a tensor, got {shown(tensor)}"
    if not tensor.is_floating_point():
        return f"must hold floating-point numbers, got {tensor.dtype}"
    if shape is not None and tensor.shape != shape:
        return f"must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
    tensor = tensor.float()  # in which large float64 values are infinite
    # The sum is ten times as fast, but may be infinite for finite values.
    if not (tensor.sum().isfinite() or tensor.isfinite().all()):
        return "holds NaN or infinite values"
    return None


def _listed(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + f" and {len(names) - 5} others" * (len(names) > 5)
