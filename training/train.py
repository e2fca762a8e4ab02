"""Train a DDPM: `accelerate launch training/train.py --config <preset> [--option value ...]`.

Reads top to bottom: `main` prepares data, network and optimizer, goes on from the last checkpoint if there is one,
runs `training_step` until enough images were seen, and leaves a pipeline, figures and a model card in `output_dir`.
"""

import logging
import platform
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed

from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages, StreamError
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.files import atomic_file, lock_folder
from ddpm_hf.pipelines.guidance import mark_class_names
from ddpm_hf.training import launch
from ddpm_hf.training.artifacts import finish
from ddpm_hf.training.build import build, build_unet
from ddpm_hf.training.checkpoints import load_optimizer_tensors
from ddpm_hf.training.config import TrainingConfig, parse_config
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.energy import EnergyMeter
from ddpm_hf.training.nonfinite import SkippedSteps
from ddpm_hf.training.posthoc_ema import PowerEMA
from ddpm_hf.training.processes import fail, use_cpu_threads
from ddpm_hf.training.resume import check_same_data, data_position, is_sharded, last_checkpoint, save, warn_of_changes
from ddpm_hf.training.run_data import load_images
from ddpm_hf.training.run_logger import RunLogger
from ddpm_hf.training.sharding import full_on_cpu
from ddpm_hf.training.step import training_step
from ddpm_hf.training.stopping import EXIT_NONFINITE, EXIT_NOT_SAVED, StopSignals, lost_process, say_error
from ddpm_hf.training.uploads import Uploader
from ddpm_hf.training.validation import load_validation_images

logger = logging.getLogger("train")


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
                use_cpu_threads(config.cpu_threads)
            if not accelerator.is_main_process:
                datasets.disable_progress_bars()
            config.micro_batches(accelerator.num_processes)
            set_seed(config.seed)
            torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = config.tf32
            uploads = config.push_to_hub and accelerator.is_main_process and not config.dry_run
            uploader = Uploader(
                Path(config.output_dir),
                config.hub_model_id if uploads else None,
                config.hub_private,
                config.checkpoint_every_steps * config.push_every_checkpoints,
                config.keep_checkpoints,
            )
            uploader.create_repository()
            unet, scheduler = build(config)
            with accelerator.main_process_first():
                images, validation = load_images(config, accelerator.device)
                validation_subset = load_validation_images(config, validation, accelerator.device)
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
            uploader.start(config.overwrite)
        except ValueError as error:
            fail("train.py", error)
        try:
            run(
                config, accelerator, unet, scheduler, images, validation, validation_subset, restored, uploader, signals
            )
        except StreamError as error:
            sys.exit(f"train.py: error: {error}")
        except (RuntimeError, ConnectionError, EOFError) as error:
            if (sentence := lost_process(error)) is None:
                raise
            fail("train.py", f"{sentence} The last checkpoint is as it was; the same command goes on from there.")


def run(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModelCustom,
    scheduler: DDPMSchedulerCustom,
    images: Images | StreamedImages,
    validation: Images | None,
    validation_subset: Images | None,
    restored: tuple[dict, dict] | None,
    uploader: Uploader,
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
    records = RunLogger(
        config, accelerator, unet, scheduler, averages, validation_subset, first_step, recorded, images.num_examples
    )
    if records.is_writer:
        atomic_file(output_dir / "config.yaml", config.to_yaml())

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

            stop = signals.should_stop()
            saves = done % config.checkpoint_every_steps == 0 or done == config.num_steps or stop
            if (saves or records.is_logged(done)) and skipped.too_many_skipped():
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
                    if done < config.num_steps:
                        uploader.upload_checkpoint(done, unet, scheduler, saved)
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
    averaged = full_on_cpu(averages["ema"].state_dict(), keep=accelerator.is_main_process)
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
        uploader.finish()
    # Before the process group ends: a DDP model that is its last owner waits, with Python's lock, for threads of gloo's
    # that may be waiting for that lock (torch 2.13).
    del model, optimizer
    accelerator.free_memory()
    accelerator.end_training()
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    launch.run(main)
