"""Uploads and downloads with a Hub that does not answer, or answers with what the Hub never sends.

Every endpoint with half of the faults for ever, and with a third of them once, others at each, with the real client: the
call succeeds, and the Hub holds what it says, or the error is one sentence that names the repository.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hub import Fault, HubServer
from tests.hub.server import Answer
from tests.hub.test_faults import TABLES, Bench, LoadBench, calls, make_pipeline

PAGE = {"Content-Type": "text/html; charset=utf-8"}
LOGIN = b"<!DOCTYPE html><html><title>Log in</title><body>Wi-Fi</body></html>"
JSON = {"Content-Type": "application/json"}
FOR_EVER = 10_000


def with_body(body: bytes):
    """The true answer of the Hub, with another body."""
    return lambda answer: replace(answer, body=body, headers={**answer.headers, "Content-Length": str(len(body))})


def truncated(answer: Answer) -> Answer:
    return replace(answer, body=answer.body[: len(answer.body) // 2])


def renamed(answer: Answer) -> Answer:
    """JSON whose keys have other names, inside lists too."""
    return replace(answer, body=re.sub(rb'"(\w+)":', rb'"x_\1":', answer.body))


ANSWERS = {
    "HTML with 200": {"instead": Answer(200, LOGIN, PAGE)},
    "HTML with 502": {"instead": Answer(502, LOGIN, PAGE)},
    "HTML with 403": {"instead": Answer(403, LOGIN, PAGE)},
    "list with 500": {"instead": Answer(500, b"[1]", JSON)},
    "list": {"alters": with_body(b'[["a"]]')},
    "object": {"alters": with_body(b"{}")},
    "null": {"alters": with_body(b"null")},
    "other keys": {"alters": renamed},
    "truncated": {"alters": truncated},
    "no text": {"alters": with_body(b"\xff\xfe{}")},
    "too deep": {"alters": with_body(b"[" * 100_000)},
    "flipped byte": {"flips": True},
}
SILENCE = {
    "never answers": {"hangs": "silent"},
    "headers and no more": {"hangs": "headers"},
    "a byte per second": {"hangs": "slow"},
}
EMPTY = {"empty tree": {"alters": with_body(b"[]")}}
# The answers of files are their content, and those of HEAD have no body.
OF_FILES = {name: ANSWERS[name] for name in ("HTML with 200", "HTML with 502", "truncated", "flipped byte")}
OF_HEAD = {name: ANSWERS[name] for name in ("HTML with 200", "HTML with 502")}
OF_XET = {name: ANSWERS[name] for name in ("HTML with 200", "HTML with 502", "null")} | {
    "never answers": SILENCE["never answers"]
}


def columns(endpoint: str) -> dict:
    if endpoint.startswith("Xet"):
        return OF_XET
    if endpoint.endswith("metadata"):
        return OF_HEAD | {"never answers": SILENCE["never answers"]}
    if endpoint in ("old card", "file", "LFS file"):
        return OF_FILES | SILENCE
    return ANSWERS | SILENCE | (EMPTY if endpoint == "tree" else {})


def run(what: str, tmp: Path, times: int) -> Bench:
    kind, transport = what.split(", ")
    # A token that was revoked after the first requests is not tried again.
    more = {"revoked token": {"status": 401}} if times == FOR_EVER else {}
    every = 2 if times == FOR_EVER else 3
    table = {}
    for i, (endpoint, (pattern, _)) in enumerate(TABLES[what].items()):
        faults = list((columns(endpoint) | more).items())[i % every :: every]
        table[endpoint] = (pattern, {name: fault | {"times": times} for name, fault in faults})
    options = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "TRIES": "2" if times == FOR_EVER else "5"}
    with HubServer() as hub:
        bench = (Bench if kind == "publish" else LoadBench)(hub, tmp, table, transport, **options)
        if what == "load, xet":
            bench.upload()
        return bench.run()


def is_complete(bench: Bench, i: int, case: tuple[str, str]) -> bool:
    """Whether what a call says it has done is done."""
    outcome, files = bench.outcomes[case], bench.files[case]
    if "folder" in outcome:
        return all((Path(outcome["folder"]) / name).read_bytes() == data for name, data in files.items())
    repo = bench.hub.repo(f"u{i}/m")
    stored = {name: data for name, data in repo.contents().items() if name != "README.md"}
    return stored == files and repo.tags == {"v1": repo.at().oid} and outcome["commit"] == repo.at().oid


def is_sentence(bench: Bench, i: int, error: str) -> bool:
    kind, _, text = error.partition(": ")
    documented = ("OSError", "PermissionError", "FileNotFoundError", "ConnectionError", "TimeoutError", "ValueError")
    return kind in documented and f"u{i}/m" in text and "\n" not in text and text.endswith(".")


@pytest.fixture(scope="module", params=TABLES)
def once(request, tmp_path_factory) -> Bench:
    return run(request.param, tmp_path_factory.mktemp("once"), 1)


@pytest.fixture(scope="module", params=TABLES)
def for_ever(request, tmp_path_factory) -> Bench:
    return run(request.param, tmp_path_factory.mktemp("ever"), FOR_EVER)


def test_a_wrong_answer_or_none_is_asked_again(once):
    wrong = {}
    for i, case in enumerate(once.cases):
        outcome = once.outcomes[case]
        if "error" in outcome or not is_complete(once, i, case):
            wrong[case] = outcome
    assert wrong == {}, "\n".join(f"{case}: {outcome}" for case, outcome in wrong.items())


def test_wrong_answers_for_ever_end_in_a_sentence(for_ever):
    wrong = {}
    for i, case in enumerate(for_ever.cases):
        outcome = for_ever.outcomes[case]
        fine = is_sentence(for_ever, i, outcome["error"]) if "error" in outcome else is_complete(for_ever, i, case)
        if case[1] == "revoked token" and not case[0].startswith("Xet"):
            fine &= outcome["error"].startswith("PermissionError")
        if not fine:
            wrong[case] = outcome
    assert wrong == {}, "\n".join(f"{case}: {outcome}" for case, outcome in wrong.items())


def test_success_of_a_portal_makes_no_tag_and_no_branch(tmp_path):
    """The answer to the request that makes a name is not read, so a portal's JSON looks like success."""
    portal = {"instead": Answer(200, b'{"ok": true}', JSON)}
    with HubServer() as hub:
        asked = []
        for name, path, times in (("t", "tag", 99), ("b", "branch", 99), ("t1", "tag", 1), ("b1", "branch", 1)):
            token = hub.add_user(name)
            hub.faults.append(Fault(f"POST .*/{name}/m/{path}/", times=times, **portal))
            make_pipeline(tmp_path / name, seed=0)
            options = {"folder": str(tmp_path / name), "token": token, "tag": "v1", "revision": "other"}
            asked.append({"call": "publish", "repo_id": f"{name}/m"} | options)
        tag, branch, tag_once, branch_once = calls(hub, tmp_path, "lfs", asked, TRIES="2")
        assert "reported success, but t/m has no tag 'v1': try again" in tag["error"]
        assert "reported success, but b/m has no branch 'other': try again" in branch["error"]
        for name, outcome in (("t1", tag_once), ("b1", branch_once)):
            repo = hub.repo(f"{name}/m")
            assert repo.tags == {"v1": outcome["commit"]} and repo.branches["other"] == outcome["commit"], outcome


