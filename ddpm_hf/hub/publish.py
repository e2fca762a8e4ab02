"""Publish a saved pipeline on the Hub in one commit that is retried without being made twice."""

import hashlib
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ddpm_hf.hub.contents import check_files, pipeline_parts, published_files
from ddpm_hf.hub.local_paths import without_local_paths
from ddpm_hf.hub.model_card import card_for_repository, merge_cards, plain_card
from ddpm_hf.transfer.client import hub_api
from ddpm_hf.transfer.downloads import DEFAULT_RETRIES, Retries, download_file, git_digest, with_retries
from ddpm_hf.transfer.errors import LOG_IN, BranchMoved, NotStored, explained

TRAINING_STATE = "training-state"  # the branch

# Given the present state of the branch: the files to commit, by name.
Contents = Callable[[ModelInfo], Mapping[str, Path | bytes]]


@dataclass(frozen=True)
class Published:
    """The result of an upload: `commit` is its hash, `url` the address of the commit or pull request."""

    repo_id: str
    commit: str
    url: str


def ensure_repository(
    repo_id: str, private: bool, token: str | None = None, retries: Retries = DEFAULT_RETRIES, create_pr: bool = False
) -> str:
    """Create the repository if it does not exist, and return its full name.

    Raises ValueError if the token has no write access (not needed with `create_pr`), so that this is known before a
    training starts, and the OSError of `explain_error` if the Hub refuses or cannot be reached.
    """
    if (token or get_token()) is None:
        raise ValueError(f"not logged in: {LOG_IN} to a token with write access.")
    api = hub_api(token)
    with explained(repo_id):
        # exist_ok also covers a retry after a lost response.
        created = with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), retries)
        repo_id = repo_id if "/" in repo_id else created.repo_id
        # create_repo leaves an existing repository as it is.
        if private and not with_retries(lambda: api.model_info(repo_id), retries).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, or choose another name."
            )
        user, owner = with_retries(api.whoami, retries), repo_id.split("/")[0]
    if not create_pr and owner not in [user["name"], *(org["name"] for org in user.get("orgs") or [])]:
        raise ValueError(f"the token of {user['name']} has no write access to {repo_id}: use a repository of your own.")
    return repo_id


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    with_training_state: bool = False,
    commit_message: str = "Publish a model trained with ddpm_hf",
    token: str | None = None,
    retries: Retries = DEFAULT_RETRIES,
) -> Published:
    """Upload a saved pipeline with its card, figures, metrics and configuration, in one commit.

    Args:
        folder: output of `save_pretrained` or of a training. Without a README.md, a short model card is created.
        repo_id: "user/name"; created if it does not exist.
        private: create a private repository.
        revision: branch to commit to, created if it does not exist; None for main.
        create_pr: open a pull request against main instead of committing to it.
        tag: tag for the commit.
        with_training_state: also upload the newest checkpoint, to the branch "training-state".
        commit_message: title of the commit.
        token: access token; None for the one that is logged in.
        retries: how often and after which wait a failed request is made again.

    Each commit names its parent and carries an id, so concurrent uploads lose nothing, and a retry after a lost response
    finds the commit instead of making a second one. The result is read back: it is success only if the Hub lists every
    file with its checksum, and the tag. Text that others wrote in an existing README.md stays (`merge_cards`). Paths of
    this machine are replaced by their last part.

    Raises:
        ValueError: the folder cannot be published, or the token has no write access; nothing was uploaded.
        PermissionError, FileNotFoundError, ConnectionError, TimeoutError or another OSError: the Hub refuses or cannot be
            reached. The message is one sentence that says what to do.
    """
    folder = Path(folder)
    files = published_files(folder)
    public = without_local_paths(files)
    if create_pr and (revision is not None or tag is not None):
        raise ValueError("create_pr cannot be combined with revision or tag: a pull request is against main.")
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"))
    if with_training_state and not checkpoints:
        raise ValueError(f"with_training_state needs a checkpoint, and {folder / 'checkpoints'} holds none.")
    state = training_state(folder, checkpoints[-1]) if with_training_state else {}
    repo_id = ensure_repository(repo_id, private, token, retries, create_pr)
    api = hub_api(token)
    card = None
    if "README.md" in files:
        card = public["README.md"].decode() if "README.md" in public else files["README.md"].read_text(encoding="utf-8")

    def contents(existing: ModelInfo):
        theirs = ""
        if any(file.rfilename == "README.md" for file in existing.siblings):
            if card is None:
                return files | public
            # One try: the caller tries again.
            theirs = download_file(repo_id, "README.md", existing.sha, Retries(1), token).read_text(encoding="utf-8")
        merged = merge_cards(card_for_repository(card or plain_card(repo_id), repo_id), theirs)
        return files | public | {"README.md": merged.encode()}

    # Weight files of an earlier model would be loaded instead of the new ones, or together with them.
    replaced = {"unet", "scheduler", "lora", *pipeline_parts(folder)}
    with explained(repo_id):
        if revision is not None:
            _ensure_branch(api, repo_id, revision, retries)
        if tag is not None:
            _check_tag(api, repo_id, tag, None, revision, retries)
        target = {"revision": revision, "create_pr": create_pr}
        done = _commit(api, repo_id, contents, replaced, commit_message, retries, **target)
        if tag is not None:
            tag_commit(repo_id, tag, done.commit, token, retries)
        if with_training_state:
            _ensure_branch(api, repo_id, TRAINING_STATE, retries)
            message, target = f"Training state: {checkpoints[-1].name}", {"revision": TRAINING_STATE}
            _commit(api, repo_id, lambda existing: state, {"checkpoints"}, message, retries, **target)
    return done


