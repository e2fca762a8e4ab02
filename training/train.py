"""Train a DDPM: `python training/train.py --config <preset> [--option value ...]`.

Reads top to bottom: `main` reads the options, `prepare` loads data and network and the last checkpoint, `train` runs
`training_step` until enough images were seen, and `finish` writes a pipeline, figures and a model card to `output_dir`.
"""

from __future__ import annotations

import logging
import platform
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_hf.files import check_output_folder, lock_folder
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.processes import fail, prepare_process, settle_with_launcher, use_cpu_threads
from ddpm_hf.training.stopping import EXIT_NONFINITE, EXIT_NOT_SAVED, StopSignals, output_may_fail, print_error

# torch and the libraries on top of it take seconds to import. The functions below import them when they run, after the
# options were parsed, so that --help and an unknown option are answered at once.
if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom
    from ddpm_hf.data.images import Images
    from ddpm_hf.data.streaming import StreamedImages
    from ddpm_hf.training.run_logger import RunLogger
    from ddpm_hf.training.uploads import Uploader


@dataclass
class Run:
    """What `prepare` sets up. `conditions`: see `preview_conditions`. `fingerprint`: of the training images. `restored`:
    tensors and state of the checkpoint to resume from."""

    config: TrainingConfig
    accelerator: Accelerator
    unet: UNet2DModelCustom
    scheduler: DDPMSchedulerCustom
    images: Images | StreamedImages
    validation: Images | None
    validation_subset: Images | None
    conditions: torch.Tensor | None
    fingerprint: str | None
    restored: tuple[dict, dict] | None
    uploader: Uploader


