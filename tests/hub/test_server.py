"""The Hub server for the tests, tested with plain HTTP requests."""

import base64
import hashlib
import http.client
import json
import time
from urllib.parse import urlsplit

import pytest

from tests.hub import Fault, HubServer

WEIGHTS = b"\0" + bytes(range(200))


@pytest.fixture
def hub():
    with HubServer() as server:
        server.token = server.add_user("user")
        server.add_repo("user/open", {"a/b/c.txt": b"text", "a/w.safetensors": WEIGHTS, "top.txt": b"0123456789"})
        server.add_repo("user/closed", {"top.txt": b"secret"}, private=True)
        yield server


def ask(hub, method: str, path: str, content=None, token: str | None = "", **headers: str):
    """Status, headers and body; the user's token unless another one, or None, is given. `path` may be an address."""
    url = urlsplit(path if "://" in path else hub.endpoint + path)
    connection = http.client.HTTPConnection(url.netloc, timeout=10)
    if token is not None:
        headers["Authorization"] = f"Bearer {token or hub.token}"
    body = content if content is None or isinstance(content, bytes) else json.dumps(content)
    connection.request(method, f"{url.path}?{url.query}", body, headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    is_json = answer.headers.get("Content-Type") == "application/json" and data
    return answer.status, answer.headers, json.loads(data) if is_json else data


def commit(hub, repo_id: str, *items: tuple[str, dict], revision: str = "main", query: str = "", **header: str):
    lines = [("header", {"summary": "A change", **header}), *items]
    body = b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)
    return ask(hub, "POST", f"/api/models/{repo_id}/commit/{revision}?{query}", body)


def text_file(path: str, text: bytes) -> tuple[str, dict]:
    return "file", {"path": path, "content": base64.b64encode(text).decode(), "encoding": "base64"}


def test_a_private_repository_is_not_found_by_other_users(hub):
    other = hub.add_user("other")
    for repo_id in ("user/closed", "user/none"):
        for path in (f"/api/models/{repo_id}", f"/{repo_id}/resolve/main/top.txt"):
            status, headers, body = ask(hub, "GET", path, token=other)
            assert (status, headers["X-Error-Code"], body["error"]) == (404, "RepoNotFound", "Repository not found")
            assert ask(hub, "GET", path, token=None)[0] == 401
    assert ask(hub, "GET", "/user/closed/resolve/main/top.txt")[2] == b"secret"


def test_only_the_owner_commits_and_any_user_opens_pull_requests(hub):
    other = hub.add_user("other")
    owner, hub.token = hub.token, other
    assert commit(hub, "user/open", text_file("x", b"x"))[0] == 403
    assert commit(hub, "user/open", text_file("x", b"x"), query="create_pr=1")[2]["pullRequestUrl"].endswith("/1")
    hub.token = owner
    assert "x" not in hub.repo("user/open").contents()
    assert hub.repo("user/open").contents("refs/pr/1")["x"] == b"x"


def test_a_commit_adds_and_deletes_files_and_keeps_the_rest(hub):
    status, _, answer = commit(
        hub,
        "user/open",
        text_file("new.txt", b"new"),
        ("deletedFile", {"path": "top.txt"}),
        ("deletedFolder", {"path": "a/b/"}),
    )
    assert status == 200
    assert hub.repo("user/open").at().oid == answer["commitOid"]
    assert hub.repo("user/open").contents() == {"new.txt": b"new", "a/w.safetensors": WEIGHTS}


