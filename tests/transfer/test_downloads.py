"""Retries, without a Hub (tests/hub/test_faults.py has one)."""

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from ddpm_hf.transfer import downloads
from ddpm_hf.transfer.downloads import Retries, with_retries


def busy(seconds: str) -> errors.HfHubHTTPError:
    response = SimpleNamespace(status_code=429, headers={"Retry-After": seconds}, request=None)
    return errors.HfHubHTTPError("busy", response=response)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    found = []
    monkeypatch.setattr(downloads, "pause", found.append)
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
        error = busy(seconds)
        with pytest.raises(errors.HfHubHTTPError):
            with_retries(fail_with(error, made), Retries(2, 0.01, 60.0))
        assert len(made) == expected
    assert waits == [7.0]


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
