"""Saving checkpoints of a run, also when the disk is full, and resuming from them."""

import errno
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from ddpm_hf.diffusion.timestep_samplers import UniformTimesteps
from ddpm_hf.training import checkpoints
from ddpm_hf.training.checkpoint_content import check_content
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.posthoc_ema import PowerEMA
from ddpm_hf.training.sharding import full_on_cpu

logger = logging.getLogger("train")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP2 shards the weights. Raises ValueError for other kinds of sharding."""
    kind = accelerator.distributed_type
    is_fsdp_1 = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if is_fsdp_1 or kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{kind.value} is not supported, except for FSDP 2: use --use_fsdp --fsdp_version 2.")
    return kind == DistributedType.FSDP


@dataclass
class TrainingState:
    """What training changes: model, EMAs by name, optimizer (torch's own) and timestep sampler."""

    model: torch.nn.Module
    averages: Mapping[str, EMA | PowerEMA]
    optimizer: torch.optim.Optimizer
    timestep_sampler: UniformTimesteps

    def tensors(self, keep: bool) -> dict[str, dict[str, torch.Tensor]]:
        """Whole tensors on the CPU by file of a checkpoint, empty unless `keep`. Every process must call this."""
        groups = {name: part.state_dict() for name, part in {"model": self.model, **self.averages}.items()}
        groups["optimizer"] = checkpoints.optimizer_tensors(self.optimizer, self.model)
        tensors = {name: full_on_cpu(group, keep) for name, group in groups.items()}
        sampler = self.timestep_sampler.state_dict()
        return tensors | ({"timestep_sampler": sampler} if sampler else {})

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore all but the model, whose weights are loaded before it is prepared for several processes."""
        for name, average in self.averages.items():
            average.load_state_dict(tensors[name])
        checkpoints.load_optimizer_tensors(self.optimizer, self.model, tensors["optimizer"])
        self.timestep_sampler.load_state_dict(tensors.get("timestep_sampler", {}))


def save(
    config: TrainingConfig, accelerator: Accelerator, step: int, training_state: TrainingState, state: dict
) -> Path | None:
    """Write the checkpoint of `step` and delete old ones. Every process must call this; the main process writes.

    If the disk is full, all checkpoints but the newest are deleted to make room. Returns the folder; on the main process
    None if the checkpoint could not be written, in which case the newest earlier one is left as it was. Old checkpoints
    that cannot be deleted are logged.
    """
    root = Path(config.output_dir) / "checkpoints"
    tensors = training_state.tensors(keep=accelerator.is_main_process)
    folder = checkpoints.checkpoint_folder(root, step)
    if accelerator.is_main_process:
        scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler.state_dict()}
        try:
            _save_or_make_room(root, step, tensors, {**state, **scaler, "config": asdict(config)})
        except (OSError, MemoryError) as error:
            folder, kept = None, checkpoints.list_checkpoints(root)
            last = f"that of step {checkpoints.checkpoint_step(kept[-1])}" if kept else "none"
            reason = str(error) or "no memory is left"
            logger.warning(f"The checkpoint of step {step} could not be written ({reason}); the last one is {last}.")
        else:
            try:
                checkpoints.prune_checkpoints(root, config.keep_checkpoints, step)
            except OSError as error:
                logger.warning("Old checkpoints could not be deleted (%s); that of step %d is saved.", error, step)
    accelerator.wait_for_everyone()
    return folder


def _save_or_make_room(root: Path, step: int, tensors: dict, state: dict) -> None:
    try:
        checkpoints.save_checkpoint(root, step, tensors, state)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(checkpoints.list_checkpoints(root)) < 2:
            raise
        logger.warning("%s: deleting all checkpoints but the newest to write that of step %d.", error, step)
        with suppress(OSError):  # others may have made room
            checkpoints.prune_checkpoints(root, 1, step)
        checkpoints.save_checkpoint(root, step, tensors, state)


def last_checkpoint(config: TrainingConfig, folder: Path, unet: torch.nn.Module) -> tuple[dict, dict] | None:
    """Tensors and state of the newest intact checkpoint of a run of `unet`; damaged ones are skipped with a warning. None if
    there are no checkpoints. Every process must call this.

    Raises ValueError if the checkpoint has a different configuration (`TrainingConfig.check_same_run`), if none can be
    used, and if the processes find different ones.
    """
    found, restored = checkpoints.list_checkpoints(folder), None
    for checkpoint in reversed(found):
        try:
            tensors, state = checkpoints.load_checkpoint(checkpoint)
            check_content(checkpoint, tensors, state, config, unet)
        except ValueError as error:
            logger.warning("%s Using the checkpoint before it.", error)
            continue
        config.check_same_run(state["config"], checkpoint)
        restored = tensors, state
        break
    if found and restored is None:
        raise ValueError(f"no checkpoint in {folder} can be used: move them elsewhere, or --overwrite to start again.")
    steps = gather_object([restored and restored[1]["step"]])
    if len(set(steps)) > 1:
        problem = f"the processes find checkpoints of different steps: {steps}"
        raise ValueError(f"{problem}. output_dir must be on a file system that all of them share.")
    return restored


def check_same_data(num_examples: int | None, fingerprint: str | None, restored: tuple[dict, dict] | None) -> None:
    """ValueError if the checkpoint was trained on another number of images, on other images or labels, or in another order.

    Checkpoints of earlier versions have no fingerprint: of these, only the number is compared.
    """
    before = restored[1]["data"] if restored else {}
    if before.get("examples") and before["examples"] != num_examples:
        found = f"the data set has {num_examples} images; the checkpoint was trained on {before['examples']}."
    elif before.get("fingerprint") and before["fingerprint"] != fingerprint:
        found = "the data set has other images or labels than the checkpoint was trained on, or in another order."
    else:
        return
    use = "Use the same data to resume, another --output_dir to keep both, or --overwrite to start again."
    raise ValueError(f"{found} {use}")


def data_position(
    step: int, batch_size: int, num_examples: int | None, fingerprint: str | None, stream: dict | None
) -> dict:
    """Where in the data a step begins, for a checkpoint. Only `stream` is needed to resume; otherwise the order follows
    from seed and step, and the position is informative."""
    data = {"examples": num_examples, "fingerprint": fingerprint, "stream": stream}
    if stream is None and num_examples is not None:
        data["epoch"], data["next_example_of_epoch"] = divmod(step * batch_size, num_examples)
    return data


def warn_of_changes(dropout: float, images_at_a_time: int, state: dict) -> None:
    """Log what may make the resumed run differ from one that was not stopped."""
    then, now = state["versions"], checkpoints.versions()
    if changed := [f"{name} {then.get(name)} → {now[name]}" for name in now if then.get(name) != now[name]]:
        logger.warning("The checkpoint was made with other versions: %s.", ", ".join(changed))
    if dropout and (before := state["images_at_a_time"]) != images_at_a_time:
        use = f"to continue the same run, use --micro_batch_size {before}"
        logger.warning(f"Dropout masks are now drawn for {images_at_a_time} images, before for {before}: {use}.")
