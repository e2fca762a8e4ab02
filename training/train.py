"""Train a DDPM: `accelerate launch training/train.py --config <preset> [--option value ...]`.

Reads top to bottom: `main` prepares data, network and optimiser, goes on from the last checkpoint if there is one,
runs `training_step` until enough images were seen, and leaves a pipeline, figures and a model card in `output_dir`.
"""

import logging
import platform
import shutil
import sys
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed

from ddpm_hf import DDPMSchedulerCustom, GaussianDiffusion, UNet2DModelCustom
from ddpm_hf.data.batches import MicroBatches, process_positions
from ddpm_hf.data.decoding import to_signed
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages, StreamError
from ddpm_hf.diffusion.losses import Loss
from ddpm_hf.diffusion.timestep_samplers import UniformTimesteps, make_timestep_sampler
from ddpm_hf.files import lock_folder, write_whole
from ddpm_hf.pipelines.guidance import mark_class_names
from ddpm_hf.seeds import address_dropout
from ddpm_hf.training import launch
from ddpm_hf.training.artifacts import finish
from ddpm_hf.training.build import build, build_unet
from ddpm_hf.training.checkpoints import load_optimizer_tensors
from ddpm_hf.training.config import TrainingConfig, parse_config
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.energy import EnergyMeter
from ddpm_hf.training.nonfinite import SkippedSteps, nan_unless_finite, step_unless_skipped
from ddpm_hf.training.posthoc_ema import PowerEMA
from ddpm_hf.training.resume import check_same_data, data_position, is_sharded, last_checkpoint, save, warn_of_changes
from ddpm_hf.training.run_data import load_images
from ddpm_hf.training.run_logger import Records
from ddpm_hf.training.sharding import whole, whole_on_cpu
from ddpm_hf.training.step_randomness import Draws, draw
from ddpm_hf.training.stopping import EXIT_NONFINITE, EXIT_NOT_SAVED, StopSignals, lost_process, say_error
from ddpm_hf.training.uploads import Pusher
from ddpm_hf.training.validation import held_out_images

logger = logging.getLogger("train")


class StepReport(NamedTuple):
    """What a step found on this process's share (b,) of the batch; tensors on the device, read rarely: that waits.

    `t`, `losses` and `objective` (b,) are by example, in order of position; `grad_norm` is of the whole batch, before
    clipping. `losses` is L_simple in terms of the target, not weighted, whatever is minimised, so that runs of
    different objectives and timestep samplers can be compared, t by t. `objective` is what is minimised (`Objective`)
    times the weight of importance sampling: its mean estimates the objective under uniform timesteps. `skipped` is 1, on
    every process alike, where a loss or the gradient is not finite, and 0 otherwise.
    """

    t: torch.Tensor
    losses: torch.Tensor
    grad_norm: torch.Tensor
    objective: torch.Tensor
    skipped: torch.Tensor


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
    Where a loss or the gradient is not finite, weights and optimiser stay as they are.
    """
    positions = process_positions(config.batch_size, accelerator.process_index, accelerator.num_processes)
    draws = draw(config, step, positions, accelerator.device, sampler)
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
        if config.dropout:
            address_dropout(config.seed, step, positions.start + i * size)
        # Gradients are exchanged once a step, with the last part.
        with accelerator.no_sync(model) if i < parts - 1 else nullcontext():
            loss = objective(model, diffusion, x_0, part.t, part.noise, labels, part.input_noise)
            accelerator.backward((loss.objective * part.weight).mean() / parts * nan_unless_finite(loss.objective))
        losses.append(Loss(loss.objective.detach(), loss.simple.detach()))
    grad_norm = whole(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    skipped = 1 - grad_norm.isfinite().float()
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    step_unless_skipped(optimizer, skipped)
    optimizer.zero_grad()
    loss = Loss(*map(torch.cat, zip(*losses)))
    if sampler is not None and sampler.uses_losses:
        # Processes have the positions in order of rank, so that this is the global batch in order of position.
        sampler.update(accelerator.gather(draws.t), accelerator.gather(loss.objective))
    return StepReport(draws.t, loss.simple, grad_norm, loss.objective * draws.weight, skipped)


def main(arguments: list[str] | None = None) -> None:
    """Prepare a run; whatever is wrong with it is said here, before anything is trained or written."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        try:
            config = parse_config(arguments)
            accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),
                mixed_precision=config.mixed_precision,
                log_with=None if config.report_to == "none" else config.report_to,
                project_dir=config.output_dir,
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            )
            if is_sharded(accelerator) and config.compile:
                raise ValueError(f"compile = {config.compile!r} does not go together with FSDP.")
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
                held_out = held_out_images(config, validation, accelerator.device)
            if images.class_names is not None:
                mark_class_names(unet, images.class_names)
            output_dir = Path(config.output_dir)
            if accelerator.is_main_process and not config.dry_run:
                stack.enter_context(lock_folder(output_dir))
                if config.overwrite:
                    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
            accelerator.wait_for_everyone()
            restored = None if config.overwrite else last_checkpoint(config, output_dir / "checkpoints")
            check_same_data(images, restored)
            pusher.start()
        except ValueError as error:
            launch.fail("train.py", error)
        try:
            run(config, accelerator, unet, scheduler, images, validation, held_out, restored, pusher, signals)
        except StreamError as error:
            sys.exit(f"train.py: error: {error}")
        except (RuntimeError, ConnectionError, EOFError) as error:
            if (sentence := lost_process(error)) is None:
                raise
            launch.fail(
                "train.py", f"{sentence} The last checkpoint is as it was; the same command goes on from there."
            )


