"""What watches a run: its summary, log.jsonl, trackers, the loss of validation images, pictures, snapshots of averages.

Nothing here changes the run: no number is drawn from a generator that training uses, and the weights are put back
as they were. Figures are of the global batch, and are read from the device every `log_every_steps` alone. What cannot be written,
on a full disk, is reported, and training goes on.
"""

import dataclasses
import io
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.data.images import Images
from ddpm_hf.evaluation.plots import figure_bytes, image_grid
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.files import atomic_file
from ddpm_hf.training.artifacts import strip_of
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.posthoc_ema import PowerEMA, drop_snapshots_after, save_snapshot
from ddpm_hf.training.sharding import full_on_cpu
from ddpm_hf.training.validation import ValidationLoss

logger = logging.getLogger("train")
LOG, SNAPSHOTS, PICTURES = "log.jsonl", "ema_snapshots", "samples"
QUARTILES = 4
TIMED_STEPS = 5  # after the first, which compiles and allocates
GRID = 25


def read_log(file: Path) -> list[dict]:
    """The rows of a log, {"step": k, "images": n, ...}; none where there is no file. A line that a killed run left torn
    is reported and left out."""
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), start=1):
        try:
            row = json.loads(line)
            row["step"] + row["images"]
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: line %d is torn, and left out.", file, number)
            continue
        rows.append(row)
    return rows


