"""Retries, timeouts, and explanations of errors, without a Hub (tests/hub/test_faults.py has one)."""

import time
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, errors, get_session

from ddpm_hf import transfer
from ddpm_hf.transfer import BranchMoved, Retries, explain_error, is_transient, with_retries


def hub_error(kind: type, status: int, token: str | None = None, **headers: str) -> errors.HfHubHTTPError:
    request = SimpleNamespace(headers={} if token is None else {"Authorization": f"Bearer {token}"})
    response = SimpleNamespace(status_code=status, headers=headers, request=request)
    return kind("a message\nof two lines", response=response, server_message="no")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raised(error: Exception, module: str) -> Exception:
    """The error as raised by a function of a module."""
    try:
        exec("raise error", {"__name__": module, "error": error})
    except type(error):
        return error


BUSY, OFFLINE = hub_error(errors.HfHubHTTPError, 503), errors.OfflineModeIsEnabled("offline")
TRANSIENT = {
    "503": BUSY,
    "429": hub_error(errors.HfHubHTTPError, 429),
    "408": hub_error(errors.HfHubHTTPError, 408),
    "no connection": ConnectionError("refused"),
    "timeout": TimeoutError("slow"),
    "moved branch": BranchMoved(),
    "upload thread": caused(RuntimeError("Error while uploading 'a' to the Hub."), BUSY),
    "no cached copy": caused(errors.LocalEntryNotFoundError("none"), BUSY),
    "forced download": caused(ValueError("Force download failed"), BUSY),
    "hf_xet": raised(RuntimeError("Task error: 503"), "huggingface_hub.file_download"),
    "wrong size": raised(OSError("Consistency check failed"), "huggingface_hub.file_download"),
}
PERMANENT = {
    "404": hub_error(errors.RepositoryNotFoundError, 404),
    "400": hub_error(errors.HfHubHTTPError, 400),
    "offline": OFFLINE,
    "offline, no cached copy": caused(errors.LocalEntryNotFoundError("none"), OFFLINE),
    "local files only": errors.LocalEntryNotFoundError("none"),
    "other library": raised(RuntimeError("CUDA out of memory"), "torch.nn"),
    "this package": raised(RuntimeError("a bug"), "ddpm_hf.hub.model_card"),
    "never raised": RuntimeError("a bug"),
    "subclass": raised(NotImplementedError("a bug"), "huggingface_hub.hf_api"),
    "bad request": caused(hub_error(errors.BadRequestError, 400), errors.HTTPError("400")),  # also a ValueError
    "wrong value": caused(ValueError("a bug"), KeyError("a")),
    "full disk": raised(OSError(28, "No space left on device"), "huggingface_hub.file_download"),
    "upload thread": caused(RuntimeError("Error while uploading 'a' to the Hub."), ValueError("bad")),
}


@pytest.mark.parametrize("error", TRANSIENT.values(), ids=TRANSIENT)
def test_transient_errors_are_retried(error):
    assert is_transient(error)


@pytest.mark.parametrize("error", PERMANENT.values(), ids=PERMANENT)
def test_permanent_errors_are_not_retried(error):
    assert not is_transient(error)


@pytest.mark.parametrize("error", [*TRANSIENT.values(), *PERMANENT.values()], ids=[*TRANSIENT, *PERMANENT])
def test_explanations_are_a_single_line(error):
    assert "\n" not in str(explain_error(error, "user/m"))


@pytest.mark.parametrize(
    "error, words",
    [
        (hub_error(errors.GatedRepoError, 403), ["user/m is gated", "/user/m", "hf auth login"]),
        (hub_error(errors.RepositoryNotFoundError, 401), ["no repository user/m", "private", "hf auth login"]),
        (hub_error(errors.RevisionNotFoundError, 404), ["user/m has no such branch, tag or commit"]),
        (hub_error(errors.RemoteEntryNotFoundError, 404), ["user/m has no such file"]),
        (hub_error(errors.HfHubHTTPError, 401, token="hf_0"), ["does not accept this token", "HF_TOKEN"]),
        (hub_error(errors.HfHubHTTPError, 401), ["requires a login for user/m", "HF_TOKEN"]),
        (hub_error(errors.HfHubHTTPError, 403), ["no write access to user/m"]),
        (PERMANENT["local files only"], ["no complete copy of user/m", "HF_HUB_OFFLINE unset"]),
        (OFFLINE, ["HF_HUB_OFFLINE is set", "user/m"]),
        (TRANSIENT["upload thread"], ["Error while uploading 'a' to the Hub: the Hub answered 503 for user/m"]),
        (BranchMoved(), ["kept committing to user/m"]),
    ],
)
def test_explanations_name_the_repository_and_the_remedy(error, words):
    text = str(explain_error(error, "user/m"))
    assert [word for word in words if word not in text] == []


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def fail_with(error: Exception, calls: list):
    def call():
        calls.append(error)
        raise error

    return call


def test_waits_double_up_to_the_longest(waits):
    made = []
    with pytest.raises(ConnectionError):
        with_retries(fail_with(ConnectionError(), made), Retries(5, first_wait_seconds=1.0, longest_wait_seconds=3.0))
    assert len(made) == 5
    for wait, expected in zip(waits, (1, 2, 3, 3), strict=True):
        assert 0.75 * expected <= wait <= min(1.25 * expected, 3)


def test_retry_after_lengthens_the_wait_and_ends_retries_if_too_long(waits):
    for seconds, expected in (("7", 2), ("999", 1)):
        made = []
        error = hub_error(errors.HfHubHTTPError, 429, **{"Retry-After": seconds})
        with pytest.raises(errors.HfHubHTTPError):
            with_retries(fail_with(error, made), Retries(2, 0.01, 60.0))
        assert len(made) == expected
    assert waits == [7.0]


def test_requests_have_a_timeout_at_every_try(waits):
    sessions = []

    def call():
        sessions.append(get_session().timeout.read)
        close_session()  # as the client does after a connection error
        raise ConnectionError

    with pytest.raises(ConnectionError):
        with_retries(call, Retries(2))
    assert sessions == [transfer.REQUEST_TIMEOUT_SECONDS] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tries": 0}, "tries must be an integer of at least 1, got 0"),
        ({"tries": True}, "tries must be an integer of at least 1, got True"),
        ({"first_wait_seconds": -1}, r"first_wait_seconds must be a finite number in \[0, 60.0\], got -1"),
        ({"first_wait_seconds": 61}, r"first_wait_seconds must be a finite number in \[0, 60.0\], got 61"),
        ({"longest_wait_seconds": float("inf")}, "longest_wait_seconds must be a finite number"),
    ],
)
def test_retries_check_their_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Retries(**arguments)
