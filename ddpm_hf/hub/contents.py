"""Which files of a folder are published, and what is refused before anything is sent."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ddpm_hf.models.unet import UNet2DModelCustom

# Patterns of `Path.glob`, in addition to those of the pipeline's parts. * stays within a folder: no samples/*.png.
PUBLISHED = ["model_index.json", "README.md", "*.png", "metrics.json", "config.yaml", "lora/*.safetensors"]
# Parts that every pipeline of this package has, with their configurations.
CONFIGURATIONS = {"unet": "config.json", "scheduler": "scheduler_config.json"}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def published_files(folder: Path, with_onnx: bool = False) -> dict[str, Path]:
    """The files of a saved pipeline that are published, by their names in the repository. `with_onnx`: those of an export too.

    Raises ValueError if the folder holds no pipeline that loads: without a network or a scheduler, with weights that are
    missing, truncated, of another network or in a pickle, or with links to files outside.
    """
    if not (folder / "model_index.json").is_file():
        problem = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise ValueError(f"folder must hold a saved pipeline, got {str(folder)!r}, which {problem}.")
    parts = pipeline_parts(folder)
    for part in parts:
        pickles = list((folder / part).glob("*.bin"))
        if pickles and not any((folder / part).glob("*.safetensors")):
            raise ValueError(f"{pickles[0]} is a pickle: save the weights as safetensors to publish them.")
    patterns = (
        PUBLISHED
        + ["onnx/*.onnx"] * with_onnx
        + [f"{part}/*.{kind}" for part in parts for kind in ("json", "safetensors")]
    )
    found = {file for pattern in patterns for file in folder.glob(pattern) if not file.name.startswith(".")}
    files = {file.relative_to(folder).as_posix(): file for file in sorted(found)}
    check_files(folder, files.values())
    for part in parts:
        _check_part(folder / part, CONFIGURATIONS.get(part))
    return files


def pipeline_parts(folder: Path) -> list[str]:
    """The subfolders that model_index.json names. ValueError if it describes no pipeline."""
    file = folder / "model_index.json"
    check_files(folder, [file])
    index = _read_object(file)
    parts = sorted(k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and None not in v)
    for part in parts:
        if not NAME.fullmatch(part) or not all(isinstance(word, str) for word in index[part]):
            raise ValueError(
                f"{file} must name folders of the pipeline and their classes, got {part!r}: {index[part]}."
            )
    if missing := sorted(CONFIGURATIONS.keys() - set(parts)):
        raise ValueError(f"{file} must name a unet and a scheduler, got none for {missing[0]!r}.")
    return parts


def check_files(folder: Path, files) -> None:
    """Raises ValueError for what is not a regular file, and for a link that leads out of the folder."""
    inside = folder.resolve()
    for file in files:
        try:
            target = file.resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file} must be a file to be published, and is a link to itself.") from error
        if inside not in target.parents:
            raise ValueError(f"{file} leads out of the folder that is published, to {target}: copy it, or remove it.")
        if not target.is_file():
            raise ValueError(f"{file} must be a file to be published, and is not.")


def _read_object(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be a JSON object, got something that is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must be a JSON object, got {type(value).__name__}.")
    return value


def _check_part(folder: Path, configuration: str | None) -> None:
    """ValueError if the configuration of a part is missing, or its weights are not as their headers or index say."""
    if configuration is not None and not (folder / configuration).is_file():
        raise ValueError(f"{folder / configuration} is missing: save the pipeline again.")
    configs = {file.name: _read_object(file) for file in folder.glob("*.json")}
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= _shapes(file)
    for name, index in configs.items():
        if name.endswith(".safetensors.index.json"):
            weights: Any = index.get("weight_map")
            listed = set(weights.values()) if isinstance(weights, dict) else {"its weight_map"}
            if missing := sorted(str(shard) for shard in listed if not (folder / str(shard)).is_file()):
                raise ValueError(f"{folder / name} lists {missing[0]}, which is missing: save the pipeline again.")
    if folder.name == "unet":
        if not shapes:
            raise ValueError(f"{folder} holds no weights (*.safetensors): save the pipeline again.")
        _check_unet(folder, configs["config.json"], shapes)


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a file, from its header; ValueError if it is truncated or empty."""
    try:
        with safe_open(file, "pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): save the pipeline again.") from error
    if not shapes:
        raise ValueError(f"{file} holds no weights: save the pipeline again.")
    return shapes


def _check_unet(folder: Path, config: dict, shapes: dict[str, list[int]]) -> None:
    """ValueError if the weights are not those of the network in config.json. Networks of other classes are not checked."""
    is_old = any(name.rpartition(".")[0].endswith((".query", ".proj_attn")) for name in shapes)  # renamed when loaded
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel" or is_old:
        return
    try:
        with torch.device("meta"):
            expected = {k: list(v.shape) for k, v in UNet2DModelCustom.from_config(config).state_dict().items()}
    except Exception as error:  # diffusers raises many types for configurations that it does not understand
        raise ValueError(f"{folder / 'config.json'} describes no UNet2DModel: {error}") from error
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            found, right = shapes.get(name, "no such weight"), expected.get(name, "none")
            raise ValueError(f"{folder} must have the weights of its config.json: {name} is {found}, expected {right}.")
