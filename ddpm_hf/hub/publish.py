"""Publish a saved pipeline on the Hub in one commit that is retried without being made twice."""

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError

from ddpm_hf.hub.model_card import card_for_repository, merge_cards, plain_card
from ddpm_hf.transfer import DEFAULT_RETRIES, LOG_IN, BranchMoved, Retries, download_file, model_info, with_retries

# Patterns of `Path.glob`, in addition to those of the pipeline's parts. * stays within a folder: no samples/*.png.
PUBLISHED = ["model_index.json", "README.md", "*.png", "metrics.json", "config.yaml"]
TRAINING_STATE = "training-state"  # the branch

# Given the present state of the branch: the files to commit, by name.
Contents = Callable[[ModelInfo], Mapping[str, Path | bytes]]


@dataclass(frozen=True)
class Published:
    """The result of an upload: `commit` is its hash, `url` the address of the commit or pull request."""

    repo_id: str
    commit: str
    url: str


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a saved pipeline that are published, by their names in the repository.

    Raises ValueError if the folder holds no pipeline, or weights as a pickle only.
    """
    if not (folder / "model_index.json").is_file():
        problem = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise ValueError(f"folder must hold a saved pipeline, got {str(folder)!r}, which {problem}.")
    parts = pipeline_parts(folder)
    for part in parts:
        pickles = list((folder / part).glob("*.bin"))
        if pickles and not any((folder / part).glob("*.safetensors")):
            raise ValueError(f"{pickles[0]} is a pickle: save the weights as safetensors to publish them.")
    patterns = PUBLISHED + [f"{part}/*.{kind}" for part in parts for kind in ("json", "safetensors")]
    files = {file for pattern in patterns for file in folder.glob(pattern) if not file.name.startswith(".")}
    return {file.relative_to(folder).as_posix(): file for file in sorted(files)}


def pipeline_parts(folder: Path) -> list[str]:
    """The subfolders that model_index.json names."""
    index = json.loads((folder / "model_index.json").read_text())
    return sorted(k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and None not in v)


def ensure_repository(
    repo_id: str, private: bool, token: str | None = None, retries: Retries = DEFAULT_RETRIES, create_pr: bool = False
) -> str:
    """Create the repository if it does not exist, and return its full name.

    Raises ValueError, or the Hub's errors, if the token has no write access (not needed with `create_pr`), so that this is
    known before a training starts.
    """
    if (token or get_token()) is None:
        raise ValueError(f"not logged in: {LOG_IN} to a token with write access.")
    api = HfApi(token=token)
    # exist_ok also covers a retry after a lost response.
    repo_id = with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), retries).repo_id
    # create_repo leaves an existing repository as it is.
    if private and not with_retries(lambda: model_info(api, repo_id), retries).private:
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or choose another name.")
    user, owner = with_retries(api.whoami, retries), repo_id.split("/")[0]
    if not create_pr and owner not in [user["name"], *(org["name"] for org in user.get("orgs", []))]:
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
    finds the commit instead of making a second one. Text that others wrote in an existing README.md stays
    (`merge_cards`).

    Raises:
        ValueError: the folder cannot be published, or the token has no write access; nothing was uploaded.
        HfHubHTTPError, OSError: from the client, if the Hub refuses or cannot be reached (see `explain_error`).
    """
    folder = Path(folder)
    files = published_files(folder)
    if create_pr and (revision is not None or tag is not None):
        raise ValueError("create_pr cannot be combined with revision or tag: a pull request is against main.")
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"))
    if with_training_state and not checkpoints:
        raise ValueError(f"with_training_state needs a checkpoint, and {folder / 'checkpoints'} holds none.")
    repo_id = ensure_repository(repo_id, private, token, retries, create_pr)
    api = HfApi(token=token)
    if revision is not None:
        with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), retries)
    if tag is not None:
        _check_tag(api, repo_id, tag, None, revision, retries)
    card = files["README.md"].read_text(encoding="utf-8") if "README.md" in files else None

    def contents(existing: ModelInfo):
        theirs = ""
        if any(file.rfilename == "README.md" for file in existing.siblings):
            if card is None:
                return files
            theirs = download_file(repo_id, "README.md", existing.sha, retries, token).read_text(encoding="utf-8")
        merged = merge_cards(card_for_repository(card or plain_card(repo_id), repo_id), theirs)
        return files | {"README.md": merged.encode()}

    # Weight files of an earlier model would be loaded instead of the new ones, or together with them.
    replaced = {"unet", "scheduler", *pipeline_parts(folder)}
    target = {"revision": revision, "create_pr": create_pr}
    done = _commit(api, repo_id, contents, replaced, commit_message, retries, **target)
    if tag is not None:
        tag_commit(repo_id, tag, done.commit, token, retries)
    if with_training_state:
        _publish_training_state(api, repo_id, folder, checkpoints[-1], retries)
    return done


def tag_commit(repo_id: str, tag: str, commit: str, token: str | None = None, retries: Retries = DEFAULT_RETRIES):
    """Tag a commit. Raises ValueError if the tag exists and points to another commit."""
    api = HfApi(token=token)
    with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True), retries)
    _check_tag(api, repo_id, tag, commit, None, retries)


def _check_tag(api: HfApi, repo_id: str, tag: str, commit: str | None, revision: str | None, retries: Retries) -> None:
    """ValueError if a tag points to another commit than `commit`, or than the head of `revision`."""
    refs = with_retries(lambda: api.list_repo_refs(repo_id), retries)
    found = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if found is not None and found != (commit or with_retries(lambda: model_info(api, repo_id, revision), retries).sha):
        raise ValueError(f"tag {tag!r} of {repo_id} points to commit {found} already: delete it, or choose another.")


def _publish_training_state(api: HfApi, repo_id: str, folder: Path, checkpoint: Path, retries: Retries) -> None:
    with_retries(lambda: api.create_branch(repo_id, branch=TRAINING_STATE, exist_ok=True), retries)
    paths = [*checkpoint.iterdir(), *folder.glob("config.yaml")]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    message = f"Training state: {checkpoint.name}"
    _commit(api, repo_id, lambda existing: files, {"checkpoints"}, message, retries, revision=TRAINING_STATE)


def _commit(
    api: HfApi, repo_id: str, contents: Contents, replaced: set[str], message: str, retries: Retries, **target
) -> Published:
    """Make one commit, from a new state of the branch at each retry.

    Args:
        replaced: folders of the repository whose other files are deleted.
        target: `revision` and `create_pr`, as for `HfApi.create_commit`.
    """
    push_id, first_head = f"ddpm_hf push {uuid.uuid4().hex}", None

    def call() -> Published:
        nonlocal first_head
        existing = model_info(api, repo_id, target["revision"])
        if first_head is not None and (found := _find(api, repo_id, push_id, first_head, **target)):
            return found
        files, names = contents(existing), [file.rfilename for file in existing.siblings]
        first_head = first_head or existing.sha
        stale = [name for name in names if "/" in name and name.split("/")[0] in replaced and name not in files]
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, content) for name, content in files.items()]
        options = {"commit_description": push_id, "parent_commit": existing.sha, **target}
        try:
            # Not upload_folder, which may split the upload into several commits.
            done = api.create_commit(repo_id, operations, commit_message=message, **options)
        except HfHubHTTPError as error:
            if error.response.status_code == 412:
                raise BranchMoved from error
            raise
        return Published(repo_id, done.oid, done.pr_url or done.commit_url)

    return with_retries(call, retries)


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
