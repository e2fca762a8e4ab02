"""What the Hub's answers must look like: a table of its endpoints with the parts of each answer that are read.

A login page of a network, a proxy or a damaged connection may answer in the Hub's place, also with status 200. The
client takes such an answer for the Hub's: it raises KeyError or TypeError, or believes that a tag was made.
"""

import json
import re
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

HASH, HASHES = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
NUMBER, FLAG = (int,), (bool,)  # of these types, and no other
REPOSITORY = r"/api/[a-z]+s/[^/]+(/[^/]+)?"
FILE = {
    "path": str,
    "size?": NUMBER,
    "oid?": HASHES,
    "type": re.compile("file|directory"),
    "lfs?": {"oid": HASHES, "size": NUMBER},
}
REF = {"name": str, "ref": str, "targetCommit": HASH}

# Method and path of the requests whose answers are read -> the shape of the JSON (see `fits`).
ANSWERS: dict[str, Any] = {
    r"GET /api/whoami-v2": {"name": str, "orgs?": [{"name": str}]},
    r"POST /api/repos/create": {"url": re.compile("https?://.+")},
    r"POST /api/validate-yaml": {"errors?": [dict], "warnings?": [dict]},
    rf"POST {REPOSITORY}/preupload/.+": {"files": [{"path": str, "uploadMode": re.compile("lfs|regular")}]},
    r"POST /.+\.git/info/lfs/objects/batch": {"objects": [{"oid": HASHES, "size": NUMBER, "actions?": dict}]},
    rf"GET {REPOSITORY}/xet-(read|write)-token/.+": {"casUrl?": str, "accessToken?": str, "exp?": NUMBER},
    rf"POST {REPOSITORY}/commit/.+": {"commitUrl": str, "commitOid": HASH, "pullRequestUrl?": str},
    rf"GET {REPOSITORY}/refs": {"branches": [REF], "tags": [REF], "pullRequests?": [REF]},
    rf"GET {REPOSITORY}/commits/.+": [{"id": HASH, "title": str, "message?": str, "date": str, "authors": [dict]}],
    rf"GET {REPOSITORY}/tree/.+": [FILE],
    rf"POST {REPOSITORY}/paths-info/.+": [FILE],
    rf"GET {REPOSITORY}(/revision/.+)?": {
        "id": str,
        "sha": HASH,
        "siblings": [{"rfilename": str}],
        "private?": FLAG,
    },
}
NEVER_EMPTY = re.compile(rf"GET {REPOSITORY}/tree/[^/]+")
CHECKED = {re.compile(pattern): shape for pattern, shape in ANSWERS.items()}
RETRIED = (408, 429, *range(500, 600))  # the Hub is too busy: its load balancers send these with a web page, too
IS_FILE = re.compile("(GET|HEAD) /.+/resolve/.+")


class UnexpectedAnswer(HfHubHTTPError):
    """Something that is not the Hub answered, or the answer was damaged. `problem` completes "the Hub answered with"."""

    def __init__(self, problem: str, *, response, server_message: str | None = None):
        super().__init__(problem, response=response, server_message=server_message)
        self.problem = problem


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape.

    A pattern or `str` stands for a string, a tuple of types for a value of exactly one of them, [shape] for a list of
    any length, a dict for an object with at least these keys, of which "key?" may be missing or null.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_has(value, key, expected) for key, expected in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(entry, shape[0]) for entry in value)
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    return type(value) in shape if isinstance(shape, tuple) else isinstance(value, shape)


def _has(value: dict, key: str, shape: Any) -> bool:
    name = key.rstrip("?")
    return (name != key and value.get(name) is None) or (name in value and fits(value[name], shape))


def expected_shape(method: str, path: str) -> Any | None:
    """The shape of the JSON that a request of the Hub's API is answered with; None if the answer is not read."""
    asked = f"{method} {path}"
    return next((shape for pattern, shape in CHECKED.items() if pattern.fullmatch(asked)), None)


def check_answer(response) -> None:
    """Raises UnexpectedAnswer for an answer that does not come from the Hub. The body of one that is JSON is read."""
    request, status = response.request, response.status_code
    asked = f"{request.method} {request.url.path}"
    shape = expected_shape(request.method, request.url.path)
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    is_from_hub = status in RETRIED or "X-Error-Code" in response.headers or (status < 400 and IS_FILE.fullmatch(asked))
    if kind == "text/html" and not is_from_hub:
        raise UnexpectedAnswer(f"a web page instead of data (status {status})", response=response)
    if status == 403 and re.search(b"signature", request.url.query, re.IGNORECASE):
        # The signature is too old, or came damaged: the Hub gives another one.
        raise UnexpectedAnswer("a signed address that its storage refuses (status 403)", response=response)
    if status >= 400:
        _check_error(response)
    elif request.method == "HEAD" and status == 200 and IS_FILE.fullmatch(asked):
        if "X-Repo-Commit" not in response.headers:
            raise UnexpectedAnswer("no commit of the file", response=response)
    elif shape is not None:
        value = _json(response)
        if not fits(value, shape):
            raise UnexpectedAnswer("JSON that it never sends, or a part of it", response=response)
        if (NEVER_EMPTY.fullmatch(asked) and not value) or response.links.get("next", {}).get("url") == str(
            request.url
        ):
            raise UnexpectedAnswer("an empty or endless list of files", response=response)


def _json(response) -> Any:
    response.read()
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as error:
        raise UnexpectedAnswer("something that is no JSON", response=response) from error


def _check_error(response) -> None:
    """The client expects an object in errors with JSON, and fails itself if there is something else."""
    response.read()
    try:
        value = json.loads(response.content)
    except (UnicodeDecodeError, RecursionError) as error:
        raise UnexpectedAnswer(f"status {response.status_code} and no text", response=response) from error
    except ValueError:
        return  # text, or XML of a storage
    if response.request.method != "HEAD" and not fits(value, {"errors?": [dict]}):
        raise UnexpectedAnswer(f"status {response.status_code} and JSON that it never sends", response=response)
