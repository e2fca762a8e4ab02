"""Retries of calls to the Hub, and downloads with checksums."""

import hashlib
import os
import random
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.file_download import repo_folder_name

from ddpm_hf.checks import check_float, check_int
from ddpm_hf.transfer.answers import UnexpectedAnswer
from ddpm_hf.transfer.client import LIBRARY, check_token, hub_api, limit_requests, pause
from ddpm_hf.transfer.errors import OFFLINE, explain_error, explained, is_transient

Result = TypeVar("Result")
CHECKSUM = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
# Files with a correct checksum, with their sizes and times, so that each is read once and not at every load.
_checked: set[tuple[Path, str, int, int]] = set()


@dataclass(frozen=True)
class Retries:
    """How often a failed call is made, and the wait before each retry.

    The wait doubles with each retry and varies by up to 25 %, so that two clients do not stay in step. It is longer if
    the Hub sends a Retry-After header, and never longer than `longest_wait_seconds`. Raises ValueError if `tries` < 1 or
    `first_wait_seconds` lies outside 0..`longest_wait_seconds`.
    """

    tries: int = 5
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0

    def __post_init__(self):
        check_int("tries", self.tries, 1)
        longest = check_float("longest_wait_seconds", self.longest_wait_seconds, "[0, inf)")
        check_float("first_wait_seconds", self.first_wait_seconds, f"[0, {longest}]")


DEFAULT_RETRIES = Retries()


def with_retries(call: Callable[[], Result], retries: Retries = DEFAULT_RETRIES) -> Result:
    """The result of `call`, retried after transient errors. The last error is raised."""
    for attempt in range(retries.tries):
        try:
            limit_requests()
            return call()
        except Exception as error:
            header = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
            asked_wait = float(header) if header.isdigit() else 0.0
            is_last = attempt + 1 == retries.tries or asked_wait > retries.longest_wait_seconds
            if is_last or not is_transient(error):
                raise
        # Not the global random state: it belongs to the training.
        wait = random.SystemRandom().uniform(0.75, 1.25) * retries.first_wait_seconds * 2**attempt
        pause(max(asked_wait, min(wait, retries.longest_wait_seconds)))


# ------------------------------------------------------------------ downloads


def download_snapshot(
    repo_id: str, retries: Retries = DEFAULT_RETRIES, needed: Callable[[Path], bool] | None = None, **kwargs
) -> Path:
    """The folder of a snapshot, as from `huggingface_hub.snapshot_download`, with the checksum of every file verified.

    The client keeps the list of a commit's files for ever. It is asked for again if it names a file that is not there, or
    if it leaves the folder empty or without what is `needed`. A damaged file is downloaded again, once. Offline, and if the
    Hub cannot be reached, the cached copy is verified as well: the cache names files by their checksums. On a file system
    without links it does not, and cached files are used as they are. Raises FileNotFoundError, PermissionError or another
    OSError whose message is one sentence that says what to do, and ValueError for a token that cannot be sent.
    """
    options = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
    kwargs["library_name"] = LIBRARY
    check_token(kwargs.get("token"))
    cache = _cache_of(repo_id, options.get("cache_dir"))

    def call() -> Path:
        try:
            return Path(snapshot_download(repo_id, **kwargs))
        except errors.RemoteEntryNotFoundError as error:
            _forget_lists(cache)
            raise UnexpectedAnswer("a list of files that are not there", response=error.response) from error

    with explained(repo_id):
        cached = {_identity(file) for file in _files_of(cache / "snapshots")}
        folder = with_retries(call, retries)
        is_complete = any if needed is None else lambda files: any(files) and needed(folder)
        if not is_complete(_files_of(folder)) and not _is_offline(options):
            _forget_lists(cache)
            folder = with_retries(call, retries)
        for file, checksum in _checksums(repo_id, folder, _files_of(folder), retries, options, cached).items():
            _verify(repo_id, folder, file, checksum, retries, options)
        return folder


