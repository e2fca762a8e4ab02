"""Errors of the machine (memory, disks, network, files that vanish) as one sentence: what failed, what is safe, what to do."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError

from ddpm_hf.data.decoding import UnreadableImage
from ddpm_hf.data.streaming import StreamError
from ddpm_hf.training.checkpoints import checkpoint_step, list_checkpoints
from ddpm_hf.training.processes import fail
from ddpm_hf.training.stopping import lost_process

# As torch, CUDA, the operating system and the C++ library say it, in errors of no type of their own.
OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|cannot allocate memory|bad_alloc|shared memory",
    re.IGNORECASE,
)
ADVICE = {
    "memory": "Use a smaller --micro_batch_size, --memory_limit_bytes or --num_workers, or --gradient_checkpointing.",
    "network": "Connect to the network, or use data on this machine.",
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some space.",
    errno.EACCES: "Check the permissions.",
    errno.EPERM: "Check the permissions.",
    errno.EROFS: "Use another --output_dir, or mount the disk for writing.",
    errno.EMFILE: "Use fewer --num_workers, or raise `ulimit -n`.",
    errno.EIO: "Check the disk.",
}


@contextmanager
def in_one_sentence(output_dir: str | Path | None = None) -> Iterator[None]:
    """End the process with exit code 1 and one sentence after an error of the machine, or of the input. Others are raised.

    Args:
        output_dir: of the run that trains here, whose last checkpoint the sentence names; None while nothing is trained.
    """
    try:
        yield
    except Exception as error:
        try:
            _end_with_sentence(error, output_dir)
        except RuntimeError as later:  # of torch's handler of signals: the worker whose connection broke has ended now
            _end_with_sentence(later, output_dir)
        raise


def _end_with_sentence(error: Exception, output_dir: str | Path | None) -> None:
    is_training = output_dir is not None
    sentence = lost_process(error) if is_training else None
    if sentence is not None:
        fail("train.py", f"{sentence} {what_is_safe(output_dir)}")
    sentence = describe(error)
    if sentence is None and isinstance(error, ValueError) and not is_training:
        fail("train.py", error)
    if sentence is not None:  # on every process: the others may not have this error
        sys.exit(f"train.py: error: {sentence}" + (f" {what_is_safe(output_dir)}" if is_training else ""))


def what_is_safe(output_dir: str | Path) -> str:
    """Which checkpoint a run that failed can resume from."""
    saved = list_checkpoints(Path(output_dir) / "checkpoints")
    if not saved:
        return "No checkpoint was saved before."
    return f"The checkpoint of step {checkpoint_step(saved[-1])} is safe; the same command resumes from it."


def describe(error: BaseException) -> str | None:
    """What failed and what to do, in one or two sentences; None for an error in the program or in an option."""
    if isinstance(error, DatasetsError) and error.__cause__ is not None:  # says only that an error occurred
        return describe(error.__cause__) or _sentence(error.__cause__)
    words = _first_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, OSError)) and OUT_OF_MEMORY.search(words)):
        return f"memory ran out{f' ({words})' if words else ''}. {ADVICE['memory']}"
    if isinstance(error, UnreadableImage):
        return f"an image cannot be read any more: {words}. Put its file back as it was."
    if isinstance(error, StreamError):
        return str(error)
    if isinstance(error, (ConnectionError, HTTPError, OfflineModeIsEnabled)):
        is_plain = error.__class__ is ConnectionError and error.errno is None  # one of this package's own sentences
        return words + "." if is_plain else f"{_sentence(error)} {ADVICE['network']}"
    if isinstance(error, (OSError, SafetensorError)):
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        return f"{_sentence(error)} {ADVICE.get(number, '')}".strip()
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300].rstrip(". ")


def _sentence(error: BaseException) -> str:
    name, words = type(error).__name__, _first_line(error)
    return f"{name}: {words}." if words else f"{name}."
