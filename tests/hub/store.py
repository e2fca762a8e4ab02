"""The repositories of the Hub: commits of files, without HTTP.

A commit is a whole tree (path -> blob), named by a hash of its tree, message and parent; branches, tags and pull
requests are names of commits. Everything is kept in memory.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property

# As in a new repository on the Hub, shortened: the rest is stored in git itself, unless it is large or no text.
GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.bin", "*.safetensors", "*.pt", "*.parquet", "*.npz", "*.zip")
).encode()
LARGE_BYTES = 10 * 2**20


class HubError(Exception):
    """An answer that is an error: status, sentence, and the `X-Error-Code` by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether git holds it or a pointer to it (LFS)."""

    data: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        content = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, Blob]
    title: str
    description: str = ""
    parent: str | None = None
    seconds: float = field(default_factory=time.time)

    @cached_property
    def oid(self) -> str:
        tree = sorted((path, blob.git_oid) for path, blob in self.files.items())
        content = json.dumps([tree, self.title, self.description, self.parent, self.seconds])
        return hashlib.sha1(content.encode()).hexdigest()

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.seconds))


class Repo:
    """A repository: `kind` is "models", "datasets" or "spaces", `id` "user/name"."""

    def __init__(self, kind: str, id: str, private: bool = False):
        self.kind, self.id, self.private = kind, id, private
        self.gated, self.let_in = False, set()  # asks for consent before files are read; names of those who gave it
        self.lock = threading.RLock()
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pull_requests: dict[str, str] = {}
        self.branches["main"] = self._keep(Commit({".gitattributes": Blob(GIT_ATTRIBUTES, False)}, "initial commit"))

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def _keep(self, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        return commit.oid

    # ------------------------------------------------------------------ reading

    def at(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag, a `refs/…` name or a hash stands for."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return self.commits[names[revision]]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.at(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return commit, commit.files[path]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def contents(self, revision: str = "main") -> dict[str, bytes]:
        """What people put there: all files but .gitattributes, which the Hub makes."""
        return {path: blob.data for path, blob in self.at(revision).files.items() if path != ".gitattributes"}

    def goes_to_lfs(self, path: str, size: int, sample: bytes, revision: str = "main") -> bool:
        attributes = self.at(revision).files.get(".gitattributes", Blob(b"", False)).data.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        name = path.rsplit("/", 1)[-1]
        return size >= LARGE_BYTES or b"\0" in sample or any(fnmatch(name, pattern) for pattern in patterns)

    # ------------------------------------------------------------------ writing

    def commit(
        self,
        changes: Mapping[str, Blob],
        title: str,
        description: str = "",
        revision: str = "main",
        deleted: Iterable[str] = (),
        parent: str | None = None,
        as_pull_request: bool = False,
    ) -> tuple[Commit, int | None]:
        """A commit on a branch, or as a new pull request against it, whose number comes back too.

        `deleted` names files, or folders with a slash at the end; `parent` is the hash the branch must be at.
        """
        with self.lock:
            if not as_pull_request and revision not in self.branches and revision not in self.pull_requests:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = self.at(revision)
            if parent is not None and not head.oid.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for path in deleted:
                gone = [p for p in files if p == path or (path.endswith("/") and p.startswith(path))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for p in gone:
                    del files[p]
            commit = Commit({**files, **changes}, title, description, parent=head.oid)
            oid = self._keep(commit)
            if not as_pull_request:
                (self.branches if revision in self.branches else self.pull_requests)[revision] = oid
                return commit, None
            number = len(self.pull_requests) + 1
            self.pull_requests[f"refs/pr/{number}"] = oid
            return commit, number

    def add(self, files: Mapping[str, bytes], title: str = "Add files", revision: str = "main") -> Commit:
        """A commit made here, with no client: for repositories that a test finds in place."""
        changes = {
            path: Blob(data, self.goes_to_lfs(path, len(data), data[:512], revision)) for path, data in files.items()
        }
        return self.commit(changes, title, revision=revision)[0]

    def name(self, names: dict[str, str], name: str, revision: str) -> None:
        """A new branch or tag (`names` is `branches` or `tags`)."""
        with self.lock:
            if name in names:
                raise HubError(409, f"Reference already exists: {name}")
            if not re.fullmatch(r"[\w./-]+", name) or name.startswith("refs/"):
                raise HubError(400, f"Invalid reference name: {name}")
            names[name] = self.at(revision).oid
