"""Several processes on a machine without a GPU.

`accelerate launch --num_processes N` starts the N processes where there are GPUs. Where there are none it starts one
and says nothing (accelerate 1.15). `run` notices and starts all N here, which then talk over gloo.

Signals reach the processes that compute: this one hands SIGTERM and SIGINT on to those it starts, and is told with a
SIGTERM (on Linux) when the launcher that started it ends, whatever ended that. `accelerate launch` hands nothing on.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from ddpm_hf.training.processes import use_cpu_threads

ALREADY_DISTRIBUTED = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
GRACE_SECONDS = 30.0  # from the end of one process to that of the others, if they do not end by themselves


def run(main: Callable[[], None]) -> None:
    """Call `main` in as many processes as `accelerate launch` was asked for."""
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)
    options = launcher_options()
    if options is None or options.num_processes <= 1:
        use_cpu_threads()
        main()
        return
    machines, rank = options.num_machines or 1, options.machine_rank or 0
    local, rest = divmod(options.num_processes, machines)
    if rest:
        sys.exit(f"error: --num_processes {options.num_processes} does not divide among {machines} machines.")
    if machines == 1 and options.main_process_port is None:
        # The launcher's port would be the same for every run on this machine.
        with socket.create_server(("127.0.0.1", 0)) as server:
            os.environ["MASTER_PORT"] = str(server.getsockname()[1])
    # Children end with this process, and this one with an error if one of them fails.
    arguments = (main, local, local * machines, rank)
    context = torch.multiprocessing.start_processes(_worker, arguments, local, join=False, start_method="spawn")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: _send(number, context.pids()))
    try:
        while not context.join(grace_period=GRACE_SECONDS):
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code > 0:
            sys.exit(error.exit_code)
        print(f"error: process {error.error_index} of this run was ended by {error.signal_name}.", file=sys.stderr)
        sys.exit(128 - error.exit_code)


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it may have ended
            os.kill(pid, number)


def _worker(local_rank: int, main: Callable[[], None], local: int, world: int, machine: int) -> None:
    os.environ |= {
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local),
        "RANK": str(machine * local + local_rank),
        "WORLD_SIZE": str(world),
    }
    use_cpu_threads()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # torch's launcher takes it for success


def launcher_options():
    """What `accelerate launch`, the parent process, was called with, if it left starting processes to this one."""
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if not launched or torch.accelerator.is_available() or any(name in os.environ for name in ALREADY_DISTRIBUTED):
        return None
    command = psutil.Process().parent().cmdline()
    for i, word in enumerate(command):
        if Path(word).name in ("accelerate-launch", "accelerate.commands.launch"):
            break
        if word == "launch" and Path(command[i - 1]).name == "accelerate":
            break
    else:
        sys.exit(
            "error: accelerate started one process where several were asked for (it does so on machines without a GPU). "
            f"Use `torchrun --nproc_per_node N {sys.argv[0]} ...` here."
        )
    options = launch_command_parser().parse_args(command[i + 1 :])
    config_file = options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    if options.num_processes is None and config_file is not None:
        options.num_processes = load_config_from_file(config_file).num_processes
    options.num_processes = options.num_processes or 1
    return options
