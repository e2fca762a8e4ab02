"""Logging of a run: log.jsonl, trackers, a progress bar, the validation loss, sample images and EMA snapshots.

Logging does not change the run: it draws no number from a generator that training uses, and restores the weights after
sampling. Values are of the global batch, and are read from the device every `log_every_steps` only. When a file
cannot be written, for example because the disk is full, a warning is logged and training continues.
"""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.data.images import Images
from ddpm_hf.diffusion.losses import Loss
from ddpm_hf.evaluation.plots import figure_bytes, image_grid
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.files import atomic_file
from ddpm_hf.pipelines.denoising import NonFiniteSamples
from ddpm_hf.training.artifacts import denoising_figure
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.log_file import LogFile, logger, warn_if_not_written
from ddpm_hf.training.posthoc_ema import PowerEMA, drop_snapshots_after, save_snapshot
from ddpm_hf.training.progress import progress_bar
from ddpm_hf.training.run_summary import SpeedReport, describe_run
from ddpm_hf.training.sharding import full_on_cpu
from ddpm_hf.training.step import StepReport
from ddpm_hf.training.step_statistics import StepStatistics
from ddpm_hf.training.trackers import Trackers
from ddpm_hf.training.validation import L_SIMPLE, ValidationLoss

LOG, SNAPSHOTS, SAMPLES = "log.jsonl", "ema_snapshots", "samples"
GRID = 25  # sample images in a picture


