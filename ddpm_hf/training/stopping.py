"""Ending early without losing work: signals that wait for the step, and what a lost process or worker looks like.

Exit codes of `train.py`: 0 finished; 1 an error, said in a sentence; 2 options that are none; EXIT_NONFINITE (3) too many
non-finite steps in a row; EXIT_NOT_SAVED (4) the last checkpoint could not be written; 128 + n ended by signal n
after saving (143 SIGTERM, 130 SIGINT). `accelerate launch` and `torchrun` turn all but 0 into 1 and print the code.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

EXIT_NONFINITE, EXIT_NOT_SAVED = 3, 4
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGINT: within `deferred()` they ask for an end after the step, elsewhere they end the process.

    A second one ends the process at once. Launchers hand on the signal that Ctrl-C has sent to everyone already;
    hence the second must come REPEAT_SECONDS after the first to be meant.
    """

    REPEAT_SECONDS = 2.0

    def __init__(self):
        self.received, self._received_at, self._deferred = 0, 0.0, False
        self._group, self._pending = None, None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
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
                # Not through sys.stderr, which this may have interrupted.
                os.write(2, f"\n{name}: finishing the step and saving. Once more ends it at once.\n".encode())
        elif time.monotonic() - self._received_at > self.REPEAT_SECONDS:
            os._exit(128 + number)

    @contextmanager
    def deferred(self, num_processes: int) -> Iterator[None]:
        """Signals wait for the end of a step. Look at `received` afterwards: some arrive too late for `should_stop`."""
        if num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self._deferred = True
        try:
            yield
            if self._pending is not None:
                self._pending[0].wait()
        finally:
            self._deferred = False

    def should_stop(self) -> int:
        """After a step: the signal on which to stop now, the same on every process; 0: go on.

        Every process must call this after every step. The processes tell each other on the CPU, beside the
        computation, and hear the answer one step later, so that neither the device nor a step waits for it.
        """
        if self._group is None:
            return self.received
        answer = 0
        if self._pending is not None:
            work, heard = self._pending
            work.wait()
            answer = int(heard)
        word = torch.tensor(self.received)
        work = torch.distributed.all_reduce(word, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._pending = (work, word)
        return answer


# How torch tells of them; there is no type to catch.
LOST_WORKER = "DataLoader worker"
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "recvBytes")


def lost_process(error: Exception) -> str | None:
    """What happened, in a sentence, if an error comes from a worker or another process of the run that died."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch would raise again while this one is told
    text = str(error)
    if isinstance(error, (ConnectionError, EOFError)):
        return f"a DataLoader worker is gone ({type(error).__name__})."
    if LOST_WORKER in text:
        return f"{text.strip().splitlines()[0].rstrip('.')}. (Killed workers are often short of memory: see --num_workers.)"
    if any(words in text for words in LOST_PEER):
        return f"another process of this run is gone ({text.strip().splitlines()[0][:200]})."
    return None


def say_error(message: str) -> None:
    """A sentence that the first process of a run says."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: error: {message}", file=sys.stderr, flush=True)
