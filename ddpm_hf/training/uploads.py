"""Uploads to the Hub during training, in a background thread: they neither delay the training nor end it.

The EMA weights of a checkpoint are first staged as a pipeline in `unpublished/step-<step>` in the output directory. The
folder is deleted once it is on the Hub. What a killed run or a lost network connection left there is uploaded by the
resumed run, or by `ddpm-publish <output_dir>`.
"""

import logging
import os
import queue
import shlex
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.files import atomic_folder
from ddpm_hf.hub.commits import Published, ensure_repository
from ddpm_hf.hub.publish import publish, tag_commit
from ddpm_hf.transfer.client import abandon_requests
from ddpm_hf.transfer.downloads import DEFAULT_RETRIES, Retries
from ddpm_hf.transfer.errors import explain_error

logger = logging.getLogger("train")

UNPUBLISHED = "unpublished"
LAST_SECONDS = 5.0  # for requests that are given up to end
MESSAGE = "Step {} of a training with ddpm_hf"


def staged_steps(output_dir: Path) -> list[Path]:
    """The staged pipelines that are not uploaded yet, oldest first."""
    return sorted((output_dir / UNPUBLISHED).glob("step-*"))


def publish_step(step_folder: Path, repo_id: str, private: bool, retries: Retries = DEFAULT_RETRIES) -> Published:
    """Upload a staged pipeline as one commit with the tag `step-<step>`, then delete the folder."""
    step = int(step_folder.name.removeprefix("step-"))
    done = publish(step_folder, repo_id, private=private, commit_message=MESSAGE.format(step), retries=retries)
    tag_commit(repo_id, f"step-{step}", done.commit, retries=retries)
    shutil.rmtree(step_folder)
    return done


def stage_step(output_dir: Path, step: int, unet: UNet2DModelCustom, scheduler: DDPMSchedulerCustom, ema: Path) -> Path:
    """Write the pipeline of a step with the weights of the file `ema`, whole or not at all. Returns its folder.

    The weights are a hard link, which takes no space and outlives the checkpoint; a copy where links are not supported.
    """
    folder = output_dir / UNPUBLISHED / f"step-{step:08d}"
    with atomic_folder(folder) as staged:
        DDPMPipelineCustom(unet, scheduler).save_config(staged)
        unet.save_config(staged / "unet")
        scheduler.save_config(staged / "scheduler")
        weights = staged / "unet" / "diffusion_pytorch_model.safetensors"
        try:
            os.link(ema, weights)
        except OSError:
            shutil.copyfile(ema, weights)
        if (output_dir / "config.yaml").is_file():
            shutil.copyfile(output_dir / "config.yaml", staged / "config.yaml")
    return folder


@dataclass(eq=False)
class Uploader:
    """Uploads the EMA weights of checkpoints, and the finished model, to a Hub repository.

    Call `create_repository` before training, `start` once the output directory is locked, `upload_checkpoint` after each
    checkpoint, and `finish` at the end. Without a `repo_id`, all of them do nothing.

    Args:
        output_dir: the folder of the run, whose README.md, figures and weights `finish` uploads.
        repo_id: "user/name"; None to upload nothing.
        private: create a private repository.
        every_steps: upload the checkpoints of steps divisible by this; 0: of none.
        keep: staged pipelines to keep on disk while the Hub cannot be reached.
        wait_seconds: longest wait of `finish`.
    """

    output_dir: Path
    repo_id: str | None
    private: bool = False
    every_steps: int = 1
    keep: int = 2
    wait_seconds: float = 3600.0

    def __post_init__(self):
        self._steps: queue.Queue[Path | None] = queue.Queue()
        self._is_late = False
        # A daemon, so that a training that ends with an error does not wait for it. Staged steps stay on disk.
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def create_repository(self) -> None:
        """Create the repository if it does not exist. Raises ValueError if it cannot be written to."""
        if self.repo_id is None:
            return
        disable_progress_bars()  # they would be drawn over the training's
        try:
            self.repo_id = ensure_repository(self.repo_id, self.private)
        except OSError as error:
            raise ValueError(str(error)) from error

    def start(self, overwrite: bool = False) -> None:
        """Start the thread with what an earlier part of the run has staged, which `overwrite` deletes instead."""
        if self.repo_id is None:
            return
        if overwrite:
            shutil.rmtree(self.output_dir / UNPUBLISHED, ignore_errors=True)
        for step_folder in staged_steps(self.output_dir):
            self._steps.put(step_folder)
        self._thread.start()

    def upload_checkpoint(
        self, step: int, unet: UNet2DModelCustom, scheduler: DDPMSchedulerCustom, folder: Path
    ) -> None:
        """Upload the EMA weights of the checkpoint in `folder`, if `step` is divisible by `every_steps`. Does not wait."""
        if self.repo_id is None or not self.every_steps or step % self.every_steps:
            return
        try:
            self._steps.put(stage_step(self.output_dir, step, unet, scheduler, folder / "ema.safetensors"))
        except OSError as error:
            logger.warning("Step %d could not be prepared for upload (%s); the training continues.", step, error)

    def finish(self) -> None:
        """Upload the remaining steps and, last, the finished model. After `wait_seconds`, the uploads are given up; what
        is not on the Hub then is kept, and logged with the command that uploads it."""
        if self.repo_id is None:
            return
        self._steps.put(None)
        self._thread.join(self.wait_seconds)
        if self._thread.is_alive():
            self._is_late = True
            with abandon_requests():
                self._thread.join(LAST_SECONDS)
            left = [folder.name for folder in staged_steps(self.output_dir)]
            names = ", ".join([*left, "the model"])
            self._log_kept(names, f"uploads to {self.repo_id} took longer than {self.wait_seconds:g} s.")

    def _work(self) -> None:
        while (step_folder := self._steps.get()) is not None:
            self._try(publish_step, step_folder, step_folder.name)
            for old in staged_steps(self.output_dir)[: -self.keep]:
                if old <= step_folder:  # failed: failures must not fill the disk
                    shutil.rmtree(old, ignore_errors=True)
        for step_folder in staged_steps(self.output_dir):  # first, so that main ends with the finished model
            if not self._try(publish_step, step_folder, step_folder.name):
                break
        self._try(publish, self.output_dir, "the model")

    def _try(self, upload: Callable[..., Published], folder: Path, name: str) -> bool:
        """Whether an upload succeeded. Errors are logged: none of them may end the training."""
        if self._is_late:
            return False
        try:
            done = upload(folder, self.repo_id, private=self.private)
        except Exception as error:
            if not self._is_late:  # `finish` logs what is kept then
                self._log_kept(name, str(explain_error(error, self.repo_id)))
            return False
        logger.warning("Uploaded %s: %s", name, done.url)
        return True

    def _log_kept(self, names: str, reason: str) -> None:
        command = f"ddpm-publish {shlex.quote(str(self.output_dir))} --repo_id {self.repo_id}"
        logger.warning(
            "Could not upload %s: %s\nIt is kept in %s; upload it with: %s", names, reason, self.output_dir, command
        )
