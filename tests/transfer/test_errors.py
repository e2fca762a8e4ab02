"""Which errors of the Hub are transient, and their explanations, without a Hub (tests/hub has one)."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from ddpm_hf.transfer.answers import UnexpectedAnswer
from ddpm_hf.transfer.client import Abandoned, Stalled
from ddpm_hf.transfer.errors import BranchMoved, NotStored, explain_error, explained, is_transient, without_secrets


def hub_error(kind: type, status: int, token: str | None = None, **headers: str) -> errors.HfHubHTTPError:
    request = SimpleNamespace(headers={} if token is None else {"Authorization": f"Bearer {token}"})
    response = SimpleNamespace(status_code=status, headers=headers, request=request)
    return kind("a message\nof two lines", response=response, server_message="no")


def without_request(status: int) -> errors.HfHubHTTPError:
    """An error whose response has lost its request."""
    error = hub_error(errors.HfHubHTTPError, status)
    del error.response.request
    return error


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
    "not stored": NotStored("tag 'v1'"),
    "stalled": Stalled("no answer within 60 s"),
    "web page": hub_error(UnexpectedAnswer, 403),
    "unreadable": raised(KeyError("sha"), "huggingface_hub.hf_api"),
    "no JSON": raised(json.JSONDecodeError("Expecting value", "<html>", 0), "huggingface_hub.hf_api"),
    "hf_xet, no network": raised(ConnectionError("Network error"), "huggingface_hub.file_download"),
    "upload thread": caused(RuntimeError("Error while uploading 'a' to the Hub."), BUSY),
    "no cached copy": caused(errors.LocalEntryNotFoundError("none"), BUSY),
    "forced download": caused(ValueError("Force download failed"), BUSY),
    "hf_xet": raised(RuntimeError("Task error: 503"), "huggingface_hub.file_download"),
    "wrong size": raised(OSError("Consistency check failed"), "huggingface_hub.file_download"),
}
PERMANENT = {
    "abandoned": Abandoned("late"),
    "a key of this package": raised(KeyError("sha"), "ddpm_hf.hub.publish"),
    "a name that is none": raised(errors.HFValidationError("bad name"), "huggingface_hub.utils"),
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
        (hub_error(errors.HfHubHTTPError, 403), ["user/m"]),
        (PERMANENT["local files only"], ["no complete copy of user/m", "HF_HUB_OFFLINE unset"]),
        (OFFLINE, ["HF_HUB_OFFLINE is set", "user/m"]),
        (TRANSIENT["upload thread"], ["Error while uploading 'a' to the Hub: the Hub answered 503 for user/m"]),
        (BranchMoved(), ["kept committing to user/m"]),
        (NotStored("tag 'v1'"), ["user/m has no tag 'v1'", "try again"]),
        (TRANSIENT["stalled"], ["does not answer", "user/m", "60 s"]),
        (TRANSIENT["web page"], ["user/m", "a login page", "HF_ENDPOINT"]),
        (TRANSIENT["unreadable"], ["user/m", "KeyError: 'sha'"]),
        (TRANSIENT["hf_xet, no network"], ["closed the connection, for user/m", "Network error"]),
        (without_request(401), ["does not accept this token", "user/m"]),
    ],
)
def test_explanations_name_the_repository_and_the_remedy(error, words):
    text = str(explain_error(error, "user/m"))
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    "secret", ["hf_" + "a1" * 17, "Bearer abc.def", "https://me:pass@host/x", "http://h/x?sig=abc&e=1"]
)
def test_explanations_quote_no_secret(secret):
    error = raised(hub_error(errors.HfHubHTTPError, 500, "hf_0"), "huggingface_hub.hf_api")
    error.server_message = f"you sent '{secret}'."
    text = str(explain_error(error, "user/m"))
    assert "you sent" in text and not any(part in text for part in ("a1a1", "abc", "pass"))


def test_an_original_error_that_quotes_a_token_is_not_shown():
    for quoted, shown in (("hf_" + "a1" * 17, False), ("nothing", True)):
        with pytest.raises(ConnectionError) as raised_error, explained("user/m"):
            raise errors.HTTPError(f"Illegal header value {quoted}")
        assert "a1a1" not in str(raised_error.value)
        assert (raised_error.value.__cause__ is not None) == shown


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("a bad argument"), ZeroDivisionError()])
def test_errors_that_are_not_of_the_hub_stay_as_they_are(error):
    with pytest.raises(type(error)) as found, explained("user/m"):
        raise error
    assert found.value is error


def test_an_explained_error_is_explained_once():
    first = explain_error(hub_error(errors.HfHubHTTPError, 401, token="hf_0"), "user/m")
    second = explain_error(first, "user/m")
    assert (type(second), str(second)) == (type(first), str(first)) == (PermissionError, str(first))


def test_text_without_secrets_stays():
    text = "see https://huggingface.co/user/m/tree/main, or ask: why? a=b"
    assert without_secrets(text) == text
