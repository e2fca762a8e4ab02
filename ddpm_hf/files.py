"""Files that are whole or absent, and folders that one process has to itself."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not kept apart
    fcntl = None


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it there: a reader sees the old one or all of this one."""
    beside = file.with_name(f".{file.name}.unfinished")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(beside)
        os.replace(beside, file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def lock_folder(folder: Path, wait_seconds: float = 60.0) -> Iterator[None]:
    """Keep other runs out of a folder for a while; the system lifts the lock of a process that dies.

    Raises ValueError if another run still holds it after `wait_seconds` (a killed one takes a moment to end).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        if fcntl is None:
            yield
            return
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another run is writing to {folder}: end it first, or use another folder."
                    ) from None
                time.sleep(0.2)
        try:
            yield
        finally:
            # Explicitly, since worker processes may hold copies of the file.
            fcntl.flock(file, fcntl.LOCK_UN)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
