"""The tracker of a run (TensorBoard, Weights & Biases): an error in it is logged once, and the run continues without it."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from accelerate import Accelerator

logger = logging.getLogger("train")


class Trackers:
    """The only place where trackers are called.

    Args:
        accelerator: with `log_with`, on the main process of which trackers run.
        settings: the options of the run.
        first_step: step at which this part of the run begins. TensorBoard leaves out what an earlier part logged after it.
    """

    def __init__(self, accelerator: Accelerator, settings: dict[str, str], first_step: int):
        self._accelerator, self._hook, self._thread_error = accelerator, threading.excepthook, None
        # TensorBoard writes in a thread, whose traceback would be printed before the next call raises the error.
        threading.excepthook = self._thread_failed
        options = {"tensorboard": {"purge_step": first_step + 1}} if first_step else {}
        with self._guarded():
            accelerator.init_trackers("logs", config=settings, init_kwargs=options)

    def log(self, values: dict, step: int) -> None:
        """Log numbers by name."""
        with self._guarded():
            for tracker in self._accelerator.trackers:
                tracker.log(values, step=step)

    def log_picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Log a picture (1, H, W, C), uint8."""
        with self._guarded():
            for tracker in self._accelerator.trackers:
                # TensorBoard must be told the order of the dimensions; Weights & Biases assumes it.
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=step, **options)

    def close(self) -> None:
        """Write what is not written yet. Later calls do nothing."""
        with self._guarded():
            for tracker in self._accelerator.trackers:
                tracker.finish()
                if self._thread_error is not None:  # after the last call
                    raise self._thread_error
        self._accelerator.trackers = []
        threading.excepthook = self._hook

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        trackers, self._accelerator.trackers = self._accelerator.trackers, []
        names = ", ".join(map(str, self._accelerator.log_with))
        logger.warning("%s failed (%s: %s); training continues without it.", names, type(error).__name__, error)
        for tracker in trackers:
            try:
                tracker.finish()
            except Exception as also:
                logger.debug("%s cannot be closed either: %s", tracker.name, also)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__module__.startswith("tensorboard"):
            self._thread_error = failure.exc_value
        else:
            self._hook(failure)
