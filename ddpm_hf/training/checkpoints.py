"""Training checkpoints: whole or absent, checked before they are used, and no pickle.

A checkpoint is a folder `checkpoint-<step>` of safetensors files, `state.json` with the step, the configuration and the
versions it was made with, and `SHA256SUMS` over all of these, which `sha256sum -c` reads too. It is written under another
name and renamed when it is on the disk.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm_hf.files import sync
from ddpm_hf.training.sharding import copy_full

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not kept apart
    fcntl = None

PREFIX, UNFINISHED, SUMS = "checkpoint-", "unfinished-", "SHA256SUMS"


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict) -> Path:
    """Write `root/checkpoint-<step>`: one safetensors file per entry of `tensors`, and `state` (JSON-able).

    Raises OSError if it cannot be written, a full disk for example; the checkpoints that are there stay as they are.
    """
    folder = checkpoint_folder(root, step)
    unfinished = root / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, group in tensors.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in group.items()},
                unfinished / f"{name}.safetensors",
                metadata={"format": "pt"},  # diffusers requires it: uploads.py publishes ema.safetensors as it is
            )
        state = {**state, "step": step, "versions": versions()}
        (unfinished / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        files = sorted(unfinished.iterdir())
        (unfinished / SUMS).write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in files))
        for path in (*files, unfinished / SUMS, unfinished):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
        sync(root)
    except SafetensorError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # It tells of a full disk in words alone.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"{PREFIX}{step:08d}"


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """The tensors by file, and the state. Raises ValueError for a damaged checkpoint, naming what is wrong."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is damaged: its {SUMS} cannot be read ({error}).") from error
    for name in {"state.json", *digests}:
        if name not in digests or not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing.")
        if _sha256(folder / name) != digests[name]:
            raise ValueError(f"{folder} is damaged: {name} does not have the checksum it was written with.")
    names = [name.removesuffix(".safetensors") for name in digests if name.endswith(".safetensors")]
    return {name: load_file(folder / f"{name}.safetensors") for name in names}, read_state(folder)


def read_state(folder: Path) -> dict:
    """The state of a checkpoint, unchecked."""
    return json.loads((folder / "state.json").read_text())


def versions() -> dict[str, str]:
    """Of what decides the numbers of a run."""
    packages = ("torch", "diffusers", "accelerate", "datasets", "numpy", "safetensors")
    from ddpm_hf import __version__

    return {
        "ddpm_hf": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir())


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed run left half-written."""
    for folder in list_checkpoints(root)[: -keep or None]:
        shutil.rmtree(folder)
    for folder in root.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """An optimizer's per-parameter state, flat, as "<parameter name>/<entry>"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, on the devices the optimizer wants it on."""
    parameters = dict(model.named_parameters())
    order = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # In the parameter's own memory format: fused optimizers walk through memory, not through indices.
            placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copy_full(placed, value)
            value = placed
        entries.setdefault(order[parameter], {})[entry] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