class RunLogger:
    """Watches a run: call `after_step` after every step, and put `state()` into the checkpoints.

    Args:
        averages: "ema", and "power_ema" where snapshots are kept.
        validation: what `load_validation_images` gave.
        first_step: the first step of this part of the run; what an earlier part wrote after it is cut off.
        state: what the checkpoint that the run goes on from holds of `state()`.
        train_examples: for the summary; None for a stream, which does not know.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        unet: UNet2DModelCustom,
        scheduler: DDPMSchedulerCustom,
        averages: Mapping[str, EMA | PowerEMA],
        validation: Images | None,
        first_step: int,
        state: dict | None,
        train_examples: int | None,
    ):
        self.config, self.accelerator, self.unet, self.scheduler = config, accelerator, unet, scheduler
        self.averages, self.first_step, self.folder = averages, first_step, Path(config.output_dir)
        self.validation_loss = None
        self.images_at_a_time = config.images_at_a_time(accelerator.num_processes)
        if validation is not None:
            self.validation_loss = ValidationLoss(
                validation, scheduler.diffusion, config.seed, accelerator, self.images_at_a_time
            )
        self.last_step = min(config.num_steps, first_step + 1 + TIMED_STEPS) if config.dry_run else config.num_steps
        self.is_writer = accelerator.is_main_process and not config.dry_run
        self.rows: list[dict] = []

        # Since the last row of the log, over the examples of steps that were not skipped: by quartile of t the losses'
        # sum and number, then the sum of what is minimized; then over these steps the gradients' norms and their number.
        self._sums = torch.zeros(2 * QUARTILES + 3, device=accelerator.device)
        self._steps, seconds = 0, 0.0
        if state is not None:
            seconds, self._steps = state["seconds"], state["steps"]
            if accelerator.is_main_process:
                self._sums += torch.tensor(state["sums"], device=accelerator.device)
        self._log_is_behind, self._shown = False, {}

        if self.is_writer:
            self._cut_back()
        if not config.dry_run:
            options = {"tensorboard": {"purge_step": first_step + 1}} if first_step else {}
            settings = {k: str(v) for k, v in dataclasses.asdict(config).items()}
            accelerator.init_trackers("logs", config=settings, init_kwargs=options)
        if accelerator.is_main_process:
            print(self.summary(train_examples))
        self._bar = tqdm(
            total=config.num_steps * config.batch_size,
            initial=first_step * config.batch_size,
            unit="img",
            unit_scale=True,
            desc="Training",
            disable=not accelerator.is_local_main_process,
        )
        self._started = time.monotonic() - seconds
        self._row_started = self._timing_started = time.monotonic()
        self._row_steps = 0

    # ------------------------------------------------------------------ in the loop

    @property
    def seconds(self) -> float:
        """That the run has taken, its earlier parts included."""
        return time.monotonic() - self._started

    def is_logged(self, done: int) -> bool:
        """Whether `after_step` reads the losses of the steps so far."""
        return done % self.config.log_every_steps == 0 or done == self.config.num_steps

    def after_step(self, done: int, report) -> None:
        """Take in the `StepReport` of the step that was the `done`-th, and do what is due. Every process has to call it."""
        config, is_last = self.config, done == self.config.num_steps
        self._add(report)
        self._bar.update(config.batch_size)
        self._measure_speed(done)
        if config.dry_run:
            return
        row = self._read(done) if self.is_logged(done) else {}
        if self.validation_loss is not None and (done % config.validate_every_steps == 0 or is_last):
            row["validation_loss"] = self.validation_loss(self.unet)
            with self.averages["ema"].in_place_of(self.unet):
                row["validation_loss_ema"] = self.validation_loss(self.unet)
            self._start_row()
        if row:
            self._write({"step": done, "images": done * config.batch_size, "seconds": round(self.seconds, 3)} | row)
        if config.sample_every_steps and done % config.sample_every_steps == 0:
            self._write_pictures(done)
            self._start_row()
        if (every := config.ema_snapshot_every_images) and (
            is_last or done * config.batch_size // every > (done - 1) * config.batch_size // every
        ):
            tensors = full_on_cpu(self.averages["power_ema"].state_dict(), keep=self.is_writer)
            if self.is_writer:
                with self._reported(f"The snapshot of the averages at step {done}"):
                    save_snapshot(self.folder / SNAPSHOTS, done * config.batch_size, tensors)

    def state(self) -> dict:
        """What a checkpoint has to hold for the log to go on as if nothing had stopped (JSON-able). Every process has to
        call it."""
        sums = self.accelerator.reduce(self._sums.clone(), "sum")
        return {"seconds": self.seconds, "steps": self._steps, "sums": sums.tolist()}

    def final_losses(self) -> dict[str, float]:
        """The last of each loss in the log, as metrics.json names them."""
        names = ("loss", "validation_loss", "validation_loss_ema")
        return {f"final_{n}": found[-1] for n in names if (found := [row[n] for row in self.rows if row.get(n)])}

    def close(self) -> None:
        self._bar.close()
        if self.config.dry_run:
            self.accelerator.print("A dry run: nothing was written.")

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("%s could not be written (%s); training goes on.", what, error)

    def _add(self, report) -> None:
        """Without reading anything: that would make the host wait for the device."""
        quartile = report.t * QUARTILES // self.config.num_train_timesteps
        losses, objective = report.losses.detach().float(), report.objective.detach().float()
        counts = report.skipped == 0
        member = (quartile[:, None] == torch.arange(QUARTILES, device=quartile.device)) & counts
        # The norm is the same on all processes: one of them adds it.
        steps = counts.float().reshape(1) * self.accelerator.is_main_process
        self._sums += torch.cat(
            [
                torch.where(member, losses[:, None], 0.0).sum(0),
                member.sum(0),
                torch.where(counts, objective, 0.0).sum()[None],
                torch.where(steps > 0, report.grad_norm.detach().float().reshape(1), 0.0),
                steps,
            ]
        )
        self._steps += 1
        self._row_steps += 1

    def _read(self, done: int) -> dict:
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        losses, counts = sums[:QUARTILES], sums[QUARTILES : 2 * QUARTILES]
        objective, grad_norm, steps = sums[2 * QUARTILES :]
        row = {
            "loss": sum(losses) / sum(counts) if steps else None,
            "objective": objective / sum(counts) if steps else None,
            "loss_by_t_quartile": [loss / count if count else None for loss, count in zip(losses, counts)],
            "grad_norm": grad_norm / steps if steps else None,
            "learning_rate": self.config.learning_rate_at(done - 1),
            "images_per_second": round(
                self._row_steps * self.config.batch_size / (time.monotonic() - self._row_started), 1
            ),
        }
        if steps < self._steps:
            row["skipped_steps"] = self._steps - int(steps)
        self._sums, self._steps = torch.zeros_like(self._sums), 0
        self._start_row()
        return row

    def _start_row(self) -> None:
        self._row_started, self._row_steps = time.monotonic(), 0

    def _write(self, row: dict) -> None:
        self.rows.append(row)
        if not self.is_writer:
            return
        self._append(row)
        flat = {}
        for key, value in row.items():
            if key == "loss_by_t_quartile":
                flat |= {f"loss_t_quartile_{i}": v for i, v in enumerate(value, start=1) if v is not None}
            elif key not in ("step", "images") and value is not None:
                flat[key] = value
        self.accelerator.log(flat, step=row["step"])
        shown = {"loss": row.get("loss"), "held out": row.get("validation_loss_ema")}
        self._shown |= {k: f"{v:.4f}" for k, v in shown.items() if v is not None}
        self._bar.set_postfix(self._shown)

    def _append(self, row: dict) -> None:
        """Add the last row to the log's file, and all of them where the file lacks some, or holds a torn one."""
        was_behind, self._log_is_behind = self._log_is_behind, True
        with self._reported(f"Row {row['step']} of {LOG}"):
            if was_behind:
                atomic_file(self.folder / LOG, "".join(map(_line, self.rows)))
            else:
                with open(self.folder / LOG, "a") as file:
                    file.write(_line(row))
            self._log_is_behind = False

    def _write_pictures(self, done: int) -> None:
        """Samples of the averaged weights. Every process makes them, since sharded weights need all; one writes."""
        config, pipe = self.config, DDPMPipelineCustom(self.unet, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        with self.averages["ema"].in_place_of(self.unet):
            samples = sample_images(pipe, range(GRID), config.sample_steps, config.seed, self.images_at_a_time)
            strip = strip_of(pipe, config)
        if not self.is_writer:
            return
        for name, figure in (("", image_grid(samples, columns=5)), ("-denoising", strip)):
            png = figure_bytes(figure)
            with self._reported(f"A picture of step {done}"):
                (self.folder / PICTURES).mkdir(exist_ok=True)
                atomic_file(self.folder / PICTURES / f"step-{done:08d}{name}.png", png)
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[None]
            for tracker in self.accelerator.trackers:
                # TensorBoard has to be told where the channels are; Weights & Biases knows.
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name.strip("-") or "samples": pixels}, step=done, **options)

    def _cut_back(self) -> None:
        """Take away what this run will write again: all that lies after its first step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / LOG
        self.rows = [row for row in read_log(file) if row["step"] <= self.first_step]
        atomic_file(file, "".join(map(_line, self.rows)))
        for picture in (self.folder / PICTURES).glob("step-*.png"):
            if int(picture.stem.split("-")[1]) > self.first_step:
                picture.unlink()
        drop_snapshots_after(self.folder / SNAPSHOTS, self.first_step * self.config.batch_size)

    # ------------------------------------------------------------------ before the first step

    def summary(self, train_examples: int | None) -> str:
        """What the run is, as lines to print: parameters, memory, length, and what is written where."""
        config = self.config
        parameters = sum(p.numel() for p in self.unet.parameters())
        size = sum(p.numel() * p.element_size() for p in self.unet.parameters())
        lengths = 1 + len(self.averages["power_ema"].gammas) if "power_ema" in self.averages else 1
        memory = {"parameters": size, "gradients": size, "Adam": 2 * size, "averages": 4 * parameters * lengths}
        shape = "×".join(str(n) for n in (*config.resolution, config.channels))
        data = "a stream of images" if train_examples is None else f"{train_examples:,} images"
        validation = f"{len(self.validation_loss.images):,}" if self.validation_loss else "no"
        written = [f"checkpoints/ every {config.checkpoint_every_steps:,} steps"]
        written.append(f"{LOG} every {config.log_every_steps:,}")
        if config.sample_every_steps:
            written.append(f"{PICTURES}/ every {config.sample_every_steps:,}")
        if config.ema_snapshot_every_images:
            written.append(f"{SNAPSHOTS}/ every {config.ema_snapshot_every_images:,} images")
        if config.report_to != "none":
            written.append(f"{config.report_to} logs")
        processes = self.accelerator.num_processes
        precision = "" if config.mixed_precision == "no" else f", {config.mixed_precision}"
        return "\n".join(
            [
                f"Data        {data} of {shape} from {config.dataset}; {validation} validation images",
                f"Network     {parameters:,} parameters on {processes} process{'es' * (processes > 1)} ({self.accelerator.device.type}{precision})",
                f"Memory      {', '.join(f'{k} {_bytes(v)}' for k, v in memory.items())}; activations come on top",
                f"Length      {config.num_steps:,} steps of {config.batch_size:,} images"
                + (f", from step {self.first_step:,} on" if self.first_step else ""),
                f"Written to  {self.folder}/: {', '.join(written)}; the model at the end",
            ]
        )

    def _measure_speed(self, done: int) -> None:
        """Time the steps after the first one, and say when the run will be done."""
        taken = done - self.first_step
        if taken not in (1, 1 + TIMED_STEPS) and not (self.config.dry_run and done == self.last_step):
            return
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.monotonic()
        if taken > 1 and self.accelerator.is_main_process:
            rate = (taken - 1) * self.config.batch_size / (now - self._timing_started)
            left = (self.config.num_steps - done) * self.config.batch_size / rate
            module = getattr(torch, self.accelerator.device.type, None)
            peak = ""
            if hasattr(module, "max_memory_allocated"):
                peak = f", {_bytes(module.max_memory_allocated())} of memory at most"
            self._bar.write(
                f"Speed       {rate:,.1f} images/s over {taken - 1} steps{peak}; about {_duration(left)} to go"
            )
        self._timing_started = now


def _line(row: dict) -> str:
    return json.dumps({key: _jsonable(value) for key, value in row.items()}) + "\n"


def _jsonable(value):
    """JSON has no NaN and no infinity."""
    if isinstance(value, list):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(number: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(number, 1)) / 3), len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
