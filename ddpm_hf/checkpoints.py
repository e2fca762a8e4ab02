"""Training checkpoints: whole or absent, checked before they are used, and no pickle.

A checkpoint is a folder `checkpoint-<step>` of safetensors files and `state.json`, which holds the step, the
configuration and a SHA-256 of every other file. It is written under another name and renamed when it is on the disk.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not kept apart
    fcntl = None

PREFIX, UNFINISHED = "checkpoint-", "unfinished-"


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict) -> Path:
    """Write `root/checkpoint-<step>`: one safetensors file per entry of `tensors`, and `state` (JSON-able)."""
    folder = root / f"{PREFIX}{step:08d}"
    unfinished = root / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    digests = {}
    for name, group in tensors.items():
        file = unfinished / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, file)
        digests[file.name] = _sha256(file)
        _sync(file)
    file = unfinished / "state.json"
    file.write_text(json.dumps({**state, "step": step, "sha256": digests}, indent=2) + "\n")
    _sync(file)
    _sync(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)
    _sync(root)
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """The tensors by file, and the state. Raises ValueError for a damaged checkpoint, naming what is wrong."""
    try:
        state = json.loads((folder / "state.json").read_text())
        digests = state["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is damaged: its state.json cannot be read ({error}).") from error
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing.")
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder} is damaged: {name} does not have the checksum it was written with.")
    return {name.removesuffix(".safetensors"): load_file(folder / name) for name in digests}, state


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
    """An optimiser's per-parameter state, flat, as "<parameter name>/<entry>"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, on the devices the optimiser wants it on."""
    parameters = dict(model.named_parameters())
    order = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # In the parameter's own memory format: fused optimisers walk through memory, not through indices.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        entries.setdefault(order[parameter], {})[entry] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it there: a reader sees the old one or all of this one."""
    beside = file.with_name(f".{file.name}.unfinished")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(beside)
    os.replace(beside, file)


@contextmanager
def lock_folder(folder: Path, wait_seconds: float = 60.0) -> Iterator[None]:
    """Keep other runs out of a folder for a while; the system lifts the lock of a process that dies.

    Raises ValueError if another run still holds it after `wait_seconds` (a killed one takes a moment to end).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        if fcntl is None:
            yield
            return
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another run is writing to {folder}: end it first, or use another folder."
                    ) from None
                time.sleep(0.2)
        try:
            yield
        finally:
            # Explicitly, since worker processes may hold copies of the file.
            fcntl.flock(file, fcntl.LOCK_UN)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
