"""Starts runs of train.py without the seconds that importing its libraries takes: this process has them all and forks.

Each line of standard input is a run, as JSON: {"arguments": [...], "processes": n, "output": file} and the keys that
`child` reads. Every process of the run is a fork that calls `train.main` and can be killed. The answer is the list of their
process ids. A line {"wait": pid, "seconds": s} is answered with the exit status, -n if signal n ended the process; one
that still runs after s seconds is killed.
"""

import ctypes
import importlib
import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from ddpm_hf.scripts import train

# train.py imports these when it runs: here they are imported once, before the forks.
from ddpm_hf.training import artifacts, nonfinite, run_data, run_logger, step, uploads, validation  # noqa: F401
from ddpm_hf.training.checkpoints import list_checkpoints, load_checkpoint


def inject(at_step: int, rank: int, row: int, value: float) -> None:
    """Make the network's output for one example of one step non-finite, as an overflow in it would."""
    training_step = step.training_step

    def poisoned_step(accelerator, model, optimizer, diffusion, config, this_step, *rest):
        def poison(_module, _inputs, output):
            mask = torch.zeros_like(output[0])
            mask[row] = value
            return (output[0] + mask,)

        hook = None
        if this_step == at_step and accelerator.process_index == rank:
            hook = model.register_forward_hook(poison)
        try:
            return training_step(accelerator, model, optimizer, diffusion, config, this_step, *rest)
        finally:
            if hook is not None:
                hook.remove()

    step.training_step = poisoned_step


def fail(module: str, function: str, error: str, at_call: int = 1) -> None:
    """Make one call of a function of a module, or of a class in it, raise an error: Python source such as "MemoryError()"."""
    path, _, class_name = module.partition(":")
    owner = importlib.import_module(path)
    owner = getattr(owner, class_name) if class_name else owner
    original, calls = getattr(owner, function), itertools.count(1)

    def failing(*args, **kwargs):
        if next(calls) == at_call:
            raise eval(error)
        return original(*args, **kwargs)

    setattr(owner, function, failing)


def allow_fsdp_on_the_cpu() -> None:
    """accelerate 1.15 applies FSDP on accelerators only; it works over gloo as well."""
    init = accelerate_state.AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        first = not self.initialized
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate_state.AcceleratorState.__init__ = init_with_fsdp


def small_disk(folder: str, num_bytes: int, num_inodes: int = 0) -> None:
    """Put a file system of that size, and number of files (0: any), in place of a folder, for this process alone. Raises OSError if that is forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    NEW_MOUNTS, NEW_USER, PRIVATE, RECURSIVE = 0x20000, 0x10000000, 1 << 18, 1 << 14
    os.makedirs(folder, exist_ok=True)
    for failed in (
        libc.unshare(NEW_MOUNTS | (NEW_USER if os.getuid() else 0)),
        libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None),
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={num_bytes},nr_inodes={num_inodes}".encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "no file system can be mounted here")


def child(run: dict, rank: int, port: int) -> None:
    file = os.open(run["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    code = 0
    try:
        if run["processes"] > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(run["processes"]),
                "LOCAL_WORLD_SIZE": str(run["processes"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        os.environ |= run.get("environment", {})
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            allow_fsdp_on_the_cpu()
        if not run.get("finish"):
            artifacts.write_artifacts = lambda *_: None
        if "nonfinite" in run:
            inject(**run["nonfinite"])
        for failure in run.get("failures", ()):
            fail(**failure)
        if run.get("nohup"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if "largest_file" in run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (run["largest_file"], run["largest_file"]))
        if "small_disk" in run:
            small_disk(**run["small_disk"])
        train.main(run["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    if "small_disk" in run:
        for folder in list_checkpoints(Path(run["small_disk"]["folder"]) / "checkpoints"):
            load_checkpoint(folder)
            print("whole:", folder.name)
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            print(f"process {pid} did not end within {seconds:.0f} s", file=sys.stderr, flush=True)
            os.kill(pid, signal.SIGKILL)
            deadline += 60
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def main() -> None:
    torch.set_num_threads(1)
    np.random.seed(0)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        else:
            port, answer = free_port(), []
            for rank in range(request["processes"]):
                pid = os.fork()
                if pid == 0:
                    child(request, rank, port)
                answer.append(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
