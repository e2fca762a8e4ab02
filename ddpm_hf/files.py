"""Files and folders that are whole or absent, and folders that one process has to itself."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not kept apart
    fcntl = None

UNFINISHED = ".unfinished"  # ends the name of what is not whole yet; the name begins with a dot


def atomic_file(file: Path, content: str | bytes) -> None:
    """Write a file under another name in its folder, then rename it: a reader sees the old one or all of this one."""
    staged = file.with_name(f".{file.name}{UNFINISHED}")
    try:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(staged)
        os.replace(staged, file)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """An empty folder on the file system of `folder`, from which files can be renamed to there; gone afterwards.

    It lies inside `folder` where that exists, which may be a mount point or a link to another disk, else beside it.
    """
    folder = folder.resolve()
    staged = (folder if folder.is_dir() else folder.parent) / f".{folder.name}{UNFINISHED}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` at the end, with everything in it on the disk; where
    anything is raised, `folder` stays as it was."""
    folder = folder.resolve()
    staged = folder.with_name(f".{folder.name}{UNFINISHED}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        for path in (*staged.rglob("*"), staged):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(staged, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


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