def test_an_invalid_commit_changes_nothing(hub):
    repo = hub.repo("user/open")
    head = repo.at().oid
    new = text_file("new.txt", b"new")
    lfs = ("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 1})
    assert commit(hub, "user/open", new, lfs)[0] == 400
    assert commit(hub, "user/open", new, ("deletedFile", {"path": "none"}))[1]["X-Error-Code"] == "EntryNotFound"
    assert commit(hub, "user/open", new, revision="none")[1]["X-Error-Code"] == "RevisionNotFound"
    assert commit(hub, "user/open", new, parentCommit="0" * 40)[0] == 412
    assert repo.at().oid == head
    assert commit(hub, "user/open", new, parentCommit=head)[0] == 200


def test_branches_and_tags_point_to_commits(hub):
    repo, api = hub.repo("user/open"), "/api/models/user/open"
    first = repo.at().oid
    assert ask(hub, "POST", f"{api}/tag/main", {"tag": "v1"})[0] == 200
    assert ask(hub, "POST", f"{api}/tag/main", {"tag": "v1"})[0] == 409
    assert ask(hub, "POST", f"{api}/branch/step%2F20", {})[0] == 200
    second = commit(hub, "user/open", text_file("new.txt", b"new"), revision="step%2F20")[2]["commitOid"]
    refs = ask(hub, "GET", f"{api}/refs")[2]
    assert {b["name"]: b["targetCommit"] for b in refs["branches"]} == {"main": first, "step/20": second}
    assert {t["ref"]: t["targetCommit"] for t in refs["tags"]} == {"refs/tags/v1": first}
    assert [c["id"] for c in ask(hub, "GET", f"{api}/commits/step%2F20")[2]][:2] == [second, first]
    for name in ("v1", "main", first, first[:7]):
        assert ask(hub, "GET", f"{api}/revision/{name}")[2]["sha"] == first
    assert ask(hub, "DELETE", f"{api}/tag/v1")[0] == 200
    assert ask(hub, "GET", f"{api}/revision/v1")[1]["X-Error-Code"] == "RevisionNotFound"


def test_the_tree_lists_a_folder_recursively_or_not(hub):
    def paths(query: str) -> list[str]:
        return [entry["path"] for entry in ask(hub, "GET", f"/api/models/user/open/tree/main{query}")[2]]

    assert paths("") == ["a", ".gitattributes", "top.txt"]
    assert paths("/a") == ["a/b", "a/w.safetensors"]
    assert paths("?recursive=true") == ["a", "a/b", ".gitattributes", "a/b/c.txt", "a/w.safetensors", "top.txt"]


def test_information_on_paths_is_that_of_the_tree(hub):
    tree = ask(hub, "GET", "/api/models/user/open/tree/main?recursive=true")[2]
    asked = b"paths=a%2Fw.safetensors&paths=none&paths=top.txt&expand=False"
    found = ask(hub, "POST", "/api/models/user/open/paths-info/main", asked)[2]
    assert found == [entry for entry in tree if entry["path"] in ("a/w.safetensors", "top.txt")]
    assert found[0]["lfs"]["oid"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_large_files_are_on_another_port_and_small_ones_are_not(hub):
    status, headers, _ = ask(hub, "HEAD", "/user/open/resolve/main/a/w.safetensors")
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert (status, headers["X-Linked-Etag"], headers["X-Linked-Size"]) == (302, f'"{sha256}"', str(len(WEIGHTS)))
    assert headers["X-Repo-Commit"] == hub.repo("user/open").at().oid
    assert urlsplit(headers["Location"]).port != urlsplit(hub.endpoint).port
    assert ask(hub, "GET", headers["Location"], token=None)[2] == WEIGHTS
    assert ask(hub, "GET", f"{hub.storage}/{sha256}?signature=guessed", token=None)[0] == 403
    assert ask(hub, "PUT", hub.object_url("0" * 64), b"something else")[0] == 400
    status, headers, body = ask(hub, "GET", "/user/open/resolve/main/top.txt", Range="bytes=3-5")
    assert (status, headers["Content-Range"], body) == (206, "bytes 3-5/10", b"345")
    assert ask(hub, "GET", "/user/open/resolve/main/top.txt", Range="bytes=10-")[0] == 416


def test_a_fault_affects_matching_requests_as_often_as_given(hub):
    hub.faults.append(Fault("GET /api/whoami-v2", status=503, times=2))
    assert ask(hub, "GET", "/api/models/user/open")[0] == 200
    assert [ask(hub, "GET", "/api/whoami-v2")[0] for _ in range(3)] == [503, 503, 200]


@pytest.mark.parametrize("after_acting", [False, True])
def test_a_cut_connection_prevents_the_action_or_loses_the_response(hub, after_acting):
    hub.faults.append(Fault("POST .*/commit/", after_acting=after_acting))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        commit(hub, "user/open", text_file("new.txt", b"new"))
    assert ("new.txt" in hub.repo("user/open").contents()) == after_acting


def test_a_delay_alone_lets_the_request_succeed(hub):
    hub.faults.append(Fault("GET /api/whoami-v2", delay_seconds=0.2))
    started = time.monotonic()
    assert ask(hub, "GET", "/api/whoami-v2")[2]["name"] == "user"
    assert time.monotonic() - started >= 0.2


def test_a_stopped_server_answers_no_request():
    with HubServer() as hub:
        hub.token = hub.add_user("user")
        kept_alive = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
        kept_alive.request("GET", "/api/whoami-v2", headers={"Authorization": f"Bearer {hub.token}"})
        assert kept_alive.getresponse().read()
    kept_alive.auto_open = False
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        kept_alive.request("GET", "/api/whoami-v2")
        kept_alive.getresponse()
    with pytest.raises(ConnectionError):
        ask(hub, "GET", "/api/whoami-v2")