def run(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModelCustom,
    scheduler: DDPMSchedulerCustom,
    images: Images | StreamedImages,
    validation: Images | None,
    held_out: Images | None,
    restored: tuple[dict, dict] | None,
    pusher: Pusher,
    signals: StopSignals,
) -> None:
    """Train from `restored`, or from the start, to the end; a dry run stops after a few steps and writes nothing.

    Raises SystemExit with a code of stopping.py where it ends before.
    """
    output_dir, parts = Path(config.output_dir), config.micro_batches(accelerator.num_processes)
    images_at_a_time = config.images_at_a_time(accelerator.num_processes)
    diffusion = scheduler.diffusion
    optimizer = torch.optim.Adam(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        fused=accelerator.device.type != "mps",
    )
    # FSDP takes weights in torch's own order only.
    memory_format = torch.contiguous_format if is_sharded(accelerator) else torch.channels_last
    unet.to(accelerator.device, memory_format=memory_format)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if restored is not None:
        unet.load_state_dict(restored[0]["model"])
    model = torch.compile(unet, backend=config.compile) if config.compile else unet
    model, optimizer = accelerator.prepare(model, optimizer)

    averages = {"ema": EMA(unet, config.ema_halflife_images, decay=config.ema_decay, warmup=config.ema_warmup)}
    if config.ema_snapshot_every_images:
        averages["power_ema"] = PowerEMA(unet)
    timestep_sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps, accelerator.device)
    skipped = SkippedSteps(config, accelerator, images)
    first_step, stream, recorded = 0, None, None
    if restored is not None:
        tensors, state = restored
        for name, average in averages.items():
            average.load_state_dict(tensors[name])
        load_optimizer_tensors(optimizer.optimizer, unet, tensors["optimizer"])
        timestep_sampler.load_state_dict(tensors.get("timestep_sampler", {}))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        first_step, stream, recorded = state["step"], state["data"]["stream"], state["records"]
        skipped.total, skipped.in_a_row = state["nonfinite_steps"], state["nonfinite_steps_in_a_row"]
        if accelerator.is_main_process:
            warn_of_changes(config, state, images_at_a_time)
        accelerator.print(f"Going on from step {first_step} of {config.num_steps} ({output_dir / 'checkpoints'}).")

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
    records = Records(
        config, accelerator, unet, scheduler, averages, held_out, first_step, recorded, images.num_examples
    )
    if records.is_writer:
        write_whole(output_dir / "config.yaml", config.to_yaml())

    meter = EnergyMeter(records.is_writer and first_step == 0)
    model.train()
    exit_code = 0
    with signals.deferred(accelerator.num_processes):
        for step in range(first_step, records.last_step):
            report = training_step(
                accelerator, model, optimizer, diffusion, config, step, batches.step(), timestep_sampler
            )
            done = step + 1
            for average in averages.values():
                average.update(unet, done * config.batch_size, config.batch_size, report.skipped)
            skipped.add(step, report.t, report.objective, report.skipped)

            stop = signals.asked()
            saves = done % config.checkpoint_every_steps == 0 or done == config.num_steps or stop
            if (saves or records.is_logged(done)) and skipped.read():
                say_error(
                    f"{skipped.in_a_row} steps in a row had no finite loss and gradient; the checkpoints are as they were."
                )
                exit_code = EXIT_NONFINITE
                break
            records.after_step(done, report)

            if saves and not config.dry_run:
                stream = batches.gather_state(gather_object)
                state = {
                    "data": data_position(done, config.batch_size, images.num_examples, stream),
                    "images_at_a_time": images_at_a_time,
                    "records": records.state(),
                    "nonfinite_steps": skipped.total,
                    "nonfinite_steps_in_a_row": skipped.in_a_row,
                }
                saved = save(config, accelerator, done, unet, averages, optimizer.optimizer, timestep_sampler, state)
                if saved is not None:
                    pusher.checkpoint(done, unet, scheduler, saved)
                elif stop or done == config.num_steps:
                    say_error("the run ends without its last checkpoint; make room and give the same command.")
                    exit_code = EXIT_NOT_SAVED

            if stop:
                accelerator.print(
                    f"\nStopped after step {done} of {config.num_steps}: the same command goes on from there."
                )
                exit_code = exit_code or 128 + stop
                break
    if signals.received:
        exit_code = exit_code or 128 + signals.received
    records.close()

    # With FSDP every process is needed for this, also at the end of one that a signal ended after the last step.
    averaged = whole_on_cpu(averages["ema"].state_dict(), keep=accelerator.is_main_process)
    if records.is_writer and not exit_code:
        seconds = records.seconds if first_step < config.num_steps else recorded["seconds"]
        training = {
            "images_seen": config.num_steps * config.batch_size,
            "steps": config.num_steps,
            **records.final_losses(),
            "seconds": round(seconds, 1),
            "images_per_second": round(config.num_steps * config.batch_size / seconds, 1),
            "processes": accelerator.num_processes,
            "hardware": f"{accelerator.device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
            "parameters": sum(p.numel() for p in unet.parameters()),
            "train_examples": images.num_examples,
            "validation_examples": 0 if validation is None else len(validation),
            **meter.stop(),
        }
        if is_sharded(accelerator):
            unet = build_unet(config).to(accelerator.device)
            if images.class_names is not None:
                mark_class_names(unet, images.class_names)
        unet.load_state_dict(averaged)
        finish(config, unet, scheduler, records.rows, training)
        pusher.finish()
    # Before the process group ends: a DDP model that is its last owner waits, with Python's lock, for threads of gloo's
    # that may be waiting for that lock (torch 2.13).
    del model, optimizer
    accelerator.free_memory()
    accelerator.end_training()
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    launch.run(main)
