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
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import datasets
import launch
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finish import finish
from held_out import held_out_images
from records import Records
from training_config import TrainingConfig, parse_config

from ddpm_hf import DDPMSchedulerCustom, GaussianDiffusion, UNet2DModelCustom
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
from ddpm_hf.data import (
    GlobalBatches,
    Images,
    ProcessBatches,
    open_dataset,
    process_positions,
    to_signed,
)
from ddpm_hf.ema import EMA
from ddpm_hf.losses import TIMESTEP_SAMPLERS, denoising_loss
from ddpm_hf.posthoc_ema import PowerEMA
from ddpm_hf.seeds import addressed_generator

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

    `micro_batches` yields dicts of "images", uint8 (B, C, H, W), as many as `config.micro_batches` says.
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


def load_images(config: TrainingConfig) -> Images:
    """The training images, every one of them read once. Raises ValueError that names the broken ones."""
    dataset = open_dataset(config.dataset, config.dataset_config, config.split)
    images = Images(dataset, config.resolution, config.channels, config.image_column)
    if broken := images.broken():
        names = "\n".join(f"  {images.describe(i)}" for i in broken[:20])
        more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
        if not config.skip_broken_images or len(broken) == len(images):
            raise ValueError(
                f"{len(broken)} of {len(images)} images cannot be read:\n{names}{more}\n"
                "Repair or remove them, or leave them out with --skip_broken_images."
            )
        logger.warning("Leaving out %d images that cannot be read:\n%s%s", len(broken), names, more)
        images.without(broken)
    if images.num_bytes <= config.memory_limit_bytes:
        images.keep_in_memory()
    return images


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
            unet, scheduler = build(config)
            with accelerator.main_process_first():
                images, held_out = load_images(config), held_out_images(config)
            output_dir = Path(config.output_dir)
            if accelerator.is_main_process and not config.dry_run:
                stack.enter_context(lock_folder(output_dir))
                if config.overwrite:
                    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
            accelerator.wait_for_everyone()
            restored = None if config.overwrite else last_checkpoint(config, output_dir / "checkpoints")
        except ValueError as error:
            sys.exit(f"train.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
        run(config, accelerator, unet, scheduler, images, held_out, restored)


def run(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModelCustom,
    scheduler: DDPMSchedulerCustom,
    images: Images,
    held_out: Images | None,
    restored: tuple[dict, dict] | None,
) -> None:
    """Train from `restored`, or from the start, to the end; a dry run stops after a few steps and writes nothing."""
    output_dir, parts = Path(config.output_dir), config.micro_batches(accelerator.num_processes)
    diffusion = scheduler.diffusion
    optimizer = torch.optim.Adam(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        fused=accelerator.device.type != "mps",
    )
    unet.to(accelerator.device, memory_format=torch.channels_last)
    averages = {"ema": EMA(unet, config.ema_halflife_images, decay=config.ema_decay, warmup=config.ema_warmup)}
    if config.ema_snapshot_every_images:
        averages["power_ema"] = PowerEMA(unet)
    first_step, watched = 0, None
    if restored is not None:
        tensors, state = restored
        unet.load_state_dict(tensors["model"])
        for name, average in averages.items():
            average.load_state_dict(tensors[name])
        load_optimizer_tensors(optimizer, unet, tensors["optimizer"])
        first_step, watched = state["step"], state["records"]
        accelerator.print(f"Going on from step {first_step} of {config.num_steps} ({output_dir / 'checkpoints'}).")
    model, optimizer = accelerator.prepare(unet, optimizer)

    batches = GlobalBatches(len(images), config.batch_size, config.seed)
    sampler = ProcessBatches(
        batches, first_step, config.num_steps, accelerator.process_index, accelerator.num_processes, parts
    )
    loader = iter(
        torch.utils.data.DataLoader(
            images,
            sampler=sampler,
            batch_size=None,
            num_workers=0 if images.in_memory else config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    records = Records(
        config, accelerator, unet, scheduler, averages, held_out, first_step, watched, train_examples=len(images)
    )
    if records.is_writer:
        write_whole(output_dir / "config.yaml", config.to_yaml())

    model.train()
    for step in range(first_step, records.last_step):
        micro_batches = (next(loader) for _ in range(parts))
        report = training_step(accelerator, model, optimizer, diffusion, config, step, micro_batches)
        done = step + 1
        for average in averages.values():
            average.update(unet, done * config.batch_size, config.batch_size)
        if nonfinite := records.after_step(done, report):
            sys.exit(
                f"train.py: error: {nonfinite} losses up to step {done} are not finite; the last checkpoint is as it was."
            )

        if not config.dry_run and (done % config.checkpoint_every_steps == 0 or done == config.num_steps):
            state = {"config": dataclasses.asdict(config), "records": records.state()}
            if accelerator.is_main_process:
                tensors = {
                    "model": unet.state_dict(),
                    **{name: average.state_dict() for name, average in averages.items()},
                    "optimizer": optimizer_tensors(optimizer.optimizer, unet),
                }
                save_checkpoint(output_dir / "checkpoints", done, tensors, state)
                prune_checkpoints(output_dir / "checkpoints", config.keep_checkpoints)
            accelerator.wait_for_everyone()
    records.close()

    if records.is_writer:
        seconds = records.seconds if first_step < config.num_steps else watched["seconds"]
        training = {
            "images_seen": config.num_steps * config.batch_size,
            "steps": config.num_steps,
            **records.final_losses(),
            "seconds": round(seconds, 1),
            "images_per_second": round(config.num_steps * config.batch_size / seconds, 1),
            "processes": accelerator.num_processes,
            "hardware": f"{accelerator.device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
            "parameters": sum(p.numel() for p in unet.parameters()),
            "train_examples": len(images),
        }
        averages["ema"].copy_to(unet)
        finish(config, unet, scheduler, records.rows, training)
    accelerator.end_training()


if __name__ == "__main__":
    launch.run(main)
