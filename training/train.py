"""Train a DDPM: `accelerate launch training/train.py --config <preset> [--option value ...]`.

Reads top to bottom: `main` prepares data, network and optimiser, goes on from the last checkpoint if there is one,
runs `training_step` until enough images were seen, and leaves a pipeline, figures and a model card in `output_dir`.
"""

import dataclasses
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import datasets
import launch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from finish import finish
from load_images import load_images
from tqdm.auto import tqdm
from training_config import TrainingConfig, parse_config

from ddpm_hf import DDPMSchedulerCustom, GaussianDiffusion, UNet2DModelCustom
from ddpm_hf.batches import MicroBatches, process_positions
from ddpm_hf.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    lock_folder,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
    write_whole,
)
from ddpm_hf.data import Images, to_signed
from ddpm_hf.ema import EMA
from ddpm_hf.losses import TIMESTEP_SAMPLERS, denoising_loss
from ddpm_hf.seeds import addressed_generator
from ddpm_hf.streaming import StreamedImages, StreamError

logger = logging.getLogger("train")


class Draws(NamedTuple):
    """The random numbers of a step, one row per example: timesteps (B,), noise (B, C, H, W), mirrored or not (B,)."""

    t: torch.Tensor
    noise: torch.Tensor
    flip: torch.Tensor


class StepReport(NamedTuple):
    """What a step found on this process's share (b,) of the batch; tensors on the device, read rarely: that waits.

    `t` and `losses` (b,) are by example, in order of position; `grad_norm` is of the whole batch, before clipping.
    """

    t: torch.Tensor
    losses: torch.Tensor
    grad_norm: torch.Tensor


def draw(config: TrainingConfig, step: int, positions: range, device: torch.device) -> Draws:
    """The draws of a step for `positions` of the global batch.

    They are made for the whole global batch and then cut, so that they depend on (seed, step, position) alone, however
    many processes share the batch. Making too many normal numbers is cheap beside a network.
    """
    timesteps, noise, flip = (addressed_generator(device, config.seed, p, step) for p in ("timesteps", "noise", "flip"))
    share = slice(positions.start, positions.stop)
    shape = (config.batch_size, config.channels, *config.resolution)
    return Draws(
        TIMESTEP_SAMPLERS[config.timestep_sampler](config.batch_size, config.num_train_timesteps, timesteps)[share],
        torch.randn(shape, generator=noise, device=device)[share],
        torch.rand(config.batch_size, generator=flip, device=device)[share] < 0.5,
    )


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    diffusion: GaussianDiffusion,
    config: TrainingConfig,
    step: int,
    micro_batches: Iterable[dict[str, torch.Tensor]],
) -> StepReport:
    """One optimiser step (DDPM, algorithm 1) on this process's share of the global batch of `step`.

    `micro_batches` yields dicts of "images", uint8 or uint16 (B, C, H, W), as many as `config.micro_batches` says.
    """
    draws = draw(
        config,
        step,
        process_positions(config.batch_size, accelerator.process_index, accelerator.num_processes),
        accelerator.device,
    )
    parts = config.micro_batches(accelerator.num_processes)
    size = len(draws.t) // parts
    losses = []
    for i, batch in enumerate(micro_batches):
        t, noise, flip = (values[i * size : (i + 1) * size] for values in draws)
        x_0 = to_signed(batch["images"].to(accelerator.device, non_blocking=True))
        if config.random_flip:
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        # Gradients are exchanged once a step, with the last part.
        with accelerator.no_sync(model) if i < parts - 1 else nullcontext():
            loss = denoising_loss(model, diffusion, x_0, t, noise)
            accelerator.backward(loss.mean() / parts)
        losses.append(loss.detach())
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    optimizer.step()
    optimizer.zero_grad()
    return StepReport(draws.t, torch.cat(losses), grad_norm)


def build(config: TrainingConfig) -> tuple[UNet2DModelCustom, DDPMSchedulerCustom]:
    """The network, with DDPM's initialisation, and the scheduler that a configuration describes."""
    names = (
        "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim",
        "norm_num_groups", "dropout",
    )  # fmt: skip
    height, width = config.resolution
    unet = UNet2DModelCustom(
        sample_size=height if height == width else (height, width),
        in_channels=config.channels,
        out_channels=config.channels,
        # Details in which the original code differs from diffusers' defaults.
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        zero_init_output=True,
        **{name: getattr(config, name) for name in names},
    )
    scheduler = DDPMSchedulerCustom(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
    )
    return unet, scheduler


def last_checkpoint(config: TrainingConfig, folder: Path) -> tuple[dict, dict] | None:
    """The newest whole checkpoint of this configuration. A damaged one is reported and the one before it used."""
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
    before = restored and restored[1].get("num_examples")
    if before and before != images.num_examples:
        raise ValueError(f"the data set has {images.num_examples} images; the checkpoint was trained on {before}.")