def training_state(folder: Path, checkpoint: Path) -> dict[str, Path | bytes]:
    """The files of a checkpoint and the configuration, without paths of this machine, by their names in the repository."""
    paths = [*checkpoint.iterdir(), *folder.glob("config.yaml")]
    check_files(folder, paths)
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    public = without_local_paths(files)
    sums, prefix = checkpoint / "SHA256SUMS", checkpoint.relative_to(folder).as_posix()
    if sums.is_file():
        text = sums.read_text()
        for name, content in public.items():
            line = re.escape(name.removeprefix(f"{prefix}/"))
            text = re.sub(f"^[0-9a-f]+(?=  {line}$)", hashlib.sha256(content).hexdigest(), text, flags=re.MULTILINE)
        public[f"{prefix}/{sums.name}"] = text.encode()
    return files | public


def tag_commit(repo_id: str, tag: str, commit: str, token: str | None = None, retries: Retries = DEFAULT_RETRIES):
    """Tag a commit. Raises ValueError if the tag exists and points to another commit; other errors as `publish`."""
    api = hub_api(token)

    def call() -> None:
        api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
        _check_tag(api, repo_id, tag, commit, None, Retries(1))

    with explained(repo_id):
        with_retries(call, retries)


def _check_tag(api: HfApi, repo_id: str, tag: str, commit: str | None, revision: str | None, retries: Retries) -> None:
    """ValueError if a tag points to another commit than `commit`, or than the head of `revision`. `NotStored` if there is
    no such tag, and `commit` is given."""
    refs = with_retries(lambda: api.list_repo_refs(repo_id), retries)
    found = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if found is None and commit is not None:
        raise NotStored(f"tag {tag!r}")
    if found is not None and found != (
        commit or with_retries(lambda: api.model_info(repo_id, revision=revision), retries).sha
    ):
        raise ValueError(f"tag {tag!r} of {repo_id} points to commit {found} already: delete it, or choose another.")


def _ensure_branch(api: HfApi, repo_id: str, branch: str, retries: Retries) -> None:
    def call() -> None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        if branch not in [ref.name for ref in api.list_repo_refs(repo_id).branches]:
            raise NotStored(f"branch {branch!r}")

    with_retries(call, retries)


def _commit(
    api: HfApi, repo_id: str, contents: Contents, replaced: set[str], message: str, retries: Retries, **target
) -> Published:
    """Make one commit, from a new state of the branch at each retry, and read it back.

    Args:
        replaced: folders of the repository whose other files are deleted.
        target: `revision` and `create_pr`, as for `HfApi.create_commit`.
    """
    push_id, first_head = f"ddpm_hf push {uuid.uuid4().hex}", None

    def call() -> Published:
        nonlocal push_id, first_head
        existing = api.model_info(repo_id, revision=target["revision"])
        files, names = contents(existing), [file.rfilename for file in existing.siblings]
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = _find(api, repo_id, push_id, first_head, **target) if first_head is not None else None
        if done is None:
            first_head = first_head or existing.sha
            stale = [name for name in names if "/" in name and name.split("/")[0] in replaced and name not in files]
            operations = [CommitOperationDelete(name) for name in stale] + additions
            options = {"commit_description": push_id, "parent_commit": existing.sha, **target}
            try:
                # Not upload_folder, which may split the upload into several commits.
                made = api.create_commit(repo_id, operations, commit_message=message, **options)
            except HfHubHTTPError as error:
                if error.response.status_code == 412:
                    raise BranchMoved from error
                raise
            done = Published(repo_id, made.oid, made.pr_url or made.commit_url)
        if missing := _not_stored(api, repo_id, done.commit, additions):
            push_id, first_head = f"ddpm_hf push {uuid.uuid4().hex}", None  # another commit, with what is missing
            raise NotStored(missing)
        return done

    return with_retries(call, retries)


def _not_stored(api: HfApi, repo_id: str, commit: str, additions: list[CommitOperationAdd]) -> str | None:
    """What a commit lacks of the files that were sent; None if the Hub has all of them with their checksums."""
    try:
        infos = api.get_paths_info(repo_id, [addition.path_in_repo for addition in additions], revision=commit)
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


def _find(api: HfApi, repo_id: str, push_id: str, since: str, revision: str | None, create_pr: bool = False):
    """The commit with `push_id` made after commit `since`, if there is one: its response was lost."""
    revisions = [revision]
    if create_pr:
        refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
        revisions = [ref.ref for ref in reversed(refs)]
    for name in revisions:
        for commit in api.list_repo_commits(repo_id, revision=name):
            if push_id in commit.message:
                page = f"discussions/{name.rsplit('/', 1)[-1]}" if create_pr else f"commit/{commit.commit_id}"
                return Published(repo_id, commit.commit_id, f"{api.endpoint}/{repo_id}/{page}")
            if commit.commit_id == since:
                break
    return None
