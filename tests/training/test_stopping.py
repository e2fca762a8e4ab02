"""Signals that wait for the end of a step, and errors of processes that died."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ddpm_hf.training.stopping import StopSignals, lost_process, output_may_fail
from tests.training.helpers import ROOT, TINY, steps_saved


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


@pytest.mark.parametrize("is_ignored", [True, False])
def test_a_hangup_is_handled_unless_it_is_ignored(is_ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with StopSignals() as signals, signals.deferred(1):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert signals.received == (0 if is_ignored else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_cannot_be_written_is_lost_and_nothing_is_raised():
    """/dev/full is a full disk; the reader of the pipe has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    program = """
import sys
from ddpm_hf.training.stopping import output_may_fail
with output_may_fail():
    for stream in (sys.stdout, sys.stderr):
        print("x" * 100_000, file=stream, flush=True)
        print("the rest", file=stream)
sys.exit(7)
"""
    with open("/dev/full", "w") as full:
        for out, error in ((full, writer), (writer, full)):
            assert subprocess.run([sys.executable, "-c", program], stdout=out, stderr=error, cwd=ROOT).returncode == 7
    os.close(writer)


def test_output_that_can_be_written_is_written_as_before(capfd):
    with output_may_fail():
        print("out")
        print("error", file=sys.stderr)
    assert tuple(capfd.readouterr()) == ("out\n", "error\n")


def test_a_run_whose_output_is_on_a_full_disk_trains_to_its_end(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "training" / "train.py"), *TINY, "--output_dir", str(tmp_path / "run")]
        assert subprocess.run(command, stdout=full, stderr=full, timeout=200).returncode == 0
    assert steps_saved(tmp_path / "run") == [4, 8, 12] and (tmp_path / "run" / "README.md").is_file()


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
