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
from draws import Draws, draw
from energy import EnergyMeter
from finish import finish
from load_images import load_images
from pushing import Pusher
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
from ddpm_hf.guidance import mark_class_names, mark_null_class
from ddpm_hf.losses import Loss
from ddpm_hf.streaming import StreamedImages, StreamError
from ddpm_hf.timestep_samplers import UniformTimesteps, make_timestep_sampler

logger = logging.getLogger("train")


class StepReport(NamedTuple):
    """What a step found on this process's share (b,) of the batch; tensors on the device, read rarely: that waits.

    `t`, `losses` and `objective` (b,) are by example, in order of position; `grad_norm` is of the whole batch, before
    clipping. `losses` is L_simple in terms of the target, not weighted, whatever is minimised, so that runs of
    different objectives and timestep samplers can be compared, t by t. `objective` is what is minimised (`Objective`)
    times the weight of importance sampling: its mean estimates the objective under uniform timesteps.
    """

    t: torch.Tensor
    losses: torch.Tensor
    grad_norm: torch.Tensor
    objective: torch.Tensor


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    diffusion: GaussianDiffusion,
    config: TrainingConfig,
    step: int,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    sampler: UniformTimesteps | None = None,
) -> StepReport:
    """One optimiser step (DDPM, algorithm 1) on this process's share of the global batch of `step`.

    `micro_batches` yields dicts of "images", uint8 or uint16 (B, C, H, W), and "labels" (B,) with a `label_column`, as
    many as `config.micro_batches` says. `sampler` is the run's timestep sampler; None will do for one without state.
    """
    draws = draw(
        config,
        step,
        process_positions(config.batch_size, accelerator.process_index, accelerator.num_processes),
        accelerator.device,
        sampler,
    )
    parts, objective = config.micro_batches(accelerator.num_processes), config.objective
    size = len(draws.t) // parts
    losses = []
    for i, batch in enumerate(micro_batches):
        part = Draws(*(values[i * size : (i + 1) * size] for values in draws))
        x_0 = to_signed(batch["images"].to(accelerator.device, non_blocking=True))
        if config.random_flip:
            x_0 = torch.where(part.flip[:, None, None, None], x_0.flip(-1), x_0)
        labels = None
        if config.label_column is not None:
            labels = batch["labels"].to(accelerator.device, non_blocking=True)
            # The null class comes after the classes (`build`).
            labels = torch.where(part.drop_label, config.num_classes, labels)
        # Gradients are exchanged once a step, with the last part.
        with accelerator.no_sync(model) if i < parts - 1 else nullcontext():
            loss = objective(model, diffusion, x_0, part.t, part.noise, labels, part.input_noise)
            accelerator.backward((loss.objective * part.weight).mean() / parts)
        losses.append(Loss(loss.objective.detach(), loss.simple.detach()))
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    optimizer.step()
    optimizer.zero_grad()
    loss = Loss(*map(torch.cat, zip(*losses)))
    if sampler is not None and sampler.uses_losses:
        # Processes have the positions in order of rank, so that this is the global batch in order of position.
        sampler.update(accelerator.gather(draws.t), accelerator.gather(loss.objective))
    return StepReport(draws.t, loss.simple, grad_norm, loss.objective * draws.weight)


def build(config: TrainingConfig) -> tuple[UNet2DModelCustom, DDPMSchedulerCustom]:
    """The network and the scheduler that a configuration describes."""
    scheduler = DDPMSchedulerCustom(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
    )
    return build_unet(config), scheduler


def build_unet(config: TrainingConfig) -> UNet2DModelCustom:
    """The network, with DDPM's initialisation. With labels to be left out its last class is the null class."""
    names = (
        "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim",
        "norm_num_groups", "dropout", "resnet_time_scale_shift",
    )  # fmt: skip
    height, width = config.resolution
    unet = UNet2DModelCustom(
        sample_size=height if height == width else (height, width),
        in_channels=config.channels,
        out_channels=config.channels * (2 if config.variance_type == "learned_range" else 1),
        # Details in which the original code differs from diffusers' defaults.
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        zero_init_output=True,
        # diffusers leaves this norm out with "scale_shift", unless told; no paper's network does.
        attn_norm_num_groups=config.norm_num_groups if config.resnet_time_scale_shift == "scale_shift" else None,
        num_class_embeds=config.num_class_embeds,
        **{name: getattr(config, name) for name in names},
    )
    if config.label_dropout:
        mark_null_class(unet)
    return unet


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
            pusher = Pusher(config, accelerator.is_main_process)
            unet, scheduler = build(config)
            with accelerator.main_process_first():
                images, validation = load_images(config, accelerator.device)
            if images.class_names is not None:
                mark_class_names(unet, images.class_names)
            output_dir = Path(config.output_dir)
            if accelerator.is_main_process:
                stack.enter_context(lock_folder(output_dir))
                if config.overwrite:
                    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
            accelerator.wait_for_everyone()
            restored = last_checkpoint(config, output_dir / "checkpoints")
            check_same_data(images, restored)
            pusher.start()
        except ValueError as error:
            sys.exit(f"train.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
        try:
            run(config, accelerator, unet, scheduler, images, validation, restored, pusher)
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
    pusher: Pusher,
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
    timestep_sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps, accelerator.device)
    first_step, history, seconds, stream = 0, [], 0.0, None
    if restored is not None:
        tensors, state = restored
        unet.load_state_dict(tensors["model"])
        ema.load_state_dict(tensors["ema"])
        load_optimizer_tensors(optimizer, unet, tensors["optimizer"])
        timestep_sampler.load_state_dict(tensors.get("timestep_sampler", {}))
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

    meter = EnergyMeter(accelerator.is_main_process and first_step == 0)
    model.train()
    loss_sum, loss_count, started = torch.zeros((), device=accelerator.device), 0, time.monotonic() - seconds
    for step in range(first_step, config.num_steps):
        report = training_step(accelerator, model, optimizer, diffusion, config, step, batches.step(), timestep_sampler)
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
                if sampler_state := timestep_sampler.state_dict():
                    tensors["timestep_sampler"] = sampler_state
                state = {
                    "config": dataclasses.asdict(config),
                    "history": history,
                    "num_examples": images.num_examples,
                    "stream": stream,
                    "seconds": time.monotonic() - started,
                }
                pusher.checkpoint(
                    done, unet, scheduler, save_checkpoint(output_dir / "checkpoints", done, tensors, state)
                )
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
            **meter.stop(),
        }
        ema.copy_to(unet)
        finish(config, unet, scheduler, history, training)
        pusher.finish()
    # Before the process group ends: a DDP model that is its last owner waits, with Python's lock, for threads of gloo's
    # that may be waiting for that lock (torch 2.13).
    del model, optimizer
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    launch.run(main)
