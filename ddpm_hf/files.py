"""Atomic writes of files and folders, and locks on folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

UNFINISHED = ".unfinished"  # suffix of incomplete files and folders, whose names also start with a dot


def atomic_file(file: Path, content: str | bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it: readers see the old or the new content."""
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
    """A temporary folder on the file system of `folder`, so that its files can be renamed into `folder`.

    It lies inside `folder` if that exists, since `folder` may be a mount point or a link to another disk; otherwise next
    to it. It is deleted at the end.
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
    """A temporary folder that replaces `folder` at the end, once its files are on disk.

    If anything is raised, or the process is killed while it writes, `folder` stays as it was.
    """
    folder = folder.resolve()
    staged, old = (folder.with_name(f".{folder.name}{suffix}") for suffix in (UNFINISHED, f".old{UNFINISHED}"))
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        for path in (*staged.rglob("*"), staged):
            sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)  # deleting it takes longer, and would empty a mount point before the rename fails
        os.rename(staged, folder)
        sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def lock_folder(folder: Path, wait_seconds: float = 60.0) -> Iterator[None]:
    """Lock a folder against other runs. The operating system releases the lock if the process dies.

    Raises ValueError if another run still holds the lock after `wait_seconds`: a killed run takes a moment to end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=wait_seconds, poll_interval=0.2)
    except Timeout:
        raise ValueError(f"another run is writing to {folder}: end it first, or use another folder.") from None
    with lock:
        yield


def sync(path: Path) -> None:
    """Write a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
