"""Training checkpoints: whole or absent, verified before use, without pickle.

A checkpoint is a folder `checkpoint-<step>` of safetensors files, `state.json` with the step, the configuration and the
package versions, and `SHA256SUMS` of all of these in the format of `sha256sum -c`.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn, optim

from ddpm_hf import __version__
from ddpm_hf.checks import check_int
from ddpm_hf.files import UNFINISHED, atomic_folder
from ddpm_hf.training.sharding import copy_full, full_on_cpu

PREFIX, SUMS = "checkpoint-", "SHA256SUMS"
NAME = re.compile(PREFIX + "[0-9]+")


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict) -> Path:
    """Write `root/checkpoint-<step>`: one safetensors file per entry of `tensors`, and `state` as JSON.

    Raises OSError if it cannot be written, for example on a full disk; earlier checkpoints do not change.
    """
    folder = checkpoint_folder(root, step)
    for name in tensors:
        if not (isinstance(name, str) and name.isidentifier()):  # a file's name in the folder, not a path out of it
            raise ValueError(f"the names of tensors must be words such as 'model', got {name!r}.")
    if folder.is_symlink():
        folder.unlink()  # its target, which `atomic_folder` would replace, may be another run's
    with atomic_folder(folder) as staged:
        for name, group in tensors.items():
            # Written by Python, whose OSError has an errno. That of safetensors' own writer is in the message alone.
            # diffusers requires the format "pt": uploads.py publishes ema.safetensors as it is.
            (staged / f"{name}.safetensors").write_bytes(save(full_on_cpu(group), {"format": "pt"}))
        state = {**state, "step": step, "versions": versions()}
        (staged / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        (staged / SUMS).write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(staged.iterdir())))
    return folder


def checkpoint_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint of a step. Raises ValueError or TypeError for what is no step."""
    return Path(root) / f"{PREFIX}{check_int('step', step, 0):08d}"


def checkpoint_step(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix(PREFIX))


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors by file, and the state. Raises ValueError for a damaged checkpoint, naming the damaged file."""
    tensors, name = {}, SUMS
    try:
        digests = dict(reversed(line.split("  ", 1)) for line in (folder / SUMS).read_text().splitlines())
        for name in sorted({"state.json", *digests}):
            if not (folder / name).is_file() or _sha256(folder / name) != digests.get(name):
                raise ValueError(f"{name} is missing or does not have the checksum in {SUMS}")
            if name.endswith(".safetensors"):
                tensors[Path(name).stem] = load_file(folder / name)
        name = "state.json"
        state = read_state(folder)
    except (OSError, ValueError, SafetensorError) as error:
        problem = str(error) if name in str(error) else f"{name} cannot be read ({error})"
        raise ValueError(f"{folder} is damaged: {problem}.") from error
    if not isinstance(state, dict):
        raise ValueError(f"{folder} is damaged: state.json holds no state of a run.")
    return tensors, state


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
    found = [folder for folder in root.glob(f"{PREFIX}*") if NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=checkpoint_step)


def prune_checkpoints(root: Path, keep: int, last_step: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed run has left unfinished.

    A checkpoint that is a symbolic link is unlinked; its target is not deleted. Those after `last_step`, which the run did
    not resume from, are neither counted nor deleted. Raises OSError if one cannot be deleted, after deleting the others.
    """
    found = [folder for folder in list_checkpoints(root) if last_step is None or checkpoint_step(folder) <= last_step]
    failed = None
    for folder in (*found[: -keep or None], *root.glob(f".{PREFIX}*{UNFINISHED}")):
        try:
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def optimizer_tensors(optimizer: optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The per-parameter state of an optimizer as a flat dict, with keys "<parameter name>/<entry>"."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    return {f"{name}/{key}": torch.as_tensor(value) for name, state in states.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned, on the devices and with the sharding that the optimizer expects."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # In the parameter's memory format: fused optimizers iterate over memory, not over indices.
            placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copy_full(placed, value)
            value = placed
        optimizer.state[parameter][entry] = value
    # Moves what is not of a parameter's shape, such as the number of steps, to the device that the optimizer expects.
    optimizer.load_state_dict(optimizer.state_dict())


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
