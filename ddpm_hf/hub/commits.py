"""Commits on the Hub that are retried without being made twice, and read back."""

import hashlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, SpaceInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ddpm_hf.transfer.client import hub_api
from ddpm_hf.transfer.downloads import DEFAULT_RETRIES, Retries, git_digest, with_retries
from ddpm_hf.transfer.errors import LOG_IN, BranchMoved, NotStored, explained

# Given the present state of the branch: the files to commit, by name.
Contents = Callable[[ModelInfo | SpaceInfo], Mapping[str, Path | bytes]]


@dataclass(frozen=True)
class Published:
    """The result of an upload: `commit` is its hash, `url` the address of the commit or pull request."""

    repo_id: str
    commit: str
    url: str


def ensure_repository(
    repo_id: str,
    private: bool,
    token: str | None = None,
    retries: Retries = DEFAULT_RETRIES,
    create_pr: bool = False,
    **kind: str,
) -> str:
    """Create the repository if it does not exist, and return its full name. `kind`: `repo_type` and `space_sdk` of
    `HfApi.create_repo`; without them it is a model.

    Raises ValueError if the token has no write access (not needed with `create_pr`), so that this is known before a
    training starts, and the OSError of `explain_error` if the Hub refuses or cannot be reached.
    """
    if (token or get_token()) is None:
        raise ValueError(f"not logged in: {LOG_IN} to a token with write access.")
    api = hub_api(token)
    with explained(repo_id):
        # exist_ok also covers a retry after a lost response.
        created = with_retries(
            lambda: api.create_repo(repo_id, private=private or None, exist_ok=True, **kind), retries
        )
        repo_id = repo_id if "/" in repo_id else created.repo_id
        # create_repo leaves an existing repository as it is.
        info = {"repo_type": kind.get("repo_type", "model")}
        if private and not with_retries(lambda: api.repo_info(repo_id, **info), retries).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, or choose another name."
            )
        user, owner = with_retries(api.whoami, retries), repo_id.split("/")[0]
    if not create_pr and owner not in [user["name"], *(org["name"] for org in user.get("orgs") or [])]:
        raise ValueError(f"the token of {user['name']} has no write access to {repo_id}: use a repository of your own.")
    return repo_id


def make_commit(
    api: HfApi,
    repo_id: str,
    contents: Contents,
    replaced: set[str],
    message: str,
    retries: Retries,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> Published:
    """Make one commit, from a new state of the branch at each retry, and read it back.

    Args:
        replaced: folders of the repository whose other files are deleted.
        revision, create_pr, repo_type: as for `HfApi.create_commit`.
    """
    push_id, first_head = f"ddpm_hf push {uuid.uuid4().hex}", None
    kind, target = {"repo_type": repo_type}, {"revision": revision, "create_pr": create_pr}

    def call() -> Published:
        nonlocal push_id, first_head
        existing = api.repo_info(repo_id, revision=revision, **kind)
        files, names = contents(existing), [file.rfilename for file in existing.siblings]
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = _find(api, repo_id, push_id, first_head, **target, **kind) if first_head is not None else None
        if done is None:
            first_head = first_head or existing.sha
            stale = [name for name in names if "/" in name and name.split("/")[0] in replaced and name not in files]
            operations = [CommitOperationDelete(name) for name in stale] + additions
            options = {"commit_description": push_id, "parent_commit": existing.sha, **target, **kind}
            try:
                # Not upload_folder, which may split the upload into several commits.
                made = api.create_commit(repo_id, operations, commit_message=message, **options)
            except HfHubHTTPError as error:
                if error.response.status_code == 412:
                    raise BranchMoved from error
                raise
            done = Published(repo_id, made.oid, made.pr_url or made.commit_url)
        if missing := _not_stored(api, repo_id, done.commit, additions, **kind):
            push_id, first_head = f"ddpm_hf push {uuid.uuid4().hex}", None  # another commit, with what is missing
            raise NotStored(missing)
        return done

    return with_retries(call, retries)


def _not_stored(
    api: HfApi, repo_id: str, commit: str, additions: list[CommitOperationAdd], repo_type: str
) -> str | None:
    """What a commit lacks of the files that were sent; None if the Hub has all of them with their checksums."""
    try:
        paths = [addition.path_in_repo for addition in additions]
        infos = api.get_paths_info(repo_id, paths, revision=commit, repo_type=repo_type)
    except RevisionNotFoundError:
        return f"commit {commit}"
    stored = {info.path: info for info in infos if isinstance(info, RepoFile)}
    for addition in additions:
        info = stored.get(addition.path_in_repo)
        if info is None or not _is_same(addition, info):
            return f"intact copy of {addition.path_in_repo}"
    return None


def _is_same(addition: CommitOperationAdd, info: RepoFile) -> bool:
    if info.lfs is not None:
        return info.lfs.sha256 == addition.upload_info.sha256.hex()
    digest = git_digest(addition.upload_info.size)
    with addition.as_file() as stream:
        return info.blob_id == hashlib.file_digest(stream, lambda: digest).hexdigest()


def _find(
    api: HfApi, repo_id: str, push_id: str, since: str, revision: str | None, create_pr: bool, repo_type: str
) -> Published | None:
    """The commit with `push_id` made after commit `since`, if there is one: its response was lost."""
    revisions = [revision]
    if create_pr:
        refs = api.list_repo_refs(repo_id, include_pull_requests=True, repo_type=repo_type).pull_requests or []
        revisions = [ref.ref for ref in reversed(refs)]
    for name in revisions:
        for commit in api.list_repo_commits(repo_id, revision=name, repo_type=repo_type):
            if push_id in commit.message:
                page = f"discussions/{name.rsplit('/', 1)[-1]}" if create_pr else f"commit/{commit.commit_id}"
                address = f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
                return Published(repo_id, commit.commit_id, f"{address}/{page}")
            if commit.commit_id == since:
                break
    return None
