"""What a run saves, where it goes on from, and what happens when the disk is full."""

import dataclasses
import errno
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.diffusion.timestep_samplers import UniformTimesteps
from ddpm_hf.training.checkpoints import (
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    versions,
)
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.posthoc_ema import PowerEMA
from ddpm_hf.training.sharding import full_on_cpu

logger = logging.getLogger("train")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP2 spreads the weights over processes. Raises ValueError for other ways to spread them."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{kind.value} is not supported: weights can be spread by --use_fsdp --fsdp_version 2.")
    if kind != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ValueError("--use_fsdp needs --fsdp_version 2.")
    return True


def save(
    config: TrainingConfig,
    accelerator: Accelerator,
    step: int,
    model: torch.nn.Module,
    averages: Mapping[str, EMA | PowerEMA],
    optimizer: torch.optim.Optimizer,
    timestep_sampler: UniformTimesteps,
    state: dict,
) -> Path | None:
    """Write the checkpoint of `step` and prune the old ones. Every process must call this; one writes.

    Where the disk is full, the checkpoints that are there give way, all but the newest. Returns the checkpoint, or
    None on the process that writes, if there is none of this step in the end; the others are as they were.
    """
    main, root = accelerator.is_main_process, Path(config.output_dir) / "checkpoints"
    tensors = {
        "model": full_on_cpu(model.state_dict(), keep=main),
        **{name: full_on_cpu(average.state_dict(), keep=main) for name, average in averages.items()},
        "optimizer": full_on_cpu(optimizer_tensors(optimizer, model), keep=main),
    }
    if sampler_state := timestep_sampler.state_dict():
        tensors["timestep_sampler"] = sampler_state
    if accelerator.scaler is not None:
        state = {**state, "scaler": accelerator.scaler.state_dict()}
    folder = checkpoint_folder(root, step)
    if main:
        state = {**state, "config": dataclasses.asdict(config)}
        try:
            try:
                save_checkpoint(root, step, tensors, state)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(list_checkpoints(root)) < 2:
                    raise
                logger.warning("%s: deleting all checkpoints but the newest to write that of step %d.", error, step)
                prune_checkpoints(root, keep=1)
                save_checkpoint(root, step, tensors, state)
            prune_checkpoints(root, config.keep_checkpoints)
        except OSError as error:
            folder = None
            kept = list_checkpoints(root)
            logger.warning(
                "The checkpoint of step %d could not be written (%s); the last one is %s.",
                step,
                error,
                f"that of step {read_state(kept[-1])['step']}, as it was" if kept else "none",
            )
    accelerator.wait_for_everyone()
    return folder


def last_checkpoint(config: TrainingConfig, folder: Path) -> tuple[dict, dict] | None:
    """The newest whole checkpoint of this configuration. A damaged one is reported and the one before it used.

    Raises ValueError if it is one of another configuration.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            tensors, state = load_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("%s Trying the one before it.", error)
            continue
        config.check_same_run(state["config"], checkpoint)
        return tensors, state
    return None


def check_same_data(images: Images | StreamedImages, restored: tuple[dict, dict] | None) -> None:
    """ValueError if the checkpoint was made with another number of images: the order would be another."""
    before = restored and restored[1]["data"]["examples"]
    if before and before != images.num_examples:
        raise ValueError(f"the data set has {images.num_examples} images; the checkpoint was trained on {before}.")


def data_position(step: int, batch_size: int, num_examples: int | None, stream: dict | None) -> dict:
    """Where in the data step 0, 1, ... begins. A stream goes on from `stream`; of other data the order follows from the
    seed and the step, and the position is for people."""
    if stream is not None or num_examples is None:
        return {"examples": num_examples, "stream": stream}
    epoch, example = divmod(step * batch_size, num_examples)
    return {"examples": num_examples, "stream": None, "epoch": epoch, "next_example_of_epoch": example}


def warn_of_changes(config: TrainingConfig, state: dict, images_at_a_time: int) -> None:
    """Say what may keep a run from going on bit for bit as it would have without stopping."""
    then, now = state["versions"], versions()
    if changed := [f"{name} {then.get(name)} → {now[name]}" for name in now if then.get(name) != now[name]]:
        logger.warning("The checkpoint was made with other versions: %s.", ", ".join(changed))
    if config.dropout and state["images_at_a_time"] != images_at_a_time:
        logger.warning(
            "Dropout's masks are drawn for %d images at a time from here on, for %d before: give --micro_batch_size %d to "
            "go on with the same.",
            images_at_a_time,
            state["images_at_a_time"],
            state["images_at_a_time"],
        )
