"""What the processes of a run have in common: threads, and an error that one of them says."""

import os
import sys
from typing import NoReturn

import torch


def fail(script: str, message: object) -> NoReturn:
    """End the process with code 1 and a sentence, which the first process of a run says."""
    sys.exit(f"{script}: error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def use_cpu_threads(threads: int | None = None) -> None:
    """Compute with `threads` threads; None: the CPU's cores shared among this machine's processes. (accelerate's
    launcher sets one thread unless told otherwise.)"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
