"""Whether a checkpoint fits the run that is to resume from it. Its checksums say only that it is as it was written."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.training.checkpoints import checkpoint_step
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import trained_parameters
from ddpm_hf.training.posthoc_ema import SIGMAS
from ddpm_hf.training.step_statistics import QUARTILES

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, beside the number of steps
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_records(value: Any) -> bool:
    """As of `RunLogger.state`."""
    numbers = [value.get("seconds"), *value.get("sums", ())] if _is_dict(value) else []
    is_complete = len(numbers) == 2 * QUARTILES + 4 and _is_count(value.get("steps"))
    return is_complete and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


def _is_data(value: Any) -> bool:
    """As of `resume.data_position`."""
    if not _is_dict(value) or "examples" not in value or "stream" not in value:
        return False
    stream = value["stream"]
    lanes = stream.get("lanes") if _is_dict(stream) else [] if stream is None else None
    needed = {"start", "block", "given"}
    return isinstance(lanes, list) and all(_is_dict(lane) and needed <= lane.keys() for lane in lanes)


STATE = {
    "step": _is_count,
    "config": _is_dict,
    "versions": _is_dict,
    "data": _is_data,
    "records": _is_records,
    "images_at_a_time": _is_count,
    "nonfinite_steps": _is_count,
    "nonfinite_steps_in_a_row": _is_count,
}


def check_content(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: dict, config: TrainingConfig, unet: nn.Module
) -> None:
    """Raise ValueError, naming the checkpoint and the entry, unless `train.py` could have written it in this run.

    Of a checkpoint with another configuration the tensors are not checked: see `TrainingConfig.check_same_run`.
    """

    def refuse(problem: str) -> None:
        raise ValueError(f"{folder} cannot be used: {problem}.")

    for name, is_valid in STATE.items():
        if not is_valid(state.get(name)):
            refuse(f"{name} in state.json is missing or not what a run writes")
    step = state["step"]
    if checkpoint_step(folder) != step:
        refuse(f"state.json says that it is of step {step}")
    if step > config.total_steps:
        refuse(f"step {step} comes after the end of this run, which has {config.total_steps} steps")
    try:
        config.check_same_run(state["config"], folder)
    except ValueError:
        return
    for file, layout in layouts(config, unet).items():
        if problem := _compare(tensors.get(file, {}), layout):
            refuse(f"{file}.safetensors {problem}")
    if problem := _check_optimizer(tensors.get("optimizer", {}), unet, step):
        refuse(f"optimizer.safetensors {problem}")
    if not tensors.get("optimizer") and step > state["nonfinite_steps"]:
        refuse("optimizer.safetensors is missing or empty")


def layouts(config: TrainingConfig, unet: nn.Module) -> dict[str, Layout]:
    """The shape and type of every tensor in a checkpoint, by file, without those of the optimizer."""
    averages = {name: (tuple(p.shape), torch.float32) for name, p in trained_parameters(unet).items()}
    expected = {"model": _layout(unet.state_dict()), "ema": averages}
    if config.ema_snapshot_every_images:
        expected["power_ema"] = {f"{sigma!r}/{name}": entry for sigma in SIGMAS for name, entry in averages.items()}
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps).state_dict()
    return expected | ({"timestep_sampler": _layout(sampler)} if sampler else {})


def _layout(tensors: Mapping[str, Tensor]) -> Layout:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _compare(
    tensors: Mapping[str, Tensor], layout: Layout, is_sound: Callable[[Tensor], Tensor] = torch.isfinite
) -> str | None:
    found = _layout(tensors)
    if found != layout:
        names = sorted(name for name in found.keys() | layout.keys() if found.get(name) != layout.get(name))
        return f"has not the tensors of this network: {', '.join(names[:4])}{', ...' * (len(names) > 4)}"
    wrong = [name for name, tensor in tensors.items() if not is_sound(tensor).all()]
    return f"holds NaN or infinity: {wrong[0]}" if wrong else None


def _check_optimizer(tensors: Mapping[str, Tensor], unet: nn.Module, step: int) -> str | None:
    """What is wrong with the state of Adam, if anything. A parameter that no step has changed has none."""
    layout = {}
    for name, parameter in unet.named_parameters():
        if any(f"{name}/{entry}" in tensors for entry in ("step", *MOMENTS)):
            layout[f"{name}/step"] = ((), torch.float32)
            layout |= {f"{name}/{entry}": (tuple(parameter.shape), torch.float32) for entry in MOMENTS}
    wrong = _compare(tensors, layout, lambda tensor: ~tensor.isnan())  # squared gradients may overflow
    for name, tensor in tensors.items() if wrong is None else ():
        low, high = tensor.aminmax()
        if (name.endswith("/step") and not 0 <= low <= high <= step) or (name.endswith("/exp_avg_sq") and low < 0):
            wrong = f"holds values that no run of {step} steps has: {name}"
    return wrong
