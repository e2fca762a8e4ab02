"""The shapes of the Hub's answers; tests/hub/test_wrong_answers.py sends others to the real client."""

import re

import pytest
from huggingface_hub.utils import httpx

from ddpm_hf.transfer.answers import UnexpectedAnswer, check_answer, expected_shape, fits

SHA = "0" * 40
INFO = {"id": "u/m", "sha": SHA, "siblings": [{"rfilename": "README.md"}], "private": False, "tags": []}
TREE = [{"type": "file", "path": "a", "size": 1, "oid": SHA, "lfs": {"oid": "0" * 64, "size": 1}, "xetHash": None}]
URL = "https://huggingface.co"


def answer(method: str, path: str, status: int = 200, **content) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request(method, URL + path), **content)


@pytest.mark.parametrize(
    "value, shape, expected",
    [
        ({"a": 1, "b": None}, {"a": (int,)}, True),
        ({"a": True}, {"a": (int,)}, False),
        ({}, {"a?": str}, True),
        ({"a": None}, {"a?": str}, True),
        ({"a": 1}, {"a?": str}, False),
        ([], [str], True),
        (["a", 1], [str], False),
        ({"a": "x"}, [dict], False),
        ("abc", re.compile("[a-c]+"), True),
        ("abcd", re.compile("[a-c]+"), False),
        (None, {"a?": str}, False),
    ],
)
def test_fits_compares_values_with_shapes(value, shape, expected):
    assert fits(value, shape) == expected


@pytest.mark.parametrize(
    "method, path, content",
    [
        ("GET", "/api/models/u/m", INFO),
        ("GET", "/api/models/gpt2", INFO),
        ("GET", "/api/models/u/m/revision/refs/pr/1", INFO),
        ("GET", f"/api/datasets/u/m/tree/{SHA}", TREE),
        ("POST", f"/api/models/u/m/paths-info/{SHA}", []),
        ("GET", "/api/models/u/m/refs", {"branches": [], "tags": [], "converts": []}),
        ("POST", "/api/models/u/m/commit/main", {"commitUrl": "x", "commitOid": SHA}),
    ],
)
def test_answers_of_the_hub_pass_and_others_do_not(method, path, content):
    assert expected_shape(method, path) is not None
    check_answer(answer(method, path, json=content))
    for other in ("x", None, 5, {"error": "no"}):
        with pytest.raises(UnexpectedAnswer):
            check_answer(answer(method, path, json=other))


@pytest.mark.parametrize(
    "response",
    [
        answer("POST", "/api/models/u/m/tag/main", json=None),
        answer("PUT", "/bucket/key", content=b""),
        answer("GET", "/u/m/resolve/main/page.html", html="<html>"),
        answer("HEAD", "/u/m/resolve/main/a", headers={"X-Repo-Commit": SHA}),
        answer("HEAD", "/u/m/resolve/main/a", 302, headers={"Location": "/renamed/m/resolve/main/a"}),
        answer("GET", "/api/models/u/m", 404, html="<html>", headers={"X-Error-Code": "RepoNotFound"}),
        answer("GET", "/api/models/u/m", 503, html="<html>busy"),
        answer("PUT", "/bucket/key", 400, text="<Error><Code>BadDigest</Code></Error>"),
    ],
)
def test_what_the_hub_and_its_storage_may_send_passes(response):
    check_answer(response)


@pytest.mark.parametrize(
    "response, problem",
    [
        (answer("POST", "/api/models/u/m/tag/main", html="<html>"), "web page"),
        (answer("PUT", "/bucket/key", html="<html>"), "web page"),
        (answer("GET", "/api/models/u/m", 403, html="<html>"), "web page instead of data (status 403)"),
        (answer("HEAD", "/u/m/resolve/main/a"), "no commit"),
        (answer("GET", f"/api/models/u/m/tree/{SHA}", json=[]), "empty"),
        (
            answer(
                "GET",
                f"/api/models/u/m/tree/{SHA}",
                json=TREE,
                headers={"Link": f'<{URL}/api/models/u/m/tree/{SHA}>; rel="next"'},
            ),
            "endless",
        ),
        (answer("GET", "/api/models/u/m", 500, json=[1]), "status 500 and JSON"),
        (answer("PUT", "/bucket/key?X-Amz-Signature=0", 403, text="<Error/>"), "signed address"),
    ],
)
def test_what_the_hub_never_sends_is_named(response, problem):
    with pytest.raises(UnexpectedAnswer) as error:
        check_answer(response)
    assert problem in error.value.problem and error.value.response is response