def main(arguments: list[str] | None = None) -> None:
    """Run the script. Errors in options, data or checkpoints are reported before anything is trained or written."""
    prepare_process()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with ExitStack() as stack:
        stack.enter_context(output_may_fail())
        signals = stack.enter_context(StopSignals())
        try:
            config = parse_config(arguments)
        except ValueError as error:  # answered without torch
            fail("train.py", error)
        except (OSError, MemoryError, RuntimeError) as error:
            from ddpm_hf.training.failures import describe

            if (sentence := describe(error)) is None:
                raise
            fail("train.py", sentence)
        from ddpm_hf.training.failures import in_one_sentence

        with in_one_sentence():
            run = prepare(config, stack)
        with in_one_sentence(config.output_dir):
            train(run, signals)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The processes of the run, with their precision, threads and seeds."""
    import datasets
    import huggingface_hub
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        set_seed,
    )

    from ddpm_hf.training.progress import is_terminal
    from ddpm_hf.training.resume import is_sharded

    if missing := set(config.trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise ValueError(
            f"report_to = {config.report_to} needs packages that are not installed: {', '.join(sorted(missing))}."
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `training_step` accumulates itself
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_group_timeout)),
        ],
    )
    for name in ("compile", "lora_rank"):
        if is_sharded(accelerator) and getattr(config, name):
            raise ValueError(f"{name} = {getattr(config, name)!r} cannot be combined with FSDP.")
    config.micro_batches(accelerator.num_processes)  # raises ValueError if the batch cannot be divided
    if accelerator.device.type == "cpu":
        use_cpu_threads(config.cpu_threads)
    if not accelerator.is_main_process or not is_terminal():  # bars of libraries, of which files would keep every state
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    set_seed(config.seed)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    return accelerator


def prepare(config: TrainingConfig, stack: ExitStack) -> Run:
    """Set up a run; its folder stays locked until `stack` closes. Raises ValueError for invalid options, data or checkpoints."""
    from ddpm_hf.data.builtin import BUILTIN
    from ddpm_hf.pipelines.guidance import mark_class_names
    from ddpm_hf.training.artifacts import FILES, FOLDERS
    from ddpm_hf.training.base_model import load_base_weights
    from ddpm_hf.training.build import build_scheduler, build_unet
    from ddpm_hf.training.checkpoints import prune_checkpoints
    from ddpm_hf.training.lora import add_lora
    from ddpm_hf.training.resume import check_same_data, last_checkpoint
    from ddpm_hf.training.run_data import load_images, preview_conditions, with_num_classes
    from ddpm_hf.training.uploads import Uploader
    from ddpm_hf.training.validation import load_validation_images

    config = replace(config, mixed_precision=settle_with_launcher(config.mixed_precision))
    accelerator = make_accelerator(config)
    output_dir = Path(config.output_dir)
    if accelerator.is_main_process:
        check_output_folder("output_dir", output_dir, FILES, FOLDERS)
    uploads = config.push_to_hub and accelerator.is_main_process and not config.dry_run
    # The averages of a checkpoint are a model, unless they are adapters: then the finished model alone is uploaded.
    every_steps = 0 if config.lora_rank else config.checkpoint_every_steps * config.push_every_checkpoints
    uploader = Uploader(
        output_dir,
        config.hub_model_id if uploads else None,
        config.hub_private,
        every_steps,
        config.keep_checkpoints,
        config.push_wait_seconds,
    )
    uploader.create_repository()
    scheduler = build_scheduler(config)
    with accelerator.main_process_first():
        images, validation = load_images(config, accelerator.device)
        config = with_num_classes(config, images).with_length(images.num_examples)
        validation_subset = load_validation_images(config, validation, accelerator.device)
        conditions = preview_conditions(images, config)
    unet = build_unet(config)
    if images.class_names is not None:
        mark_class_names(unet, images.class_names)
    if config.lora_rank is not None:  # adapters rename the weights, which are loaded before
        load_base_weights(unet, config.init_from)
        add_lora(unet, config)
    if accelerator.is_main_process and not config.dry_run:
        stack.enter_context(lock_folder(output_dir))
        if config.overwrite:
            prune_checkpoints(output_dir / "checkpoints", keep=0)
    accelerator.wait_for_everyone()
    restored = None if config.overwrite else last_checkpoint(config, output_dir / "checkpoints", unet)
    if restored is None and config.init_from is not None and config.lora_rank is None:
        load_base_weights(unet, config.init_from)
    # The name says what is in built-in data; the bytes of its images depend on the version of Pillow.
    fingerprint = None if config.dataset in BUILTIN else images.fingerprint
    check_same_data(images.num_examples, fingerprint, restored)
    uploader.start(config.overwrite)
    data = (images, validation, validation_subset, conditions, fingerprint)
    return Run(config, accelerator, unet, scheduler, *data, restored, uploader)


def build_training(run: Run):
    """The model and optimizer to train with, the `TrainingState` that checkpoints save, restored from the last one, and the
    loss."""
    import torch

    from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
    from ddpm_hf.training.build import build_loss_function
    from ddpm_hf.training.ema import EMA, trained_parameters
    from ddpm_hf.training.posthoc_ema import PowerEMA
    from ddpm_hf.training.resume import TrainingState, is_sharded

    config, accelerator, unet = run.config, run.accelerator, run.unet
    device, betas = accelerator.device, (0.9, config.adam_beta2)
    options = {"weight_decay": config.weight_decay, "fused": device.type != "mps"}
    trained = trained_parameters(unet).values()
    optimizer = torch.optim.AdamW(trained, config.learning_rate, betas, **options)  # Adam for a decay of 0
    # FSDP accepts weights in torch's default memory format only.
    unet.to(device, memory_format=torch.contiguous_format if is_sharded(accelerator) else torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if run.restored is not None:
        unet.load_state_dict(run.restored[0]["model"])
    model = torch.compile(unet, backend=config.compile) if config.compile else unet
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    averages = {"ema": EMA(unet, config.ema_halflife_images, decay=config.ema_decay, warmup=config.ema_warmup)}
    if config.ema_snapshot_every_images:
        averages["power_ema"] = PowerEMA(unet)
    timestep_sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps, device)
    state = TrainingState(unet, averages, optimizer.optimizer, timestep_sampler)
    if run.restored is not None:
        state.load(run.restored[0])
        if accelerator.scaler is not None and "scaler" in run.restored[1]:
            accelerator.scaler.load_state_dict(run.restored[1]["scaler"])
    return model, optimizer, state, build_loss_function(config, accelerator, run.scheduler)


def train(run: Run, signals: StopSignals) -> None:
    """Train to the end of the run; a dry run only times a few steps. Raises SystemExit with a code of stopping.py."""
    from accelerate.utils import gather_object

    from ddpm_hf.data.batches import MicroBatches
    from ddpm_hf.training.dry_run import time_training
    from ddpm_hf.training.nonfinite import SkippedSteps
    from ddpm_hf.training.resume import data_position, save, warn_of_changes
    from ddpm_hf.training.run_logger import RunLogger
    from ddpm_hf.training.run_summary import describe_data
    from ddpm_hf.training.step import training_step

    config, accelerator, num_examples = run.config, run.accelerator, run.images.num_examples
    world, images_at_a_time = accelerator.num_processes, config.images_at_a_time(accelerator.num_processes)
    model, optimizer, state, loss_function = build_training(run)
    skipped = SkippedSteps(accelerator, run.images, config.batch_size, config.seed, config.max_nonfinite_steps)
    first_step, stream, logged = 0, None, None
    if run.restored is not None:
        saved = run.restored[1]
        first_step, stream, logged = saved["step"], saved["data"]["stream"], saved["records"]
        skipped.total, skipped.in_a_row = saved["nonfinite_steps"], saved["nonfinite_steps_in_a_row"]
        if accelerator.is_main_process:
            warn_of_changes(config.dropout, images_at_a_time, saved)
        accelerator.print(f"Resuming from step {first_step} of {config.total_steps} ({config.output_dir}/checkpoints).")
    share = (accelerator.process_index, world, config.micro_batches(world), config.num_workers, accelerator.device)
    order = (config.batch_size, config.seed, first_step, config.total_steps)
    batches = MicroBatches(run.images, *order, *share, state=stream)
    parts = (run.unet, run.scheduler, state.averages, run.validation_subset, first_step, logged, num_examples)
    run_logger = RunLogger(config, accelerator, *parts, run.conditions, describe_data(run.images), loss_function)
    exit_code, last_step = 0, first_step if config.dry_run else config.total_steps
    if config.dry_run:
        parts = (model, optimizer, run.scheduler.diffusion, state.timestep_sampler)
        time_training(config, accelerator, *parts, batches, first_step, loss_function=loss_function)
    with signals.deferred(world, timedelta(seconds=config.process_group_timeout)):
        for done in range(first_step + 1, last_step + 1):
            parts = (run.scheduler.diffusion, config, done - 1, batches.step(), state.timestep_sampler, loss_function)
            report = training_step(accelerator, model, optimizer, *parts)
            for average in state.averages.values():
                average.update(run.unet, done * config.batch_size, config.batch_size, report.skipped)
            skipped.add(done - 1, report.t, report.objective, report.skipped)

            stop = signals.should_stop()
            is_saved = done % config.checkpoint_every_steps == 0 or done == config.total_steps or stop
            if (is_saved or run_logger.is_logged(done)) and skipped.too_many_skipped():
                print_error(
                    f"{skipped.in_a_row} steps in a row had no finite loss and gradient; the checkpoints are unchanged."
                )
                exit_code = EXIT_NONFINITE
                break
            run_logger.after_step(done, report)

            if is_saved:
                stream = batches.gather_state(gather_object)
                progress = {
                    "data": data_position(done, config.batch_size, num_examples, run.fingerprint, stream),
                    "images_at_a_time": images_at_a_time,
                    "records": run_logger.state(),
                    "nonfinite_steps": skipped.total,
                    "nonfinite_steps_in_a_row": skipped.in_a_row,
                }
                folder = save(config, accelerator, done, state, progress)
                if folder is not None and done < config.total_steps:
                    run.uploader.upload_checkpoint(done, run.unet, run.scheduler, folder)
                elif folder is None and (stop or done == config.total_steps):
                    print_error("the last checkpoint could not be saved; free some space and run the same command.")
                    exit_code = EXIT_NOT_SAVED
            if stop:
                accelerator.print(f"\nStopped after step {done} of {config.total_steps}; the same command resumes.")
                exit_code = exit_code or 128 + stop
                break
    exit_code = exit_code or (signals.received and 128 + signals.received)
    run_logger.close()
    finish(run, state.averages["ema"].state_dict(), run_logger, first_step, exit_code)
    # Before the process group ends: a DDP model that is destroyed after it waits, holding Python's lock, for threads of
    # gloo that may wait for that lock (torch 2.13).
    del model, optimizer
    accelerator.free_memory()
    accelerator.end_training()
    if exit_code:
        sys.exit(exit_code)


def finish(run: Run, averaged: dict, run_logger: RunLogger, first_step: int, exit_code: int) -> None:
    """Write and upload the model with the averaged weights, unless the run stopped early. Every process must call this."""
    import torch

    from ddpm_hf.pipelines.guidance import mark_class_names
    from ddpm_hf.training.artifacts import device_name, write_artifacts
    from ddpm_hf.training.build import build_unet
    from ddpm_hf.training.checkpoints import versions
    from ddpm_hf.training.lora import save_and_merge_lora
    from ddpm_hf.training.resume import is_sharded
    from ddpm_hf.training.sharding import full_on_cpu
    from ddpm_hf.training.validation import count_validation_images

    config, accelerator, unet = run.config, run.accelerator, run.unet
    averaged = full_on_cpu(averaged, keep=accelerator.is_main_process)  # FSDP needs every process for this
    if exit_code or not run_logger.is_writer:
        return
    seconds = run_logger.seconds if first_step < config.total_steps else run.restored[1]["records"]["seconds"]
    training = {
        "images_seen": config.total_steps * config.batch_size,
        "steps": config.total_steps,
        **run_logger.final_losses(),
        "seconds": round(seconds, 1),
        "images_per_second": round(config.total_steps * config.batch_size / seconds, 1),
        "processes": accelerator.num_processes,
        "hardware": f"{device_name(accelerator.device)}, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": versions(),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "train_examples": run.images.num_examples,
        "validation_examples": count_validation_images(config, run.validation),
    }
    if is_sharded(accelerator):
        unet = build_unet(config).to(accelerator.device)
        if run.images.class_names is not None:
            mark_class_names(unet, run.images.class_names)
    unet.load_state_dict(unet.state_dict() | averaged)
    if config.lora_rank is not None:
        save_and_merge_lora(unet, Path(config.output_dir))
    write_artifacts(config, unet, run.scheduler, run_logger.log.rows, training, run.conditions)
    run.uploader.finish()


if __name__ == "__main__":
    main()
