"""The trackers of a run, those that Accelerate knows: an error in one is logged once, and the run continues without it."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from accelerate import Accelerator

logger = logging.getLogger("train")


ONE_PICTURE = ("aim", "clearml")  # take a picture (H, W, C); the others take several (N, H, W, C)


class Trackers:
    """The only place where trackers are called.

    Args:
        accelerator: with `log_with`, on the main process of which trackers run.
        settings: the options of the run.
        first_step: step at which this part of the run begins. TensorBoard leaves out what an earlier part logged after it.
        project: name of the run. TensorBoard writes to logs/ in the run's folder, whatever the name.
    """

    def __init__(self, accelerator: Accelerator, settings: dict[str, str], first_step: int, project: str = "logs"):
        self._accelerator, self._hook, self._thread_error = accelerator, threading.excepthook, None
        # TensorBoard writes in a thread, whose traceback would be printed before the next call raises the error.
        threading.excepthook = self._thread_failed
        options, names = {"tensorboard": {"purge_step": first_step + 1}} if first_step else {}, accelerator.log_with
        started, accelerator.trackers = [], []
        for name in names:  # one at a time: Accelerate starts none if one of them fails
            accelerator.log_with = [name]
            with self._guarded(str(name)):
                accelerator.init_trackers("logs" if str(name) == "tensorboard" else project, settings, options)
            started, accelerator.trackers = started + accelerator.trackers, []
        accelerator.log_with, accelerator.trackers = names, started

    def log(self, values: dict, step: int) -> None:
        """Log numbers by name."""
        for tracker in self._accelerator.trackers:
            with self._guarded(tracker.name):
                tracker.log(values, step=step)

    def log_picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Log a picture (1, H, W, C), uint8, with the trackers that take pictures."""
        for tracker in self._accelerator.trackers:
            if not hasattr(tracker, "log_images"):
                continue
            # TensorBoard must be told the order of the dimensions; the others assume it.
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with self._guarded(tracker.name):
                tracker.log_images({name: pixels[0] if tracker.name in ONE_PICTURE else pixels}, step=step, **options)

    def close(self) -> None:
        """Write what is not written yet. Later calls do nothing."""
        for tracker in self._accelerator.trackers:
            with self._guarded(tracker.name):
                tracker.finish()
                if self._thread_error is not None and tracker.name == "tensorboard":  # after the last call
                    raise self._thread_error
        self._accelerator.trackers = []
        threading.excepthook = self._hook

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: BaseException) -> None:
        failed = [tracker for tracker in self._accelerator.trackers if tracker.name == name]
        self._accelerator.trackers = [tracker for tracker in self._accelerator.trackers if tracker.name != name]
        logger.warning("%s failed (%s: %s); training continues without it.", name, type(error).__name__, error)
        for tracker in failed:
            try:
                tracker.finish()
            except Exception as also:
                logger.debug("%s cannot be closed either: %s", name, also)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__module__.startswith("tensorboard"):
            self._thread_error = failure.exc_value
        else:
            self._hook(failure)
