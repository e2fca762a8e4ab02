"""Signals that wait for the end of a step, and errors of processes that died."""

import os
import signal
import time

import pytest
import torch

from ddpm_hf.training.stopping import StopSignals, lost_process


def test_a_second_signal_ends_the_process_but_a_repeated_one_does_not():
    ready, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with StopSignals() as signals, signals.deferred(1):
                signals.REPEAT_SECONDS = 1.0
                os.write(writer, b".")
                time.sleep(30)
        finally:
            os._exit(7)
    os.read(ready, 1)
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    time.sleep(1.0)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM


def test_a_signal_before_training_ends_the_process_with_its_code():
    with StopSignals(), pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionResetError("reset"), "a DataLoader worker died (ConnectionResetError)."),
        (EOFError(), "a DataLoader worker died (EOFError)."),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "DataLoader worker (pid 7) is killed by signal: Killed. (A killed worker often means that memory ran out: see "
            "--num_workers.)",
        ),
        (
            torch.distributed.DistNetworkError("the store is gone\nC++ stack"),
            "another process of this run died (the store is gone).",
        ),
        (
            RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
            "another process of this run died ([/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer).",
        ),
        (RuntimeError("CUDA out of memory"), None),
        (RuntimeError(), None),
    ],
)
def test_errors_of_processes_that_died_become_a_sentence(error, sentence):
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        assert lost_process(error) == sentence
    finally:
        signal.signal(signal.SIGCHLD, handler)