def main(arguments: list[str] | None = None) -> None:
    """Prepare a run; whatever is wrong with it is said here, before anything is trained or written."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with ExitStack() as stack:
        try:
            config = parse_config(arguments)
            accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),
                mixed_precision=config.mixed_precision,
                log_with=None if config.report_to == "none" else config.report_to,
                project_dir=config.output_dir,
            )
            if accelerator.device.type == "cpu":
                launch.use_cpu_threads(config.cpu_threads)
            if not accelerator.is_main_process:
                datasets.disable_progress_bars()
            config.micro_batches(accelerator.num_processes)
            set_seed(config.seed)
            torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = config.tf32
            unet, scheduler = build(config)
            with accelerator.main_process_first():
                images, validation = load_images(config, accelerator.device)
            output_dir = Path(config.output_dir)
            if accelerator.is_main_process:
                stack.enter_context(lock_folder(output_dir))
                if config.overwrite:
                    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
            accelerator.wait_for_everyone()
            restored = last_checkpoint(config, output_dir / "checkpoints")
            check_same_data(images, restored)
        except ValueError as error:
            sys.exit(f"train.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
        try:
            run(config, accelerator, unet, scheduler, images, validation, restored)
        except StreamError as error:
            sys.exit(f"train.py: error: {error}")


def run(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModelCustom,
    scheduler: DDPMSchedulerCustom,
    images: Images | StreamedImages,
    validation: Images | None,
    restored: tuple[dict, dict] | None,
) -> None:
    """Train from `restored`, or from the start, to the end."""
    output_dir, parts = Path(config.output_dir), config.micro_batches(accelerator.num_processes)
    diffusion = scheduler.diffusion
    optimizer = torch.optim.Adam(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        fused=accelerator.device.type != "mps",
    )
    unet.to(accelerator.device, memory_format=torch.channels_last)
    ema = EMA(unet, config.ema_halflife_images)
    first_step, history, seconds, stream = 0, [], 0.0, None
    if restored is not None:
        tensors, state = restored
        unet.load_state_dict(tensors["model"])
        ema.load_state_dict(tensors["ema"])
        load_optimizer_tensors(optimizer, unet, tensors["optimizer"])
        first_step, history, seconds = state["step"], state["history"], state["seconds"]
        stream = state.get("stream")
        accelerator.print(f"Going on from step {first_step} of {config.num_steps} ({output_dir / 'checkpoints'}).")
    model = torch.compile(unet, backend=config.compile) if config.compile else unet
    model, optimizer = accelerator.prepare(model, optimizer)

    batches = MicroBatches(
        images,
        config.batch_size,
        config.seed,
        first_step,
        config.num_steps,
        accelerator.process_index,
        accelerator.num_processes,
        parts,
        config.num_workers,
        accelerator.device,
        stream,
    )
    if accelerator.is_main_process:
        write_whole(output_dir / "config.yaml", config.to_yaml())
    accelerator.init_trackers("logs", config={k: str(v) for k, v in dataclasses.asdict(config).items()})
    bar = tqdm(
        total=config.num_steps * config.batch_size,
        initial=first_step * config.batch_size,
        unit="img",
        unit_scale=True,
        desc="Training",
        disable=not accelerator.is_local_main_process,
    )

    model.train()
    loss_sum, loss_count, started = torch.zeros((), device=accelerator.device), 0, time.monotonic() - seconds
    for step in range(first_step, config.num_steps):
        report = training_step(accelerator, model, optimizer, diffusion, config, step, batches.step())
        loss_sum += report.losses.mean()
        loss_count += 1
        done = step + 1
        ema.update(unet, done * config.batch_size, config.batch_size)
        bar.update(config.batch_size)

        if done % config.log_every_steps == 0 or done == config.num_steps:
            loss = accelerator.reduce(loss_sum / loss_count, "mean").item()
            if not loss < float("inf"):
                sys.exit(f"train.py: error: the loss is {loss} at step {done}; the last checkpoint is as it was.")
            loss_sum, loss_count = torch.zeros_like(loss_sum), 0
            history.append((done, loss))
            bar.set_postfix(loss=f"{loss:.4f}")
            accelerator.log({"loss": loss, "learning_rate": config.learning_rate_at(step)}, step=done)

        if done % config.checkpoint_every_steps == 0 or done == config.num_steps:
            stream = batches.gather_state(gather_object)
            if accelerator.is_main_process:
                tensors = {
                    "model": unet.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer_tensors(optimizer.optimizer, unet),
                }
                state = {
                    "config": dataclasses.asdict(config),
                    "history": history,
                    "num_examples": images.num_examples,
                    "stream": stream,
                    "seconds": time.monotonic() - started,
                }
                save_checkpoint(output_dir / "checkpoints", done, tensors, state)
                prune_checkpoints(output_dir / "checkpoints", config.keep_checkpoints)
            accelerator.wait_for_everyone()
    bar.close()

    if accelerator.is_main_process:
        seconds = time.monotonic() - started if first_step < config.num_steps else seconds
        training = {
            "images_seen": config.num_steps * config.batch_size,
            "steps": config.num_steps,
            "final_loss": history[-1][1],
            "seconds": round(seconds, 1),
            "images_per_second": round(config.num_steps * config.batch_size / seconds, 1),
            "processes": accelerator.num_processes,
            "hardware": f"{accelerator.device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
            "parameters": sum(p.numel() for p in unet.parameters()),
            "train_examples": images.num_examples,
            "validation_examples": 0 if validation is None else len(validation),
        }
        ema.copy_to(unet)
        finish(config, unet, scheduler, history, training)
    accelerator.end_training()


if __name__ == "__main__":
    launch.run(main)
