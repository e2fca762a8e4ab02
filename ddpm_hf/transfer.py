"""The way to a Hub and back: what is tried again, what is checked on arrival, and what went wrong in one sentence."""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # the client's own, whichever library it uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

Result = TypeVar("Result")
OID = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
LOG_IN = "run `hf auth login`, or set HF_TOKEN"

# Files whose content was found to be what the Hub says, with size and time: checked once, not at every load.
_checked: set[tuple[str, int, int]] = set()


@dataclass(frozen=True)
class Retries:
    """How often a call is made, and how long to wait before it is made again: twice as long each time, give or take a
    quarter so that two who wait do not meet again; longer where the Hub asks for it, up to `longest_wait_seconds`."""

    tries: int = 5
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0

    def __post_init__(self):
        if self.tries < 1:
            raise ValueError(f"tries must be at least 1, got {self.tries!r}.")
        if not 0 <= self.first_wait_seconds <= self.longest_wait_seconds:
            raise ValueError(
                f"first_wait_seconds must lie in 0..longest_wait_seconds = {self.longest_wait_seconds!r}, "
                f"got {self.first_wait_seconds!r}."
            )


class BranchMoved(Exception):
    """Somebody else committed between our look at a branch and our commit to it."""


def is_transient(error: BaseException | None) -> bool:
    """Whether the same call may well succeed a little later."""
    if isinstance(error, LocalEntryNotFoundError):  # could not ask the Hub, and had no copy
        return not isinstance(error.__cause__, OfflineModeIsEnabled) and is_transient(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading …", from a thread
        return is_transient(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # Xet's errors are built-in ones: RuntimeError, or OSError with no number of the system's.
    is_xet = type(error) in (RuntimeError, OSError) and getattr(error, "errno", None) is None
    return is_xet or isinstance(error, (HTTPError, ConnectionError, TimeoutError, BranchMoved))


def with_retries(act: Callable[[], Result], retries: Retries) -> Result:
    """What `act` returns; called again after errors that pass."""
    wait = retries.first_wait_seconds
    for left in reversed(range(retries.tries)):
        try:
            return act()
        except Exception as error:
            asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
            least = float(asked) if asked.isdigit() else 0.0
            if not left or not is_transient(error) or least > retries.longest_wait_seconds:
                raise
            jitter = random.SystemRandom().uniform(0.75, 1.25)
            time.sleep(max(least, min(wait, retries.longest_wait_seconds) * jitter))
            wait *= 2
    raise AssertionError("unreachable")


def explain_error(error: BaseException, repo_id: str) -> str:
    """What went wrong and what to do about it: the client's messages span lines, and often blame something else."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{str(error).rstrip('.')}: {explain_error(error.__cause__, repo_id)}"
    host = HfApi().endpoint
    if isinstance(error, LocalEntryNotFoundError):
        if error.__cause__ is not None and not isinstance(error.__cause__, OfflineModeIsEnabled):
            return explain_error(error.__cause__, repo_id)
        return (
            f"{repo_id} was not downloaded whole before, and the network is not to be used: "
            "load it once with HF_HUB_OFFLINE unset and local_files_only=False."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so {host} is not asked for {repo_id}: unset it."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "no more").split())
        if isinstance(error, GatedRepoError):
            return f"{repo_id} asks for its terms to be accepted: do so at {host}/{repo_id}, then {LOG_IN}."
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{host} has no repository {repo_id}, or it is private and the token may not read it: check the name, "
                f"and {LOG_IN} to the token of somebody who may."
            )
        if isinstance(error, RevisionNotFoundError):
            return f"{repo_id} has no such branch, tag or commit: {host}/{repo_id}/tree/main lists those there are."
        if isinstance(error, EntryNotFoundError):
            return f"{repo_id} lacks a file that was asked for: look at {host}/{repo_id}/tree/main."
        if status == 401:
            return (
                f"the Hub does not accept this token: {LOG_IN} to a token that may write (it said: {said})."
                if "credential" in said.lower() or error.request.method != "GET"
                else f"the Hub wants to know who asks for {repo_id}: {LOG_IN} (it said: {said})."
            )
        if status == 403:
            return f"this token may not write to {repo_id} (the Hub said: {said})."
        if status == 429:
            return f"the Hub answered 429 for {repo_id}, too many requests: try again later (it said: {said})."
        return f"the Hub answered {status} for {repo_id}: try again later (it said: {said})."
    if isinstance(error, BranchMoved):
        return f"others kept committing to {repo_id} at the same time: try again later."
    if isinstance(error, HTTPError):
        return f"{host} cannot be reached, or broke off ({' '.join(str(error).split())}): try again later."
    return " ".join(str(error).split())


# ------------------------------------------------------------------ downloads


def download_snapshot(repo_id: str, retries: Retries = Retries(), **kwargs) -> Path:  # noqa: B008
    """The folder of a snapshot, as `huggingface_hub.snapshot_download`, every file of which is what the Hub says it is.

    A damaged file is fetched again, once. With no network what was downloaded before is returned, checked as well: the
    cache keeps files under the names of their checksums. Raises FileNotFoundError, PermissionError or OSError whose
    message is one sentence that says what to do.
    """
    try:
        folder = Path(with_retries(lambda: snapshot_download(repo_id, **kwargs), retries))
        is_offline = kwargs.get("local_files_only", False) or constants.HF_HUB_OFFLINE
        options = {name: kwargs[name] for name in ("token", "cache_dir") if name in kwargs}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            _check_file(repo_id, folder, file, is_offline, retries, options)
        return folder
    except (OSError, HTTPError, RuntimeError) as error:
        raise _plain(error)(explain_error(error, repo_id)) from error


def download_file(repo_id: str, name: str, revision: str, retries: Retries, token: str | None) -> Path:
    """One file of a commit (`revision` is its hash), checked as those of `download_snapshot` are."""
    path = Path(with_retries(lambda: hf_hub_download(repo_id, name, revision=revision, token=token), retries))
    folder = path.parents[len(Path(name).parts) - 1]
    _check_file(repo_id, folder, path, False, retries, {"token": token})
    return path


def _plain(error: BaseException) -> type[OSError]:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, (HfHubHTTPError, HTTPError)):
        return _plain(error.__cause__)
    if isinstance(error, GatedRepoError):
        return PermissionError
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)):
        return FileNotFoundError
    if isinstance(error, HfHubHTTPError):
        return PermissionError if error.response.status_code in (401, 403) else OSError
    if isinstance(error, (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return ConnectionError
    return OSError


def _check_file(repo_id: str, folder: Path, file: Path, is_offline: bool, retries: Retries, options: dict) -> None:
    name = file.relative_to(folder).as_posix()
    oid = _oid(repo_id, folder, file, name, is_offline, retries, options)
    if oid is None or is_whole(file, oid):
        return
    if is_offline:
        raise OSError(
            f"{name} of {repo_id} is damaged in the cache ({file}), and the network is not to be used: "
            "load it once with HF_HUB_OFFLINE unset and local_files_only=False."
        )
    with_retries(
        lambda: hf_hub_download(repo_id, name, revision=folder.name, force_download=True, **options),
        retries,
    )
    if not is_whole(file, oid):
        # No other program is to find it in the cache and believe it.
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        raise OSError(
            f"{name} of {repo_id} arrived damaged twice (its checksum is not {oid}, which the Hub gives): try again "
            "later, or on another network."
        )


def _oid(repo_id: str, folder: Path, file: Path, name: str, is_offline: bool, retries: Retries, options: dict):
    """The checksum that the Hub gives for a file: SHA-256 of LFS files, git's SHA-1 of others."""
    if file.is_symlink():  # the link, not where it ends: the place it names may be a link itself
        blob = Path(os.readlink(file)).name
        if OID.fullmatch(blob):
            return blob
    if is_offline:
        return None  # a file system without links keeps no names of checksums
    api = HfApi(token=options.get("token"))
    (info,) = with_retries(lambda: api.get_paths_info(repo_id, [name], revision=folder.name), retries)
    return info.lfs.sha256 if info.lfs is not None else info.blob_id


def is_whole(file: Path, oid: str) -> bool:
    """Whether a file has the content that the Hub's checksum is of."""
    status = file.stat()
    key = (f"{file.resolve()} {oid}", status.st_size, status.st_mtime_ns)
    if key in _checked:
        return True
    digest = hashlib.sha256() if len(oid) == 64 else hashlib.sha1(b"blob %d\0" % status.st_size, usedforsecurity=False)
    with open(file, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    if digest.hexdigest() != oid:
        return False
    _checked.add(key)
    return True