def _forget_lists(cache: Path) -> None:
    """Delete the lists that the client keeps, on disk and (in huggingface_hub 2.4) in memory, which has no public name."""
    in_memory = getattr(sys.modules.get("huggingface_hub._tree_cache"), "_IN_MEMORY_TREE_CACHE", {})
    for file in cache.glob("trees/*.json"):
        file.unlink(missing_ok=True)
        in_memory.pop(str(file), None)


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def download_file(repo_id: str, name: str, commit: str, retries: Retries, token: str | None) -> Path:
    """One file of a commit, verified as in `download_snapshot`. Errors are those of the client."""
    how = {"token": token, "library_name": LIBRARY}
    path = Path(with_retries(lambda: hf_hub_download(repo_id, name, revision=commit, **how), retries))
    folder, options = path.parents[len(Path(name).parts) - 1], {"token": token}
    checksum = _checksums(repo_id, folder, [path], retries, options)[path]
    _verify(repo_id, folder, path, checksum, retries, options)
    return path


def _cache_of(repo_id: str, cache_dir: str | Path | None) -> Path:
    """The folder of a repository in the cache."""
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=repo_id, repo_type="model")


def _identity(file: Path) -> tuple[Path, int, int]:
    """What changes when a file is written again."""
    status = file.stat()
    return file, status.st_size, status.st_mtime_ns


def _checksums(
    repo_id: str, folder: Path, files: list[Path], retries: Retries, options: dict, cached: Collection = ()
) -> dict[Path, str]:
    """The checksums of a snapshot's files: SHA-256 of LFS files, git's SHA-1 of others.

    Without a network, files whose checksum the cache does not know are left out, if they are among the `cached` ones.
    """
    # The cache links to a file named by the checksum. Not resolve(): that file may be a link itself.
    links = {file: Path(os.readlink(file)).name for file in files if file.is_symlink()}
    known = {file: name for file, name in links.items() if CHECKSUM.fullmatch(name)}
    names = {file.relative_to(folder).as_posix(): file for file in files if file not in known}
    if not names or _is_offline(options):
        return known
    api = hub_api(options.get("token"))
    try:
        infos = with_retries(lambda: api.get_paths_info(repo_id, list(names), revision=folder.name), retries)
    except Exception as error:
        if is_transient(error) and all(_identity(file) in cached for file in names.values()):
            return known  # as snapshot_download, which takes the cached copy if the Hub cannot be reached
        raise
    asked = {info.path: info.lfs.sha256 if info.lfs is not None else info.blob_id for info in infos}
    if foreign := sorted(names.keys() - asked.keys()):
        raise OSError(f"{foreign[0]} in the cache is not a file of {repo_id}: delete {names[foreign[0]]}.")
    return known | {names[name]: checksum for name, checksum in asked.items()}


def _is_offline(options: dict) -> bool:
    return bool(options.get("local_files_only") or constants.HF_HUB_OFFLINE)


def _verify(repo_id: str, folder: Path, file: Path, checksum: str, retries: Retries, options: dict) -> None:
    """Compare a file with its checksum; a damaged one is downloaded again, once."""
    if _has_checksum(file, checksum):
        return
    name = file.relative_to(folder).as_posix()
    if _is_offline(options):
        raise OSError(f"{name} of {repo_id} is damaged in the cache ({file}), and {OFFLINE}")
    options = options | {"revision": folder.name, "force_download": True, "library_name": LIBRARY}
    if not file.is_symlink():
        file.unlink()  # the client keeps a file that is there, even with force_download (seen in huggingface_hub 2.4)
    try:
        with_retries(lambda: hf_hub_download(repo_id, name, **options), retries)
    except Exception as error:
        reason = explain_error(error, repo_id)
        raise type(reason)(f"{name} of {repo_id} is damaged in the cache ({file}), and {reason}") from error
    if not _has_checksum(file, checksum):
        # Other programs must not find it in the cache.
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        raise OSError(f"{name} of {repo_id} was damaged in two downloads (its checksum is not {checksum}).")


def git_digest(size: int):
    """A hash that becomes git's of a file of this size, when it is updated with the content."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _has_checksum(file: Path, checksum: str) -> bool:
    status = file.stat()
    key = (file.resolve(), checksum, status.st_size, status.st_mtime_ns)
    if key not in _checked:
        digest = hashlib.sha256() if len(checksum) == 64 else git_digest(status.st_size)
        with open(file, "rb") as stream:
            if hashlib.file_digest(stream, lambda: digest).hexdigest() == checksum:
                _checked.add(key)
    return key in _checked
