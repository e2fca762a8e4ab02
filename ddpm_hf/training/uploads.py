"""Pushing to the Hub while a model is trained: in a thread beside the training, which it can neither slow down nor fail.

A step that is to be pushed is first written to `unpublished/step-<step>` in the run's folder, as a pipeline with the
averaged weights of that step, and deleted once it is on the Hub. What a killed run or a dead network left there is pushed
by the next run, or by `python training/publish.py <folder>`.
"""

import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.hub.publish import Published, check_destination, publish, tag_commit
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.transfer import Retries, explain_error

logger = logging.getLogger("train")

UNPUBLISHED = "unpublished"
MESSAGE = "Step {} of a training with ddpm_hf"


def waiting(folder: Path) -> list[Path]:
    """The pipelines of single steps that are still to be pushed, oldest first."""
    return sorted((folder / UNPUBLISHED).glob("step-*"))


def publish_waiting(folder: Path, repo_id: str, private: bool, retries: Retries, say: Callable[[str], None]) -> None:
    for step_folder in waiting(folder):
        done = _publish_step(step_folder, repo_id, private, retries)
        say(f"Published: {step_folder.name}, {done.url}")


def _publish_step(step_folder: Path, repo_id: str, private: bool, retries: Retries) -> Published:
    finish_staging(step_folder)
    step = int(step_folder.name.removeprefix("step-"))
    done = publish(step_folder, repo_id, private=private, commit_message=MESSAGE.format(step), retries=retries)
    tag_commit(repo_id, f"step-{step}", done.commit, retries=retries)
    shutil.rmtree(step_folder)
    return done


def stage(output_dir: Path, step: int, unet: UNet2DModelCustom, scheduler: DDPMSchedulerCustom, ema_file: Path) -> Path:
    """Write the pipeline of a step, whole or not at all: the parts' configurations and a second name (a copy, where the
    file system knows no second names) of the file that holds the averaged weights."""
    folder = output_dir / UNPUBLISHED / f"step-{step:08d}"
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "unet").mkdir(parents=True)
    DDPMPipelineCustom(unet, scheduler).save_config(beside)
    unet.save_config(beside / "unet")
    scheduler.save_config(beside / "scheduler")
    try:
        os.link(ema_file, beside / "ema.safetensors")
    except OSError:
        shutil.copyfile(ema_file, beside / "ema.safetensors")
    if (output_dir / "config.yaml").is_file():
        shutil.copyfile(output_dir / "config.yaml", beside / "config.yaml")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return folder


def finish_staging(step_folder: Path) -> None:
    """The averaged weights as diffusers names and marks them; done in the thread, as it reads and writes them all."""
    weights = step_folder / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        unfinished = weights.with_name(f".{weights.name}")
        save_file(load_file(step_folder / "ema.safetensors"), unfinished, metadata={"format": "pt"})
        os.replace(unfinished, weights)
    (step_folder / "ema.safetensors").unlink(missing_ok=True)


class Pusher:
    """What `train.py` calls: `start` once the folder is its own, `checkpoint` after each checkpoint, `finish` at the end.
    Does nothing in a run without `push_to_hub`, and in all processes but the main one."""

    def __init__(self, config: TrainingConfig, is_main_process: bool = True, retries: Retries = Retries()):  # noqa: B008
        """Checks that the repository can be written to, and makes it. Raises ValueError if it cannot."""
        self.config, self.retries = config, retries
        self.is_on = config.push_to_hub and is_main_process and not config.dry_run
        if self.is_on:
            disable_progress_bars()  # they would be drawn over the training's
            self.folder = Path(config.output_dir)
            try:
                self.repo_id = check_destination(config.hub_model_id, config.hub_private, retries=retries)
            except (OSError, HTTPError, RuntimeError) as error:
                raise ValueError(explain_error(error, config.hub_model_id)) from error

    def start(self) -> None:
        """Begin with what an earlier part of this run left. Call it once the run's folder is locked."""
        if not self.is_on:
            return
        if self.config.overwrite:
            shutil.rmtree(self.folder / UNPUBLISHED, ignore_errors=True)
        self._steps: queue.Queue[Path | None] = queue.Queue()
        # A daemon: a training that ends with an error is not held up. What it was at is still on the disk.
        self._thread = threading.Thread(target=self._work, name="push", daemon=True)
        self._thread.start()
        for step_folder in waiting(self.folder):
            self._steps.put(step_folder)

    def checkpoint(self, step: int, unet: UNet2DModelCustom, scheduler: DDPMSchedulerCustom, checkpoint: Path) -> None:
        """Push the averaged weights of a checkpoint, if it is one of those that are pushed."""
        config = self.config
        number, rest = divmod(step, config.checkpoint_every_steps)
        if not self.is_on or rest or number % config.push_every_checkpoints or step == config.num_steps:
            return
        try:
            self._steps.put(stage(self.folder, step, unet, scheduler, checkpoint / "ema.safetensors"))
        except OSError as error:
            logger.warning("Step %d could not be prepared for the Hub (%s); the training goes on.", step, error)

    def finish(self) -> None:
        """Wait for what is under way, then publish the finished model."""
        if not self.is_on:
            return
        self._steps.put(None)
        self._thread.join()
        for step_folder in waiting(self.folder):  # before the end, so that the end is what main holds
            if not self._try(lambda folder=step_folder: self._push_step(folder), step_folder.name):
                break
        self._try(lambda: publish(self.folder, self.repo_id, private=self.config.hub_private, retries=self.retries))

    def _work(self) -> None:
        while (step_folder := self._steps.get()) is not None:
            self._try(lambda folder=step_folder: self._push_step(folder), step_folder.name)
            # Steps that cannot be pushed must not fill the disk: as many stay as checkpoints do.
            if self._steps.empty():
                for old in waiting(self.folder)[: -self.config.keep_checkpoints]:
                    shutil.rmtree(old, ignore_errors=True)

    def _push_step(self, step_folder: Path) -> Published:
        return _publish_step(step_folder, self.repo_id, self.config.hub_private, self.retries)

    def _try(self, push: Callable[[], Published], name: str = "the model") -> bool:
        try:
            done = push()
        except Exception as error:  # whatever it is, the training is worth more
            logger.warning(
                "Could not push %s: %s\nIt is kept in %s; push it with: python training/publish.py %s --repo_id %s",
                name, explain_error(error, self.repo_id), self.folder, self.folder, self.repo_id,
            )  # fmt: skip
            return False
        logger.warning("Pushed %s: %s", name, done.url)
        return True
