"""Errors of the Hub and its client: which may pass, and one sentence for each that says what to do."""

import json
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from huggingface_hub import HfApi, errors

from ddpm_hf.transfer.answers import UnexpectedAnswer
from ddpm_hf.transfer.client import Abandoned, Stalled

LOG_IN = "run `hf auth login`, or set HF_TOKEN"
OFFLINE = "the network is disabled: load it once with HF_HUB_OFFLINE unset and local_files_only=False."
NO_NETWORK = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
# What the client raises for an answer that it does not understand. hf_xet raises RuntimeError.
UNREADABLE = (RuntimeError, OSError, KeyError, TypeError, AttributeError, IndexError, ValueError, AssertionError)
UNREADABLE += (json.JSONDecodeError, UnicodeDecodeError, OverflowError, RecursionError, errors.FileMetadataError)
SECRETS = (
    (re.compile(r"hf_\w{4,}|(?<=Bearer )[^\s'\"]+"), "<token>"),
    (re.compile(r"(?<=://)[^\s/@]+@"), ""),  # user and password
    (re.compile(r"(?<=\w)\?[^\s'\")]*=[^\s'\")]*"), ""),  # signatures of addresses
)


class BranchMoved(Exception):
    """Another client committed to the branch after we had read it."""


class NotStored(Exception):
    """The Hub reported success, and does not have what was sent. The message says what is missing."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    error = _cause(error)
    if isinstance(error, (*NO_NETWORK, Abandoned)):
        return False
    if isinstance(error, errors.HfHubHTTPError) and not isinstance(error, UnexpectedAnswer):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    passing = (errors.HTTPError, ConnectionError, TimeoutError, BranchMoved, NotStored)
    return isinstance(error, passing) or _is_unreadable(error)


def _cause(error: BaseException) -> BaseException:
    """The error behind those that the client wraps: uploads in a thread, requests that find no cached copy, and downloads
    with force_download (a ValueError)."""
    is_wrapped = isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError)) and error.__cause__ is not None
    is_wrapped |= type(error) is ValueError and isinstance(
        error.__cause__, (errors.HTTPError, errors.FileMetadataError)
    )
    return _cause(error.__cause__) if is_wrapped else error


def _is_unreadable(error: BaseException) -> bool:
    """Whether the client failed on an answer: an error of `UNREADABLE`, without errno, raised while it or hf_xet worked."""
    if isinstance(error, errors.FileMetadataError):
        return True  # the client cuts its traceback
    return type(error) in UNREADABLE and getattr(error, "errno", None) is None and _is_of_client(error)


def _is_of_client(error: BaseException) -> bool:
    """Whether an error was raised by huggingface_hub or what it called. hf_xet, which is native, has no frames of its own."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules]
    own = max((i for i, name in enumerate(packages) if name == "ddpm_hf"), default=-1)
    return "huggingface_hub" in packages[own + 1 :]


def without_secrets(text: str) -> str:
    """A text in one line without tokens, passwords and signed addresses, which servers and libraries may quote."""
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return " ".join(text.split())


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Raise errors of the Hub and of the client as `explain_error` explains them. Other errors, such as ValueError for an
    argument, stay as they are. The original is shown with it, unless it, or its cause, quotes a secret."""
    try:
        yield
    except Exception as error:
        is_of_hub = isinstance(error, (OSError, errors.HTTPError)) or _cause(error) is not error or is_transient(error)
        if not is_of_hub:
            raise
        chain = error
        while chain is not None and without_secrets(str(chain)) == " ".join(str(chain).split()):
            chain = chain.__cause__ or chain.__context__
        raise explain_error(error, repo_id) from (error if chain is None else None)


def explain_error(error: BaseException, repo_id: str) -> OSError:
    """The built-in exception that fits an error. Its message says in one sentence what went wrong and what to do.

    The client's own messages span several lines. Explained errors stay as they are.
    """
    explained = _explain(error, repo_id)
    return type(explained)(without_secrets(str(explained)))


def _explain(error: BaseException, repo_id: str) -> OSError:
    host, cause = HfApi().endpoint, _cause(error)
    message = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(error, RuntimeError) and cause is not error:  # names the file that was uploaded
        explained = _explain(cause, repo_id)
        return type(explained)(f"{str(error).rstrip('.')}: {explained}")
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, NO_NETWORK):
        return FileNotFoundError(f"the cache holds no complete copy of {repo_id}, and {OFFLINE}")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return ConnectionError(f"HF_HUB_OFFLINE is set, so {repo_id} cannot be reached on {host}: unset it.")
    if isinstance(cause, UnexpectedAnswer) or _is_unreadable(cause):
        found = getattr(cause, "problem", f"something that cannot be read, {type(cause).__name__}: {message}")
        advice = (
            "a login page or a proxy may have answered instead; check the network and HF_ENDPOINT, or try again later"
        )
        return OSError(f"{host} answered a request for {repo_id} with {found}: {advice}.")
    if isinstance(cause, errors.HfHubHTTPError):
        return _explain_response(cause, repo_id, host)
    if isinstance(cause, BranchMoved):
        return OSError(f"other clients kept committing to {repo_id}: try again later.")
    if isinstance(cause, NotStored):
        return OSError(f"{host} reported success, but {repo_id} has no {message}: try again later.")
    if isinstance(cause, Stalled):
        return TimeoutError(f"{host} does not answer requests for {repo_id} ({message}): try again later.")
    if isinstance(cause, Abandoned):
        return TimeoutError(f"the upload to {repo_id} was not finished in time.")
    is_xet = type(cause) in (ConnectionError, TimeoutError) and _is_of_client(cause)
    if isinstance(cause, errors.HTTPError) or is_xet:
        problem = f"cannot be reached, or closed the connection, for {repo_id}"
        return ConnectionError(f"{host} {problem} ({message}): try again later.")
    if isinstance(cause, OSError):
        is_own = cause.errno is None and type(cause).__module__ == "builtins"
        return type(cause)(message) if is_own else OSError(f"{repo_id}: {message}")
    return OSError(message)


def _explain_response(error: errors.HfHubHTTPError, repo_id: str, host: str) -> OSError:
    status = error.response.status_code
    said = f"(the Hub said: {' '.join((error.server_message or 'no message').split())})."
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{repo_id} is gated: accept its terms at {host}/{repo_id}, then {LOG_IN}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = f"{host} has no repository {repo_id}, or it is private"
        return FileNotFoundError(f"{problem}: check the name, and {LOG_IN} to a token with access.")
    if isinstance(error, (errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        missing = "file" if isinstance(error, errors.EntryNotFoundError) else "branch, tag or commit"
        return FileNotFoundError(f"{repo_id} has no such {missing}: see {host}/{repo_id}/tree/main.")
    if status == 401:
        problem = "does not accept this token" if _had_token(error) else "requires a login"
        return PermissionError(f"the Hub {problem} for {repo_id}: {LOG_IN} to a token with access to it {said}")
    if status == 403:
        return PermissionError(f"this token has no access, or no write access to {repo_id}: {LOG_IN} to another {said}")
    problem = "429 (too many requests)" if status == 429 else status
    return OSError(f"the Hub answered {problem} for {repo_id}: try again later {said}")


def _had_token(error: errors.HfHubHTTPError) -> bool:
    with suppress(AttributeError, RuntimeError):  # a response may have no request
        return "Authorization" in error.response.request.headers
    return True
