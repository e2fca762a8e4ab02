"""Atomic writes of files and folders, checks of the places where they go, and locks on folders."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

UNFINISHED = ".unfinished"  # suffix of incomplete files and folders, whose names also start with a dot


def check_output_folder(name: str, folder: str | Path, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """Raise ValueError, naming the argument, if these files and folders cannot be written into `folder`.

    What does not exist can be created. Nothing is written. A disk that is full is not noticed.
    """

    def refuse(path: str, problem: str) -> None:
        accepted = "a folder that can be written to, or a new one"
        raise ValueError(f"{name} must be {accepted}, got {str(folder)!r}: {path!r} {problem}.")

    def check_folder(path: str) -> None:
        if not os.path.isdir(path):
            leads = f"is a link to {os.readlink(path)!r}, which does not exist" if os.path.islink(path) else ""
            refuse(path, leads if leads and not os.path.exists(path) else "is not a folder")
        if not os.access(path, os.W_OK | os.X_OK):
            refuse(path, "cannot be written to: it is read-only, or another user's")

    place = Path(folder)
    while not os.path.lexists(place):
        place = place.parent
    check_folder(str(place))
    for part in (os.path.join(folder, part) for part in folders):
        if os.path.lexists(part):
            check_folder(part)
    for file in (os.path.join(folder, file) for file in files):
        if os.path.isdir(file):
            refuse(file, "is a folder, and a file is written there")


def atomic_file(file: Path, content: str | bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it: readers see the old or the new content."""
    staged = _unfinished(file)
    try:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(staged)
        os.replace(staged, file)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def move_file(file: Path, target: Path) -> None:
    """Rename a file. To another file system, copy it first under a temporary name: `target` is the old or the new file."""
    try:
        os.replace(file, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    staged = _unfinished(target)
    try:
        shutil.copyfile(file, staged)
        sync(staged)
        os.replace(staged, target)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    file.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}{UNFINISHED}")


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

    If anything is raised, or the process is killed while it writes, `folder` stays as it was. Of a link, the target is
    replaced. Raises OSError for a mount point, which cannot be.
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
