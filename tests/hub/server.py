"""The part of the Hub's HTTP interface that the client uses to upload and download.

    with HubServer() as hub:
        token = hub.add_user("user")
        run_client(HF_ENDPOINT=hub.endpoint, HF_TOKEN=token)
        hub.repo("user/name").contents()

`Api` is the Hub itself, with one method per route. `Storage` is the object store with the contents of LFS files. It has
its own port, because the client reads the metadata from the redirect to it, and follows redirects within one origin
without reading them. `Cas` is the storage of the Xet client.
"""

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.store import Blob, HubError, Repo
from tests.hub.xet import XetStore, chunk_places


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; `query` is decoded, `path` is not, names of headers are in lower case. `token` is
    None where none was sent."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def token(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def json(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"The body is no JSON: {error}") from error


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(content: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


@dataclass
class Fault:
    """A fault in the next `times` requests whose "METHOD /path user" matches the pattern. The user is "" if the request has
    no token.

    With `status`, the server responds with that error (and `retry_after_seconds`) and does nothing else. Otherwise it
    closes the connection: before it acts, after it acted but before it responds (`after_acting`), or in the middle of the
    request's body (`mid_upload`) or the response's (`mid_download`). `flips` inverts one bit of the response.
    `delay_seconds` waits first; without another field, the request then succeeds. `alters` changes the response, and
    `instead` sends another one without acting. `hangs` keeps the connection open: "silent" sends nothing, "headers" no body,
    "slow" a byte per second.
    """

    pattern: str
    status: int | None = None
    retry_after_seconds: int | None = None
    after_acting: bool = False
    mid_upload: bool = False
    mid_download: bool = False
    flips: bool = False
    delay_seconds: float = 0.0
    alters: Callable[["Answer"], "Answer"] | None = None
    instead: "Answer | None" = None
    hangs: str | None = None
    times: int = 1
    occurred: int = 0

    @property
    def cuts(self) -> bool:
        """Before or after the act; not in the middle."""
        others = self.delay_seconds or self.flips or self.mid_upload or self.mid_download
        others = others or self.alters or self.instead or self.hangs
        return self.status is None and (self.after_acting or not others)


class HubServer:
    """A Hub on three ports of 127.0.0.1. `requests` lists all requests so far; `faults` are those to come."""

    def __init__(self):
        self.lock = threading.RLock()
        self.users: dict[str, str] = {}  # token -> name
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content
        self.xet = XetStore()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.secret = secrets.token_bytes(16)
        self._servers = [_Server(self, handler) for handler in (Api, Storage, Cas)]
        self.endpoint, self.storage, self.cas = [f"http://127.0.0.1:{s.server_port}" for s in self._servers]

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add_user(self, name: str) -> str:
        """Add a user with write access to their own repositories; returns a token."""
        token = "hf_" + secrets.token_hex(17)
        self.users[token] = name
        return token

    def add_repo(self, id: str, files: Mapping[str, bytes] = (), kind: str = "models", private: bool = False) -> Repo:
        """A repository; an error if it is there already."""
        with self.lock:
            if (kind, id) in self.repos:
                raise HubError(409, "You already created this repo", url=self.url(kind, id))
            repo = self.repos[kind, id] = Repo(kind, id, private)
            if files:
                repo.add(files)
            return repo

    def repo(self, id: str, kind: str = "models") -> Repo:
        return self.repos[kind, id]

    def url(self, kind: str, id: str) -> str:
        return f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{id}"

    def object_url(self, sha256: str, **query: str) -> str:
        """Where in the storage a content is read or written; the signature stands for the right to do so."""
        options = "".join(f"&{k}={quote(v)}" for k, v in query.items())
        return f"{self.storage}/{sha256}?signature={self.signature(sha256)}{options}"

    def signature(self, sha256: str) -> str:
        return hmac.new(self.secret, sha256.encode(), "sha256").hexdigest()

    def fault(self, method: str, path: str, authorization: str = "") -> Fault | None:
        asked = f"{method} {path} {self.users.get(authorization.removeprefix('Bearer '), '')}"
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, asked):
                    fault.times -= 1
                    fault.occurred += 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, handler: type):
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self.open: set[socket.socket] = set()

    def get_request(self):
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that hang up are expected
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Close the kept-alive connections too, so that a stopped server answers no request."""
        super().server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Slow:
    """A stream that writes a byte per second."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, data: bytes) -> None:
        for byte in data:
            self.stream.write(bytes([byte]))
            self.stream.flush()
            time.sleep(1)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request and sends the response of `answer`, altered by a fault if one matches."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet an answer
    timeout = 60

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.hub.fault(self.command, url.path, headers.get("authorization", ""))
        if fault and fault.mid_upload:
            self.rfile.read(max(1, int(headers.get("content-length", 2)) // 2))
            return self._cut()
        request = Request(self.command, url.path, query, headers, b"".join(self._body()))
        self.hub.requests.append(request)
        if fault:
            time.sleep(fault.delay_seconds)
            if fault.status:
                wait = {} if fault.retry_after_seconds is None else {"Retry-After": str(fault.retry_after_seconds)}
                return self._send(json_answer({"error": "This is a fault made on purpose."}, fault.status, **wait))
            if fault.cuts and not fault.after_acting:
                return self._cut()
            if fault.instead:
                return self._send(fault.instead)
            if fault.hangs == "silent":
                return self._wait_until_closed()
        try:
            answer = self.answer(request)
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            answer = json_answer({"error": error.message, **error.body}, error.status, **headers)
        if fault and fault.cuts:
            return self._cut()
        if fault and fault.flips and answer.body:
            middle = len(answer.body) // 2
            flipped = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]
            answer = Answer(answer.status, flipped, answer.headers)
        if fault and fault.alters:
            answer = fault.alters(answer)
        if fault and fault.hangs == "headers":
            self._send(answer, only_headers=True)
            return self._wait_until_closed()
        if fault and fault.hangs == "slow":
            self.wfile = _Slow(self.wfile)
        self._send(answer, only_half=bool(fault and fault.mid_download))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _wait_until_closed(self) -> None:
        """Until the client, or the server's end, closes the connection."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.settimeout(None)
        with contextlib.suppress(OSError):
            while self.connection.recv(1024):
                pass

    def _send(self, answer: Answer, only_half: bool = False, only_headers: bool = False) -> None:
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and not only_headers:
            self.wfile.write(answer.body[: len(answer.body) // 2 if only_half else None])
        if only_half:
            self.wfile.flush()
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_) -> None:
        """Silent: tests look at `HubServer.requests`."""


# ------------------------------------------------------------------ the Hub

ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable:
    """The call that a request is: the first route whose method and whole path match. Parts that the pattern names
    are handed over decoded, after the request; those that name a repository as the repository itself."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Api(_Handler):
    def answer(self, request: Request) -> Answer:
        if request.token is not None and request.token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        for method, pattern, function in ROUTES:
            if method in (request.method, "GET" if request.method == "HEAD" else None):
                match = pattern.fullmatch(request.path)
                if match:
                    parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                    if "id" in parts:
                        repo = self._repo(request, parts.pop("kind", "models"), parts.pop("id"))
                        return function(self, request, repo, **parts)
                    return function(self, request, **parts)
        raise HubError(404, f"This server does not know {request.method} {request.path}")

    def _user(self, request: Request) -> str:
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        return self.hub.users[request.token]

    def _repo(self, request: Request, kind: str, id: str) -> Repo:
        """The repository, if the user may know of it: a private one of somebody else is not there, like none at all."""
        user = self.hub.users.get(request.token)
        repo = self.hub.repos.get((kind, id))
        if repo is None or (repo.private and user != repo.owner):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repo.gated and user != repo.owner and user not in repo.let_in and "/api/" not in request.path:
            raise HubError(403 if user else 401, f"Access to {kind[:-1]} {id} is restricted.", "GatedRepo")
        is_upload = re.search(r"/(commit|branch|tag|xet-write-token)/|/info/lfs/", request.path) and (
            request.method != "GET" or "xet-write" in request.path
        )
        opens_pull_request = "create_pr" in request.query and user is not None
        if is_upload and user != repo.owner and not opens_pull_request:
            # LFS contents come before the commit that says what becomes of them: anyone known may bring some.
            if user is None:
                raise HubError(401, "Invalid username or password.")
            if "/info/lfs/" not in request.path:
                raise HubError(403, f"You don't have the rights to write to {repo.id}")
        return repo

    # -------------------------------------------------------------- people and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        name = self._user(request)
        return json_answer(
            {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": {"type": "access_token"}}
        )

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        user, asked = self._user(request), request.json()
        owner = asked.get("organization") or user
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind = asked.get("type", "model") + "s"
        private = asked.get("private") or asked.get("visibility") == "private"
        repo = self.hub.add_repo(f"{owner}/{asked['name']}", kind=kind, private=bool(private))
        return json_answer({"url": self.hub.url(kind, repo.id), "name": repo.id})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        """Only that there is a closed block of metadata: what YAML is, the standard library does not know."""
        content = request.json()["content"]
        if re.match(r"---\r?\n(.*\n)?---\s", content + "\n", re.DOTALL):
            return json_answer({"errors": [], "warnings": []})
        if content.startswith("---"):
            errors = [{"message": "the block of metadata is not closed"}]
            return json_answer({"errors": errors, "warnings": []}, 400)
        return json_answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})

    # -------------------------------------------------------------- uploading

    @route("POST", REPO + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Request, repo: Repo, revision: str) -> Answer:
        there = repo.at(revision).files
        files = []
        for asked in request.json()["files"]:
            path = asked["path"]
            is_lfs = repo.goes_to_lfs(path, asked["size"], base64.b64decode(asked["sample"]), revision)
            mode = "lfs" if is_lfs else "regular"
            oid = {"oid": there[path].etag} if path in there else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return json_answer({"files": files})

    @route("POST", PAGE + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo: Repo) -> Answer:
        objects = []
        for asked in request.json()["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                verify = f"{self.hub.url(repo.kind, repo.id)}.git/info/lfs/objects/verify"
                upload = self.hub.object_url(asked["oid"])
                found["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(found)
        return json_answer({"transfer": "basic", "objects": objects})

    @route("POST", PAGE + r"\.git/info/lfs/objects/verify")
    def lfs_verify(self, request: Request, repo: Repo) -> Answer:
        asked = request.json()
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, f"Object {asked['oid']} was not uploaded")
        return json_answer({"message": "ok"})

    @route("POST", REPO + "/commit/(?P<revision>[^/]+)")
    def commit(self, request: Request, repo: Repo, revision: str) -> Answer:
        header, changes, deleted = {}, {}, []
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                try:
                    changes[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), False)
                except binascii.Error as error:
                    raise HubError(400, f"{value['path']} is not base64: {error}") from error
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                changes[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif key in ("deletedFile", "deletedFolder"):
                deleted.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
            else:
                raise HubError(400, f"This server does not know the operation {key!r}")
        if not header.get("summary"):
            raise HubError(400, "A commit needs a header with a summary")
        commit, number = repo.commit(
            changes,
            header["summary"],
            header.get("description", ""),
            revision,
            deleted,
            header.get("parentCommit"),
            as_pull_request="create_pr" in request.query,
        )
        url = self.hub.url(repo.kind, repo.id)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        return json_answer(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if number else {}))

    @route("GET", REPO + "/xet-(?P<scope>read|write)-token/(?P<revision>.+)")
    def xet_token(self, request: Request, repo: Repo, scope: str, revision: str) -> Answer:
        token, expires = f"xet-{scope}-{self.hub.signature(scope)}", int(time.time()) + 3600
        cas = f"{self.hub.cas}/{repo.kind}/{repo.id}"  # so that its requests tell whose they are
        body = {"casUrl": cas, "accessToken": token, "exp": expires}
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return json_answer(body, **headers)

    # -------------------------------------------------------------- names

    @route("POST", REPO + "/branch/(?P<name>.+)")
    def create_branch(self, request: Request, repo: Repo, name: str) -> Answer:
        repo.name(repo.branches, name, request.json().get("startingPoint", "main"))
        return json_answer({})

    @route("DELETE", REPO + "/branch/(?P<name>.+)")
    def delete_branch(self, request: Request, repo: Repo, name: str) -> Answer:
        return self._delete(repo.branches, name)

    @route("POST", REPO + "/tag/(?P<revision>.+)")
    def create_tag(self, request: Request, repo: Repo, revision: str) -> Answer:
        repo.name(repo.tags, request.json()["tag"], revision)
        return json_answer({})

    @route("DELETE", REPO + "/tag/(?P<name>.+)")
    def delete_tag(self, request: Request, repo: Repo, name: str) -> Answer:
        return self._delete(repo.tags, name)

    @staticmethod
    def _delete(names: dict[str, str], name: str) -> Answer:
        if names.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return json_answer({})

    @route("GET", REPO + "/refs")
    def refs(self, request: Request, repo: Repo) -> Answer:
        def listed(names: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": n, "ref": prefix + n, "targetCommit": oid} for n, oid in names.items()]

        answer = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/")}
        if "include_prs" in request.query:
            answer["pullRequests"] = listed(repo.pull_requests, "")
        return json_answer({**answer, "converts": []})

    @route("GET", REPO + "/commits/(?P<revision>[^/]+)")
    def commits(self, request: Request, repo: Repo, revision: str) -> Answer:
        authors = [{"user": repo.owner}]
        return json_answer(
            [
                {"id": c.oid, "title": c.title, "message": c.description, "date": c.date, "authors": authors}
                for c in repo.history(revision)
            ]
        )

    # -------------------------------------------------------------- reading

    @route("GET", REPO + "(?:/revision/(?P<revision>[^/]+))?")
    def info(self, request: Request, repo: Repo, revision: str = "main") -> Answer:
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        answer = {"id": repo.id, "author": repo.owner, "sha": commit.oid, "siblings": siblings, "tags": []}
        return json_answer(
            {**answer, "private": repo.private, "gated": "auto" if repo.gated else False, "lastModified": commit.date}
        )

    @route("GET", REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, request: Request, repo: Repo, revision: str, folder: str = "") -> Answer:
        commit = repo.at(revision)
        prefix = folder.rstrip("/") + "/" if folder else ""
        is_recursive = request.query.get("recursive", "").lower() in ("1", "true")
        folders, files = {}, []
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parents = [path[:i] for i, c in enumerate(path) if c == "/" and i >= len(prefix)]
            for parent in parents[: None if is_recursive else 1]:
                oid = hashlib.sha1(parent.encode()).hexdigest()
                folders[parent] = {"type": "directory", "path": parent, "size": 0, "oid": oid}
            if is_recursive or not parents:
                files.append(self._file_entry(path, blob))
        if prefix and not folders and not files:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return json_answer([*folders.values(), *files])

    @route("POST", REPO + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, repo: Repo, revision: str) -> Answer:
        """Only of files; paths that do not exist are left out."""
        files = repo.at(revision).files
        paths = parse_qs(request.body.decode())["paths"]
        return json_answer([self._file_entry(path, files[path]) for path in paths if path in files])

    def _file_entry(self, path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
            if blob.sha256 in self.hub.xet.names:
                entry["xetHash"] = self.hub.xet.names[blob.sha256]
        return entry

    @route("GET", PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Answer:
        commit, blob = repo.file(revision, path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if not blob.is_lfs:
            return content_answer(blob.data, request, headers)
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        self.hub.objects.setdefault(blob.sha256, blob.data)
        if blob.sha256 in self.hub.xet.names:
            token = f"{self.hub.endpoint}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.oid}"
            linked |= {"X-Xet-Hash": self.hub.xet.names[blob.sha256], "Link": f'<{token}>; rel="xet-auth"'}
        return Answer(302, headers={**headers, **linked, "Location": self.hub.object_url(blob.sha256)})


def content_answer(data: bytes, request: Request, headers: Mapping[str, str]) -> Answer:
    """A file, or the part of it that `Range` asks for."""
    headers = {"Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not match:
        return Answer(200, data, headers)
    start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
    if start >= stop:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


# ------------------------------------------------------------------ the object store behind it


class Storage(_Handler):
    """`/<sha256>?signature=…`: PUT keeps a content, GET gives it back. Knows no tokens."""

    def answer(self, request: Request) -> Answer:
        sha256 = request.path.strip("/")
        if not hmac.compare_digest(request.query.get("signature", ""), self.hub.signature(sha256)):
            raise HubError(403, "The signature does not match")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != sha256:
                raise HubError(400, "The content is not the one it was announced to be")
            self.hub.objects[sha256] = request.body
            return Answer()
        if sha256 not in self.hub.objects:
            raise HubError(404, "There is no such object")
        return content_answer(self.hub.objects[sha256], request, {"ETag": f'"{sha256}"'})


# ------------------------------------------------------------------ the object store of Xet


class Cas(_Handler):
    """Knows the tokens that the Hub hands out for it, and none of the users'."""

    def answer(self, request: Request) -> Answer:
        method, xet = request.method, self.hub.xet
        repo, path = re.fullmatch("(/[^/]+/[^/]+/[^/]+)?(/.*)", request.path).groups()
        if match := re.fullmatch("/xorbs/([0-9a-f]{64})", path):
            if not hmac.compare_digest(request.query.get("signature", ""), self.hub.signature(match[1])):
                raise HubError(403, "The signature does not match")
            return content_answer(xet.xorbs[match[1]], request, {})
        scopes = ("write",) if method == "POST" else ("read", "write")
        if request.token not in [f"xet-{scope}-{self.hub.signature(scope)}" for scope in scopes]:
            raise HubError(401, f"This needs a token that may {scopes[0]}")
        if method == "POST" and (match := re.fullmatch("/v1/xorbs/default/([0-9a-f]{64})", path)):
            chunk_places(request.body)
            with self.hub.lock:
                is_new = match[1] not in xet.xorbs
                xet.xorbs.setdefault(match[1], request.body)
            return json_answer({"was_inserted": is_new})
        if method == "POST" and path == "/v2/shards":
            with self.hub.lock:
                self.hub.objects |= xet.add_shard(request.body)
            return Answer(200, b'{"type":"result"}\n', {"Content-Type": "application/x-ndjson"})
        if method == "GET" and (match := re.fullmatch("/v1/reconstructions/([0-9a-f]{64})", path)):
            start, stop = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", "bytes=0-0")).groups()
            end = int(stop) + 1 if "range" in request.headers else None

            def url_of(xorb: str) -> str:
                return f"{self.hub.cas}{repo}/xorbs/{xorb}?signature={self.hub.signature(xorb)}"

            return json_answer(xet.reconstruction(match[1], int(start), end, url_of))
        raise HubError(404, f"This storage does not know {method} {path}")
