"""Limits on requests, with the real client and a Hub server on loopback."""

import threading
import time

import pytest
from huggingface_hub import HfApi, close_session, constants, errors, get_session
from huggingface_hub.utils import httpx

from ddpm_hf.transfer import client
from ddpm_hf.transfer.client import Abandoned, Stalled, abandon_requests, check_token, hub_api, limit_requests, pause
from tests.hub import Fault, HubServer

DEADLINE_SECONDS = 10


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(client, "REQUEST_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the server is on this machine
    with HubServer() as server:
        server.add_repo("u/m", {"a.txt": b"a"})
        yield server


def own(hub) -> HfApi:
    api = hub_api(token=False)
    api.endpoint = hub.endpoint
    return api


@pytest.fixture(autouse=True)
def deadline():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < DEADLINE_SECONDS


@pytest.mark.parametrize("hangs", ["silent", "headers", "slow"])
def test_a_request_without_an_answer_ends_within_its_time(hub, hangs):
    hub.faults.append(Fault("GET /api/models/u/m", hangs=hangs))
    with pytest.raises(Stalled):
        own(hub).model_info("u/m")
    assert own(hub).model_info("u/m").id == "u/m"
    assert len(hub.requests) == 2  # not tried again by the client


def test_the_requests_of_other_libraries_only_get_a_timeout(hub):
    limit_requests()
    hub.faults += [Fault("GET /api/models/u/m", hangs="silent"), Fault("GET /api/models/u/m", status=503)]
    other = HfApi(hub.endpoint, token=False)
    with pytest.raises(httpx.ReadTimeout):
        other.model_info("u/m")
    with pytest.raises(errors.HfHubHTTPError):
        other.model_info("u/m")


def test_limits_survive_a_session_that_the_client_replaces(hub):
    limit_requests()
    close_session()
    assert hasattr(get_session().send, "limited")
    limit_requests()
    assert not hasattr(get_session().send.__wrapped__, "limited")  # once


def test_the_client_does_not_wait_as_long_as_a_server_asks(hub):
    hub.faults.append(Fault("GET /api/models/u/m/tree", status=429, retry_after_seconds=900))
    with pytest.raises(errors.HfHubHTTPError):
        list(own(hub).list_repo_tree("u/m"))


def test_abandoned_requests_of_all_threads_end_at_once(hub, monkeypatch):
    monkeypatch.setattr(client, "REQUEST_TIMEOUT_SECONDS", 60)
    hub.faults.append(Fault("GET /api/models/u/m", hangs="silent"))
    found = []

    def ask() -> None:
        try:
            own(hub).model_info("u/m")
        except Abandoned as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not hub.requests and thread.is_alive():
        time.sleep(0.01)
    with abandon_requests():
        thread.join(5)
        with pytest.raises(Abandoned):
            pause(60)
    assert len(found) == 1
    assert own(hub).model_info("u/m").id == "u/m"


@pytest.mark.parametrize("token", ["hf_a\nb", "hf_ä", "hf_a b"])
def test_a_token_that_no_header_may_hold_is_refused_unquoted(token):
    with pytest.raises(ValueError, match="token must be ASCII") as error:
        check_token(token)
    assert token not in str(error.value)
    check_token(False)
    check_token("hf_abc")