def test_a_branch_that_keeps_moving_is_said_in_a_sentence(tmp_path):
    with HubServer() as hub:
        hub.faults.append(Fault("POST .*/user/m/commit/", status=412, times=99))
        make_pipeline(tmp_path / "m", seed=0)
        asked = {"call": "publish", "repo_id": "user/m", "folder": str(tmp_path / "m"), "token": hub.add_user("user")}
        (outcome,) = calls(hub, tmp_path, "lfs", [asked])
    assert outcome == {"error": "OSError: other clients kept committing to user/m: try again later."}


def test_an_empty_list_of_files_in_the_cache_is_asked_for_again(tmp_path):
    with HubServer() as hub:
        files = make_pipeline(tmp_path / "m", seed=0)
        commit = hub.add_repo("user/m", files).at().oid
        asked = {
            "call": "load",
            "repo_id": "user/m",
            "token": hub.add_user("user"),
            "cache_dir": str(tmp_path / "cache"),
        }
        trees = tmp_path / "cache/models--user--m/trees"
        trees.mkdir(parents=True)
        (trees / f"{commit}.json").write_text('{"format_version": 1, "files": {}}')
        (outcome,) = calls(hub, tmp_path, "lfs", [asked])
    assert {name: (Path(outcome["folder"]) / name).read_bytes() for name in files} == files