@dataclass
class RunLogger:
    """Call `after_step` after every step, on every process, and store `state()` in the checkpoints.

    Args:
        averages: "ema", and "power_ema" if snapshots are saved.
        validation: images for the validation loss, or None.
        first_step: step at which this part of the run begins; files that an earlier part wrote after it are removed.
        restored: `state()` from the checkpoint that the run resumes from; None at the start.
        train_examples: for the summary; None for a stream, whose length is unknown.
        data: lines of the summary about the images (see `describe_data`).
        conditions: for the samples of a run with `class_embed_type`, those of the first training images.
        loss_function: that of the run. Validation measures its `simple` if the run distills a teacher, and else L_simple
            alone: an objective of the bound would compute the bound too.
    """

    config: TrainingConfig
    accelerator: Accelerator
    unet: UNet2DModelCustom
    scheduler: DDPMSchedulerCustom
    averages: Mapping[str, EMA | PowerEMA]
    validation: Images | None
    first_step: int
    restored: dict | None
    train_examples: int | None
    conditions: torch.Tensor | None = None
    data: str = ""
    loss_function: Callable[..., Loss] = L_SIMPLE

    def __post_init__(self):
        config, accelerator, first_step = self.config, self.accelerator, self.first_step
        self.folder, self.images_at_a_time = Path(config.output_dir), config.images_at_a_time(accelerator.num_processes)
        self.validation_loss = self.validation and ValidationLoss(
            self.validation,
            self.scheduler.diffusion,
            config.seed,
            accelerator,
            self.images_at_a_time,
            L_SIMPLE if config.distill_steps is None else self.loss_function,
        )
        self.is_writer = accelerator.is_main_process and not config.dry_run
        self._statistics = StepStatistics(config.num_train_timesteps, accelerator, self.restored)
        self._speed = SpeedReport(first_step, config.total_steps, config.batch_size, accelerator.device)
        if self.is_writer:
            self._remove_after(first_step)
            atomic_file(self.folder / "config.yaml", config.to_yaml())
        self.log = LogFile(self.folder / LOG if self.is_writer else None, first_step)
        if not config.dry_run:
            settings = {k: str(v) for k, v in asdict(config).items()}
            self.trackers = Trackers(accelerator, settings, first_step, self.folder.resolve().name)
        examples = (self.train_examples, len(self.validation or ()))
        parameters = (self.unet.num_parameters(), self.unet.num_parameters(only_trainable=True))
        accelerator.print(describe_run(config, accelerator, parameters, examples, first_step, self.data))
        done, total = first_step * config.batch_size, config.total_steps * config.batch_size
        shown = accelerator.is_main_process and not config.dry_run
        self._bar = progress_bar("Training", total, "images", initial=done, shown=shown)
        self._shown = {}
        self._started = time.monotonic() - (self.restored or {"seconds": 0})["seconds"]
        self._restart_clock()

    @property
    def seconds(self) -> float:
        """Duration of the run in seconds, including the parts before it was resumed."""
        return time.monotonic() - self._started

    def is_logged(self, done: int) -> bool:
        """Whether `after_step` reads values from the device after step `done`."""
        return done % self.config.log_every_steps == 0 or done == self.config.total_steps

    def after_step(self, done: int, report: StepReport) -> None:
        """Log the step after which `done` steps are complete. Every process must call this."""
        config, is_last, images = self.config, done == self.config.total_steps, done * self.config.batch_size
        self._statistics.add(report)
        self._clock_steps += 1
        self._bar.update(config.batch_size)
        if (line := self._speed.after_step(done)) and self.accelerator.is_main_process:
            self._bar.write(line)
        if config.dry_run:
            return
        row = self._read(done) if self.is_logged(done) else {}
        if self.validation_loss is not None and (done % config.validate_every_steps == 0 or is_last):
            row["validation_loss"] = self.validation_loss(self.unet)
            with self.averages["ema"].in_place_of(self.unet):
                row["validation_loss_ema"] = self.validation_loss(self.unet)
            self._restart_clock()
        if row:
            self._write({"step": done, "images": images, "seconds": round(self.seconds, 3)} | row)
        if config.sample_every_steps and done % config.sample_every_steps == 0:
            self._write_samples(done)
            self._restart_clock()
        every = config.ema_snapshot_every_images
        if every and (is_last or images % every < config.batch_size):  # the step passed a multiple of the interval
            tensors = full_on_cpu(self.averages["power_ema"].state_dict(), keep=self.is_writer)
            if self.is_writer:
                with warn_if_not_written(f"The EMA snapshot of step {done}"):
                    save_snapshot(self.folder / SNAPSHOTS, images, tensors)

    def state(self) -> dict:
        """What a checkpoint stores to resume the log (JSON-able). Every process must call this."""
        return {"seconds": self.seconds} | self._statistics.state()

    def final_losses(self) -> dict[str, float]:
        """The last value of each loss in the log, under its name in metrics.json."""
        names = ("loss", "validation_loss", "validation_loss_ema")
        return {f"final_{n}": found[-1] for n in names if (found := [row[n] for row in self.log.rows if row.get(n)])}

    def close(self) -> None:
        """End the progress bar and the tracker."""
        self._bar.close()
        if self.config.dry_run:
            self.accelerator.print("Dry run: nothing was written.")
        else:
            self.trackers.close()

    def _read(self, done: int) -> dict:
        row = self._statistics.read()
        rate = self._clock_steps * self.config.batch_size / (time.monotonic() - self._clock_started)
        self._restart_clock()
        return row | {"learning_rate": self.config.learning_rate_at(done - 1), "images_per_second": round(rate, 1)}

    def _restart_clock(self) -> None:
        """Start to time training steps: validation and sampling are left out of images_per_second."""
        self._clock_started, self._clock_steps = time.monotonic(), 0

    def _write(self, row: dict) -> None:
        self.log.append(row)
        if not self.is_writer:
            return
        quartiles = enumerate(row.get("loss_by_t_quartile", ()), start=1)
        values = row | {f"loss_t_quartile_{i}": value for i, value in quartiles}
        left_out = ("step", "images", "loss_by_t_quartile")
        logged = {key: value for key, value in values.items() if key not in left_out and value is not None}
        self.trackers.log(logged, row["step"])
        shown = {"loss": row.get("loss"), "validation": row.get("validation_loss_ema")}
        self._shown |= {k: f"{v:.4f}" for k, v in shown.items() if v is not None}
        self._bar.set_postfix(self._shown, refresh=False)

    def _write_samples(self, done: int) -> None:
        """Samples of the EMA weights. All processes make them, since sharded weights need every process; one writes."""
        config, pipe = self.config, DDPMPipelineCustom(self.unet, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        with self.averages["ema"].in_place_of(self.unet):
            options = (config.sample_steps, config.seed, self.images_at_a_time, self.conditions)
            try:
                samples = sample_images(pipe, range(GRID), *options)
            except NonFiniteSamples as error:  # of every process alike: they make the same samples
                logger.warning("No sample picture of step %d: %s Training continues.", done, error)
                return
            denoising = denoising_figure(pipe, config.sample_steps, config.seed, self.conditions)
        if not self.is_writer:
            return
        for name, figure in (("", image_grid(samples, columns=5)), ("-denoising", denoising)):
            png = figure_bytes(figure)
            with warn_if_not_written(f"A sample picture of step {done}"):
                (self.folder / SAMPLES).mkdir(exist_ok=True)
                atomic_file(self.folder / SAMPLES / f"step-{done:08d}{name}.png", png)
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[None]
            self.trackers.log_picture(name.strip("-") or "samples", pixels, done)

    def _remove_after(self, step: int) -> None:
        """Remove pictures and snapshots of later steps: the run makes them again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for picture in (self.folder / SAMPLES).glob("step-*.png"):
            if int(picture.stem.split("-")[1]) > step:
                picture.unlink()
        drop_snapshots_after(self.folder / SNAPSHOTS, step * self.config.batch_size)
