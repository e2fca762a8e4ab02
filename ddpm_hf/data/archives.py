"""Files inside .zip and .tar files, read in place: nothing is extracted.

The path of such a file is that of fsspec, such as zip://cats/1.png::/data/pictures.zip.
"""

import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ddpm_hf.data.reasons import reading

ARCHIVES = (".zip", ".tar")
OPEN = 64  # archives whose list of files is kept


def is_archive(file: Path) -> bool:
    """Whether a path is that of an archive, by its suffix."""
    return file.suffix.lower() in ARCHIVES


def member_path(archive: Path | str, name: str) -> str:
    """The path of the file `name` in an archive."""
    return f"{Path(archive).suffix.lower()[1:]}://{name}::{archive}"


def list_members(archive: Path) -> list[str]:
    """The names of the files in an archive, with "/" between their parts. Links and other special files are not among them.

    Raises BadData for an archive that is damaged or compressed as a whole.
    """
    with reading(archive):
        return list(_open(str(archive))[0])


def read_member(path: str) -> bytes | None:
    """The content of a file in a local archive; None for any other path.

    Raises what `zipfile` raises for a damaged file, EOFError for one that is cut off, and KeyError for one that is missing.
    """
    scheme, separator, rest = path.partition("://")
    if not separator or f".{scheme}" not in ARCHIVES:
        return None
    parts = rest.split("::")  # which may also be part of a name
    for i in range(1, len(parts)):
        archive = "::".join(parts[i:])
        if os.path.isfile(archive):
            places, read = _open(archive)
            return read(places["::".join(parts[:i])])
    return None


def _open(archive: str) -> tuple[dict, Callable]:
    status = os.stat(archive)
    # For each process: they cannot share the position in an open file.
    return _index(archive, status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=OPEN)
def _index(archive: str, *_stamp: int) -> tuple[dict, Callable]:
    """The places of the files in an archive by name, and the function that reads a place."""
    if archive.lower().endswith(".zip"):
        opened = zipfile.ZipFile(archive)
        members = [m for m in opened.infolist() if not m.is_dir() and not stat.S_ISLNK(m.external_attr >> 16)]
        return {_normal(member.filename): member.filename for member in members}, opened.read
    with tarfile.open(archive, "r:") as opened:
        members = [member for member in opened if member.isreg() and not member.issparse()]
    return {_normal(m.name): (m.offset_data, m.size) for m in members}, lambda place: _read_part(archive, *place)


def _normal(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/"))).lstrip("/")


def _read_part(file: str, start: int, size: int) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(start)
        data = opened.read(size)
    if len(data) < size:
        raise EOFError(f"{file} is cut off")
    return data
