"""Limits on the requests of huggingface_hub: each ends within a known time, with an answer of the Hub or an error.

The client shares one HTTP session, by default without any timeout. Its own retries multiply with those of `with_retries`,
and it waits as long as a server asks it to. `limit_requests` changes the session: requests that this package makes
(known by their User-Agent) have a time limit as a whole, their answers are checked (`ddpm_hf.transfer.answers`), and all retries
are left to `with_retries`. Requests of other libraries only get a timeout where they have none.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps

from huggingface_hub import HfApi, errors, get_session, get_token
from huggingface_hub.utils import _http, hf_raise_for_status, httpx

from ddpm_hf.transfer.answers import RETRIED, check_answer

# For a request, apart from the time that its data take. The variable is that of the client, where it is for downloads.
REQUEST_TIMEOUT_SECONDS = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 60)
SLOWEST_BYTES_PER_SECOND = 10_000
LIBRARY = "ddpm_hf"
POLL_SECONDS = 0.05

_abandoned = threading.Event()
_installing = threading.Lock()


class Stalled(errors.HTTPError):
    """A server that does not answer, or sends almost nothing. Not one of the errors after which the client asks again."""


class Abandoned(errors.HTTPError):
    """The wait for an upload is over (`abandon_requests`)."""


def hub_api(token: str | bool | None = None) -> HfApi:
    """An `HfApi` whose requests are limited. Raises ValueError for a token that cannot be sent."""
    check_token(token)
    limit_requests()
    return HfApi(token=token, library_name=LIBRARY)


def check_token(token: str | bool | None) -> None:
    """Raises ValueError for a token with characters that no header may hold. The message does not quote it: httpx would."""
    sent = token if isinstance(token, str) else (None if token is False else get_token())
    if sent is not None and re.fullmatch("[!-~]+", sent) is None:
        raise ValueError("token must be ASCII without spaces and line breaks: copy it again, or run `hf auth login`.")


def limit_requests() -> None:
    """Limit the requests of huggingface_hub's session, and of those that replace it after a connection error."""
    # hf_xet has a client of its own, which reads this when its first transfer starts.
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{math.ceil(REQUEST_TIMEOUT_SECONDS)}s")
    with _installing:
        session = get_session()
        if hasattr(session.send, "limited"):
            return
        # Not `set_client_factory`, which closes the session that other threads may be using.
        make, session.send = _http._GLOBAL_CLIENT_FACTORY, _limited(session.send)

        def factory():
            client = make()
            if not hasattr(client.send, "limited"):
                client.send = _limited(client.send)
            return client

        _http._GLOBAL_CLIENT_FACTORY = factory


@contextmanager
def abandon_requests() -> Iterator[None]:
    """End this package's requests of all threads with `Abandoned`, those that wait and new ones."""
    _abandoned.set()
    try:
        yield
    finally:
        _abandoned.clear()


def pause(seconds: float) -> None:
    """Sleep. Raises `Abandoned` as soon as requests are abandoned."""
    if _abandoned.wait(seconds):
        raise Abandoned("the upload was not finished in time")


def _limited(send: Callable) -> Callable:
    @wraps(send)
    def limited(request, *, stream: bool = False, **options):
        timeouts = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        limits = {kind: _shorter(timeouts.get(kind), REQUEST_TIMEOUT_SECONDS) for kind in kinds}
        request.extensions = {**request.extensions, "timeout": limits}
        if not _is_own(request):
            return send(request, stream=stream, **options)
        response = _in_time(lambda: send(request, stream=True, **options), request)
        response.stream = _LimitedStream(response.stream, request)
        try:
            check_answer(response)
            if response.status_code in RETRIED:
                response.read()
                hf_raise_for_status(response)
            if not stream:
                response.read()
        except BaseException:
            response.close()
            raise
        return response

    limited.limited = True
    return limited


def _shorter(timeout: float | None, limit: float) -> float:
    return limit if timeout is None else min(timeout, limit)


def _is_own(request) -> bool:
    # Data of large files go to another server, without the User-Agent of the client.
    return LIBRARY in request.headers.get("User-Agent", "") or request.method == "PUT"


def _in_time(send: Callable, request):
    """The answer of `send`, in a thread of its own: a server that sends a byte per second meets every timeout."""
    result: list = []
    done, given_up = threading.Event(), threading.Event()
    request.stream = body = _UploadedStream(request.stream, given_up)

    def work() -> None:
        try:
            response = send()
            result.append((response, None))
            if given_up.is_set():
                response.close()
        except BaseException as error:  # raised below
            result.append((None, error))
        finally:
            done.set()

    threading.Thread(target=work, name="hub request", daemon=True).start()
    start = time.monotonic()
    while not done.wait(POLL_SECONDS):
        limit = REQUEST_TIMEOUT_SECONDS + body.sent / SLOWEST_BYTES_PER_SECOND
        if _abandoned.is_set() or time.monotonic() > start + limit:
            given_up.set()
            pause(0)
            raise Stalled(f"no answer within {limit:.0f} s")
    response, error = result[0]
    if isinstance(error, httpx.TimeoutException):
        raise Stalled(f"no answer within {time.monotonic() - start:.0f} s") from error
    if error is not None:
        raise error
    return response


class _UploadedStream(httpx.SyncByteStream):
    """The body of a request. It stops being read once the request was given up: the next try reads the same file."""

    def __init__(self, stream, given_up: threading.Event):
        self.stream, self.given_up, self.sent = stream, given_up, 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.stream:
            if self.given_up.is_set():
                raise Stalled("given up")
            self.sent += len(chunk)
            yield chunk


class _LimitedStream(httpx.SyncByteStream):
    """The body of an answer. Raises `Stalled` if it comes too slowly, also where a connection is cut again and again."""

    def __init__(self, stream, request):
        self.stream, self.request = stream, request

    def __iter__(self) -> Iterator[bytes]:
        start, received = time.monotonic(), 0
        try:
            for chunk in self.stream:
                received += len(chunk)
                seconds = time.monotonic() - start
                if seconds > REQUEST_TIMEOUT_SECONDS + received / SLOWEST_BYTES_PER_SECOND:
                    raise Stalled(f"{received} bytes in {seconds:.0f} s")
                if _abandoned.is_set():
                    pause(0)
                yield chunk
        except errors.HTTPError as error:
            # The client continues such a download by itself, without end if each time a few bytes come.
            if isinstance(error, (Stalled, Abandoned)) or received > SLOWEST_BYTES_PER_SECOND:
                raise
            raise Stalled(f"{str(error) or type(error).__name__} after {received} bytes") from error

    def close(self) -> None:
        with suppress(errors.HTTPError):
            self.stream.close()
