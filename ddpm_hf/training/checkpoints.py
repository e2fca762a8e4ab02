"""Training checkpoints: whole or absent, verified before use, without pickle.

A checkpoint is a folder `checkpoint-<step>` of safetensors files, `state.json` with the step, the configuration and the
package versions, and `SHA256SUMS` of all of these in the format of `sha256sum -c`.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from ddpm_hf import __version__
from ddpm_hf.files import UNFINISHED, atomic_folder
from ddpm_hf.training.sharding import copy_full, full_on_cpu

PREFIX, SUMS = "checkpoint-", "SHA256SUMS"
FORMAT = {"format": "pt"}  # diffusers requires it: uploads.py publishes ema.safetensors as it is


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict) -> Path:
    """Write `root/checkpoint-<step>`: one safetensors file per entry of `tensors`, and `state` as JSON.

    Raises OSError if it cannot be written, for example on a full disk; earlier checkpoints do not change.
    """
    folder = checkpoint_folder(root, step)
    with atomic_folder(folder) as staged:
        for name, group in tensors.items():
            # Written by Python, whose OSError has an errno. That of safetensors' own writer is in the message alone.
            (staged / f"{name}.safetensors").write_bytes(save(full_on_cpu(group), FORMAT))
        state = {**state, "step": step, "versions": versions()}
        (staged / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        (staged / SUMS).write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(staged.iterdir())))
    return folder


def checkpoint_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return root / f"{PREFIX}{step:08d}"


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """The tensors by file, and the state. Raises ValueError for a damaged checkpoint, naming the damaged file."""
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
    """The state of a checkpoint, not verified."""
    return json.loads((folder / "state.json").read_text())


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers of a run depend on."""
    packages = ("torch", "diffusers", "accelerate", "datasets", "numpy", "safetensors")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"ddpm_hf": __version__, "python": platform.python_version(), **installed}


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir())


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed run has left unfinished.

    A checkpoint that is a symbolic link is unlinked; its target is not deleted.
    """
    for folder in (*list_checkpoints(root)[: -keep or None], *root.glob(f".{PREFIX}*{UNFINISHED}")):
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The per-parameter state of an optimizer as a flat dict, with keys "<parameter name>/<entry>"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Load what `optimizer_tensors` returned, on the devices and with the sharding that the optimizer expects."""
    parameters = dict(model.named_parameters())
    order = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # In the parameter's memory format: fused optimizers iterate over memory, not over indices.
            placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copy_full(placed, value)
            value = placed
        entries.setdefault(order[parameter], {})[entry] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
