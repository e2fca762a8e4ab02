"""Which files of a folder, or of archives, are images, of which split and class, and which files are left out."""

import io
import json
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from ddpm_hf.data.archives import list_members, member_path, read_member
from ddpm_hf.data.arrays import ARRAY_STARTS
from ddpm_hf.data.reasons import reading

ARRAYS = {".npy", ".npz"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation", "valid": "validation"}
LABELS = "dataset.json"  # of StyleGAN and EDM: {"labels": [[name, label], ...]}, or null for no labels
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognizes but cannot decode by itself
TEXTS = {".cls", ".csv", ".json", ".jsonl", ".md", ".txt", ".xml"}  # not opened to see whether they are pictures
UNSIGNED = {"TGA"}  # formats without a signature: some other files look like them


class Entry(NamedTuple):
    """A file of a data set.

    Attributes:
        name: relative to the folder or archive, with "/" between its parts.
        path: as `decoding.read_entry` takes it.
        stamp: what changes with its content: size in bytes and time of the last change in ns.
        split: if the archive names it.
    """

    name: str
    path: str
    stamp: tuple[int, int] = (0, 0)
    split: str | None = None

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    def read(self) -> bytes:
        """The content of the file."""
        data = read_member(self.path)
        return Path(self.path).read_bytes() if data is None else data

    @property
    def ends(self) -> tuple[str, str]:
        """What the path has before and after the name."""
        if self.path.endswith(self.name):
            return self.path.removesuffix(self.name), ""
        start = self.path.index(f"{self.name}::")  # in an archive
        return self.path[:start], self.path[start + len(self.name) :]

    def beside(self, name: str) -> str:
        """The path of the file that is called `name` as seen from the folder of this one, with "/" between its parts."""
        start, end = self.ends
        return start + os.path.normpath(PurePosixPath(self.name).parent / name) + end


@dataclass
class Listing:
    """The image files of a folder or of archives.

    Attributes:
        splits: by name of the split, the files, sorted.
        metadata: the metadata files.
        others: files that are not images, such as tables.
        left_out: number of files that are left out, by reason.
    """

    splits: dict[str, list[Entry]] = field(default_factory=dict)
    metadata: list[Entry] = field(default_factory=list)
    others: list[Entry] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def describe(left_out: Counter) -> str:
    """Numbers and reasons, as in "1 hidden, 3 not images (.txt)"; empty if nothing is left out."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))


def list_images(folder: Path) -> Listing:
    """The pictures in a folder and its subfolders that Pillow can read, by suffix or content, or else the arrays (.npy, .npz).

    Links to files and folders are followed, and every folder is read once. Hidden folders, and those whose name begins with
    "__", are not read. Top-level folders are splits if all of those with images have names of splits.
    """
    found = Listing()
    _sort(_walk(folder, found.left_out), found)
    return found


def list_archives(archives: Sequence[Path], splits: Sequence[str] | None = None) -> Listing:
    """The same for the files in some archives, as if they were extracted into one folder, each of them in the folder of its
    split if `splits` names those. Raises BadData for a damaged archive."""
    found = Listing()
    _sort((entry for i, file in enumerate(archives) for entry in _members(file, splits and splits[i])), found)
    return found


def _members(archive: Path, split: str | None) -> Iterator[Entry]:
    status, names = archive.stat(), list_members(archive)
    names = [name for name in names if not any(part.startswith((".", "__")) for part in name.split("/")[:-1])]
    # A folder around everything, called like the split, or with the folders of splits inside, is no class.
    tops, *_ = levels = [{tuple(name.split("/")[: n + 1]) for name in names if name.count("/") > n} for n in (0, 1)]
    has_splits = bool(levels[1]) and all(second in SPLITS for _, second in levels[1])
    is_around = len(tops) == 1 and (has_splits or (split and next(iter(tops))[0] in SPLITS))
    around = f"{next(iter(tops))[0]}/" if is_around else ""
    for name in names:
        stamp = (status.st_size, status.st_mtime_ns)
        yield Entry(name.removeprefix(around), member_path(archive, name), stamp, split)


def _sort(entries: Iterable[Entry], found: Listing) -> None:
    pictures, arrays = [], []
    for entry in entries:
        base = PurePosixPath(entry.name).name
        if base.startswith("."):
            if entry.suffix in picture_suffixes() | ARRAYS:
                found.left_out["hidden"] += 1
        elif not _is_unicode(entry.name):
            found.left_out["names that are not Unicode"] += 1
        elif base in METADATA or (base == LABELS and _has_labels(entry)):
            found.metadata.append(entry)
        elif entry.suffix in ARRAYS:
            arrays.append(entry)
        elif entry.suffix in picture_suffixes() or (entry.suffix not in TEXTS and _is_picture(entry)):
            pictures.append(entry)
        else:
            found.left_out[not_an_image(entry.suffix)] += 1
            found.others.append(entry)
    if pictures and arrays:  # statistics of the pictures, for example
        found.left_out["arrays beside pictures"] += len(arrays)
    found.metadata.sort()
    found.splits = _split(sorted(pictures or arrays), found.left_out)


def _is_unicode(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _has_labels(entry: Entry) -> bool:
    with reading(entry.path):
        content = json.loads(entry.read())
    return isinstance(content, dict) and "labels" in content


def _is_picture(entry: Entry) -> bool:
    if "://" not in entry.path:
        return is_picture(entry.path)
    try:
        return is_picture(io.BytesIO(entry.read()))
    except Exception:  # of a damaged archive: decoding says what is wrong
        return True


def is_picture(file) -> bool:
    """Whether Pillow recognizes the content of a file (a path or a binary stream) as a picture that it can decode."""
    picture_suffixes()  # loads the formats
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(file, formats=sorted(set(Image.OPEN) - STUBS - UNSIGNED)),
        ):
            return True
    except Image.DecompressionBombError:
        return True
    except (UnidentifiedImageError, OSError):
        return False
    except Exception:  # damaged files raise errors of many types; they are recognized, and decoding says what is wrong
        return True


def is_image_bytes(data) -> bool:
    """Whether bytes are a picture, or an array of NumPy."""
    return isinstance(data, bytes) and (data.startswith(ARRAY_STARTS[0]) or is_picture(io.BytesIO(data)))


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of the formats that Pillow can decode, in lower case."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, form in formats.items() if form in Image.OPEN and form not in STUBS)


def not_an_image(suffix: str) -> str:
    """The reason why files with this suffix are left out."""
    return f"not images ({suffix})" if suffix else "not images (without suffix)"


def _walk(folder: Path, left_out: Counter) -> Iterator[Entry]:
    """The files in a folder. Folders are read before links to folders, so that a folder which is linked from beside it is
    read at its own place."""
    seen, root = set(), folder.resolve()
    links, waiting = [], [("", folder)]
    while waiting or links:
        is_link = not waiting
        prefix, path = waiting.pop() if waiting else links.pop(0)
        real = path.resolve()
        if real in seen or (is_link and root.is_relative_to(real)):
            left_out["links to a folder that is read already or lies around it"] += 1
            continue
        seen.add(real)
        with reading(path):
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        if not entries and PurePosixPath(path.name).suffix.lower() in picture_suffixes():
            left_out["folders named like a picture"] += 1
        for entry in entries:
            name, entry_path = prefix + entry.name, path / entry.name
            if not entry.is_dir():
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing: as a broken image, it is named with its path
                    yield Entry(name, str(entry_path))
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield Entry(name, str(entry_path), (status.st_size, status.st_mtime_ns))
                elif not entry.name.startswith("."):
                    left_out["not a regular file"] += 1
            elif not entry.name.startswith((".", "__")):
                (links if entry.is_symlink() else waiting).append((name + "/", entry_path))


def _split(entries: list[Entry], left_out: Counter) -> dict[str, list[Entry]]:
    tops = {entry.name.split("/")[0] for entry in entries if "/" in entry.name}
    by_archive = bool(entries) and all(entry.split for entry in entries)
    if not by_archive and not (tops and tops <= SPLITS.keys()):
        return {"train": entries} if entries else {}
    splits = {split: [] for split in dict.fromkeys(SPLITS.values())}
    for entry in entries:
        if by_archive or "/" in entry.name:
            splits[entry.split if by_archive else SPLITS[entry.name.split("/")[0]]].append(entry)
        else:
            left_out["beside the folders of splits"] += 1
    return {split: found for split, found in splits.items() if found}


def class_names(found: Listing) -> list[str] | None:
    """The names of the folders of images, sorted, if there are several and all are at one depth; None for metadata files
    and otherwise."""
    every = [entry for entries in found.splits.values() for entry in entries]
    below = all(not entry.split and entry.name.split("/")[0] in SPLITS and "/" in entry.name for entry in every)
    inside = [PurePosixPath(entry.name.split("/", 1)[1] if below else entry.name) for entry in every]
    classes = {path.parent.name for path in inside}
    is_level = len({len(path.parts) for path in inside}) == 1
    return sorted(classes) if not found.metadata and is_level and len(classes) > 1 else None
