"""Stopping early without losing work: signals that wait for the end of a step, and processes that died.

Exit codes of `train.py`: 0 finished; 1 an error, printed as a sentence; EXIT_NONFINITE (3) too many non-finite steps in a
row; EXIT_NOT_SAVED (4) the last checkpoint could not be written; 128 + n stopped by signal n
after saving (143 SIGTERM, 130 SIGINT, 129 SIGHUP). `accelerate launch` and `torchrun` print the code and exit with 1.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TextIO

from ddpm_hf.training.processes import TIMEOUT

EXIT_NONFINITE, EXIT_NOT_SAVED = 3, 4
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP)))


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP stop the run after the current step inside `deferred()`; elsewhere they end the process.

    SIGHUP, which a closed terminal sends, stays ignored if it is, as under `nohup`.

    A second signal ends the process at once. It must come at least REPEAT_SECONDS after the first, because launchers
    forward a Ctrl-C that every process has received already.
    """

    REPEAT_SECONDS = 2.0

    def __init__(self):
        self.received, self._received_at, self._deferred = 0, 0.0, False
        self._group, self._pending = None, None

    def __enter__(self) -> "StopSignals":
        handled = [n for n in SIGNALS if n != HANGUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if not self._deferred:
            raise SystemExit(128 + number)
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                message = f"\n{name}: stopping after this step and saving. A second signal ends it at once.\n"
                with suppress(OSError):  # of a closed terminal
                    os.write(2, message.encode())  # not through sys.stderr, which the signal may have interrupted
        elif time.monotonic() - self._received_at > self.REPEAT_SECONDS:
            os._exit(128 + number)

    @contextmanager
    def deferred(self, num_processes: int, timeout: timedelta = TIMEOUT) -> Iterator[None]:
        """Signals wait for the end of a step. Check `received` afterwards: some arrive too late for `should_stop`.

        `timeout`: how long a process waits for the signals of the others.
        """
        if num_processes > 1:
            from torch import distributed

            self._group = distributed.new_group(backend="gloo", timeout=timeout)
        self._deferred = True
        try:
            yield
            if self._pending is not None:
                self._pending[0].wait()
        finally:
            self._deferred = False

    def should_stop(self) -> int:
        """The signal to stop on, the same on every process; 0: continue. Every process calls this after every step.

        The processes exchange their signals on the CPU, in parallel with the computation, and read the result one step
        later, so that neither the device nor a step waits for it.
        """
        if self._group is None:
            return self.received
        import torch

        answer = 0
        if self._pending is not None:
            work, signals = self._pending
            work.wait()
            answer = int(signals)
        signals = torch.tensor(self.received)
        work = torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._pending = (work, signals)
        return answer


# torch 2.13 raises bare RuntimeErrors for a DataLoader worker that died and for a gloo connection that was closed. The
# second contains the path of the source file.
WORKER_DIED, GLOO_CONNECTION = "DataLoader worker", "gloo/transport"


def lost_process(error: Exception) -> str | None:
    """A sentence, if the error comes from a DataLoader worker or another process of the run that died; else None."""
    from torch.distributed import DistError

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again while this error is reported
    line = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    if isinstance(error, (ConnectionError, EOFError)):
        return f"a DataLoader worker died ({type(error).__name__})."
    if WORKER_DIED in line:
        return f"{line}. (A killed worker often means that memory ran out: see --num_workers.)"
    if isinstance(error, DistError) or GLOO_CONNECTION in line:
        return f"another process of this run died ({line})."
    return None


class _Output:
    """A text stream whose failed writes are lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def output_may_fail() -> Iterator[None]:
    """Standard output and error may be closed or full without ending the run: a closed terminal, `| tee` after Ctrl-C, a
    file on a full disk."""
    streams = sys.stdout, sys.stderr
    with redirect_stdout(_Output(sys.stdout)), redirect_stderr(_Output(sys.stderr)):
        try:
            yield
        finally:
            for stream in streams:
                try:
                    stream.flush()
                except OSError:  # Python would fail to write the rest when it exits, and return 120
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(message: str) -> None:
    """Print an error of train.py, on the first process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: error: {message}", file=sys.stderr, flush=True)
