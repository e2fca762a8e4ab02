"""Set-up that all scripts share: CPU threads, signals from the launcher, and errors that only one process prints.

torch is imported where it is needed, so that a script can call `prepare_process` and still answer `--help` quickly.
"""

import atexit
import ctypes
import os
import signal
import sys
from datetime import timedelta
from typing import NoReturn

# For collective operations, in which processes wait for one that checks or downloads the data. For training it is the
# option `process_group_timeout`.
TIMEOUT = timedelta(hours=6)
RANKS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, accelerate and MPI
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def prepare_process() -> None:
    """Prepare a process that `accelerate launch` or `torchrun` started; call it first in a script's `main`.

    The processes of a machine share its CPU cores, where the launchers set one thread each. Their group ends before Python
    does, whose exit would otherwise destroy threads of gloo that still run, and abort the process (torch 2.13). On Linux
    the process gets a SIGTERM when its launcher ends: `accelerate launch` does not forward signals. Prints one line to
    stderr if several processes were asked for and `accelerate launch` started one, as it does on machines without a GPU.
    """
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return
    os.environ["OMP_NUM_THREADS"] = str(_share_of_cores())  # read when torch is imported
    if "torch" in sys.modules:
        use_cpu_threads()
    atexit.unregister(_end_process_group)  # a script may be called more than once
    atexit.register(_end_process_group)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # accelerate 1.15 sets MASTER_PORT if it was asked for more than one process or machine.
    if "MASTER_PORT" in os.environ and not any(name in os.environ for name in RANKS):
        use = f"For N processes without a GPU use `torchrun --nproc_per_node N {sys.argv[0]} ...`"
        print(f"Only one process was started. {use}, not `accelerate launch`.", file=sys.stderr)


def _end_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def settle_with_launcher(mixed_precision: str | None) -> str:
    """The precision of a run: the configured one, or else that of `accelerate launch`, or else "no".

    What the launcher says and the run does not do is printed to stderr, by the first process.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    unused = {}
    if mixed_precision is not None and launched not in ("no", mixed_precision):  # "no" is what it says by default
        unused[f"mixed_precision = {launched!r}"] = f"the run is configured with {mixed_precision!r}"
    if accumulation not in ("1", "auto"):
        unused[f"gradient_accumulation_steps = {accumulation}"] = (
            "batch_size is that of a whole step: see micro_batch_size"
        )
    for value, reason in unused.items() if os.environ.get("RANK", "0") == "0" else ():
        print(f"The launcher's {value} is not used: {reason}.", file=sys.stderr)
    return launched if mixed_precision is None else mixed_precision


def fail(script: str, message: object) -> NoReturn:
    """End the process with exit code 1; the first process of a run prints the message."""
    sys.exit(f"{script}: error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def use_cpu_threads(threads: int | None = None) -> None:
    """Compute with `threads` CPU threads; None: the cores divided among this machine's processes."""
    import torch

    torch.set_num_threads(threads or _share_of_cores())


def _share_of_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
