"""Publishing on a Hub: one commit a model, sent again until it is there, and never there twice."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.hub.model_card import card_for_repository, merge_cards, plain_card
from ddpm_hf.transfer import BranchMoved, Retries, download_file, with_retries

# Patterns of `Path.glob` beside those of the pipeline's parts; * stays within a folder: samples/*.png is none of them.
PUBLISHED = ["model_index.json", "README.md", "*.png", "metrics.json", "config.yaml"]
TRAINING_STATE = "training-state"  # the branch
NO_TOKEN = "not logged in. Run `hf auth login`, or set HF_TOKEN to a token that may write."


@dataclass(frozen=True)
class Published:
    """`commit` is its hash; `url` its address, or the pull request's."""

    repo_id: str
    commit: str
    url: str


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a saved pipeline that are published, by their names there. Raises ValueError if it is no pipeline."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no model_index.json: is it the output of training/train.py?")
    parts = pipeline_parts(json.loads((folder / "model_index.json").read_text()))
    for part in parts:
        weights = [file.name for file in (folder / part).glob("*.bin")]
        if weights and not any((folder / part).glob("*.safetensors")):
            raise ValueError(f"{folder / part} holds {weights[0]}, a pickle: save it as safetensors first.")
    patterns = PUBLISHED + [f"{part}/*.{kind}" for part in parts for kind in ("json", "safetensors")]
    files = {file for pattern in patterns for file in folder.glob(pattern) if not file.name.startswith(".")}
    return {file.relative_to(folder).as_posix(): file for file in sorted(files)}


def pipeline_parts(model_index: dict) -> list[str]:
    """The folders that a model_index.json names."""
    return sorted(k for k, v in model_index.items() if isinstance(v, list) and len(v) == 2 and None not in v)


def check_destination(
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    retries: Retries = Retries(),  # noqa: B008
    is_proposal: bool = False,
) -> str:
    """Make the repository if it is not there; its full name. Raises ValueError, or the Hub's errors, if it cannot be
    written to (or proposed to, with `is_proposal`), so that this is known before anything is done."""
    validate_repo_id(repo_id)
    if (token or get_token()) is None:
        raise ValueError(NO_TOKEN)
    api = HfApi(token=token)
    # A create whose answer was lost is followed by one that finds it there.
    repo_id = with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), retries).repo_id
    if private and not with_retries(lambda: api.model_info(repo_id), retries).private:
        # create_repo leaves a repository that exists as it is.
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or choose another name.")
    who, owner = with_retries(api.whoami, retries), repo_id.split("/")[0]
    if not is_proposal and owner not in [who["name"], *(org["name"] for org in who.get("orgs", []))]:
        raise ValueError(f"this token is {who['name']}'s and may not write to {repo_id}: name a repository of yours.")
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
    retries: Retries = Retries(),  # noqa: B008
) -> Published:
    """Commit a saved pipeline, its card, figures, metrics and configuration, in one commit.

    Args:
        folder: what `save_pretrained` or training left. Without a README.md, a plain card is made where there is none.
        repo_id: "user/name", made if it is not there.
        private: make it a private repository.
        revision: branch to commit to, made if need be; None is main.
        create_pr: open a pull request against main rather than commit.
        tag: a name for the commit.
        with_training_state: commit the newest checkpoint too, to the branch "training-state".
        token: in place of the one that is logged in.
        retries: how to go about errors that pass.

    Nothing is lost and nothing doubled: a commit is made upon the one that was looked at, and carries an id by which it is
    found again if its answer was lost. Of a README.md that is there, what we did not write stays (`merge_cards`).

    Raises ValueError for what cannot be published, before anything is sent; the client's errors (`explain_error`)
    for what the Hub refuses or the network does not let through.
    """
    folder = Path(folder)
    files = published_files(folder)
    if create_pr and (revision is not None or tag is not None):
        raise ValueError("give revision or tag, or create_pr, not both: a pull request is against main.")
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"))
    if with_training_state and not checkpoints:
        raise ValueError(f"with_training_state: {folder / 'checkpoints'} holds no checkpoint.")
    repo_id = check_destination(repo_id, private, token, retries, is_proposal=create_pr)
    api = HfApi(token=token)
    if revision is not None:
        with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), retries)
    if tag is not None:
        _refuse_tag_elsewhere(api, repo_id, tag, None, revision, retries)
    card = files["README.md"].read_text(encoding="utf-8") if "README.md" in files else None
    parts = pipeline_parts(json.loads((folder / "model_index.json").read_text()))

    def contents(there: ModelInfo) -> tuple[dict[str, Path | bytes], list[str]]:
        names = [file.rfilename for file in there.siblings]
        new: dict[str, Path | bytes] = dict(files)
        if "README.md" in names and card is not None:
            theirs = download_file(repo_id, "README.md", there.sha, retries, token).read_text(encoding="utf-8")
            new["README.md"] = merge_cards(card_for_repository(card, repo_id), theirs).encode()
        elif "README.md" not in names:
            new["README.md"] = merge_cards(card_for_repository(card or plain_card(repo_id), repo_id), "").encode()
        # Weights that an earlier model left beside these would be loaded in their place, or mixed with them.
        stale = [n for n in names if n.split("/")[0] in {"unet", "scheduler", *parts} and "/" in n and n not in new]
        return new, stale

    done = _commit(api, repo_id, contents, commit_message, revision, create_pr, retries)
    if tag is not None:
        tag_commit(repo_id, tag, done.commit, token, retries)
    if with_training_state:
        _publish_training_state(api, repo_id, folder, checkpoints[-1], retries)
    return done


def tag_commit(repo_id: str, tag: str, commit: str, token: str | None = None, retries: Retries = Retries()) -> None:  # noqa: B008
    """Name a commit. Raises ValueError if the name stands for another one."""
    api = HfApi(token=token)
    with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True), retries)
    _refuse_tag_elsewhere(api, repo_id, tag, commit, None, retries)


def _refuse_tag_elsewhere(
    api: HfApi, repo_id: str, tag: str, commit: str | None, revision: str | None, retries: Retries
) -> None:
    refs = with_retries(lambda: api.list_repo_refs(repo_id), retries)
    found = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if found is None:
        return
    expected = commit or with_retries(lambda: api.model_info(repo_id, revision=revision), retries).sha
    if found != expected:
        raise ValueError(f"tag {tag!r} of {repo_id} stands for commit {found} already: delete it, or choose another.")


def _publish_training_state(api: HfApi, repo_id: str, folder: Path, checkpoint: Path, retries: Retries) -> None:
    with_retries(lambda: api.create_branch(repo_id, branch=TRAINING_STATE, exist_ok=True), retries)
    files = {f"checkpoints/{checkpoint.name}/{file.name}": file for file in checkpoint.iterdir()}
    if (folder / "config.yaml").is_file():
        files["config.yaml"] = folder / "config.yaml"

    def contents(there: ModelInfo) -> tuple[Mapping[str, Path], list[str]]:
        names = [file.rfilename for file in there.siblings]
        return files, [name for name in names if name.startswith("checkpoints/") and name not in files]

    _commit(api, repo_id, contents, f"State of the training: {checkpoint.name}", TRAINING_STATE, False, retries)


def _commit(api: HfApi, repo_id: str, contents, message: str, revision: str | None, create_pr: bool, retries: Retries):
    """One commit of what `contents` makes of the branch's state: files by name, and names to delete."""
    push_id, heads, url = f"ddpm_hf push {uuid.uuid4().hex}", [], f"{api.endpoint}/{repo_id}"

    def act() -> Published:
        there = api.model_info(repo_id, revision=revision)
        if heads and (found := _find(api, repo_id, push_id, revision, heads[0], create_pr)):
            number, commit = found
            return Published(repo_id, commit, f"{url}/discussions/{number}" if create_pr else f"{url}/commit/{commit}")
        files, stale = contents(there)
        heads.append(there.sha)
        try:
            # Not upload_folder, which may split what it uploads into several commits.
            done = api.create_commit(
                repo_id=repo_id,
                operations=[CommitOperationDelete(name) for name in stale]
                + [CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message=message,
                commit_description=push_id,
                revision=revision,
                create_pr=create_pr,
                parent_commit=there.sha,
            )
        except HfHubHTTPError as error:
            if error.response.status_code == 412:
                raise BranchMoved from error
            raise
        return Published(repo_id, done.oid, done.pr_url or done.commit_url)

    return with_retries(act, retries)


def _find(api: HfApi, repo_id: str, push_id: str, revision: str | None, since: str, create_pr: bool):
    """(pull request's number or None, commit) of a push whose answer was lost; None if it was not made."""
    if create_pr:
        refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
        revisions = [ref.ref for ref in reversed(refs)]
    else:
        revisions = [revision]
    for name in revisions:
        for commit in api.list_repo_commits(repo_id, revision=name):
            if push_id in commit.message:
                return (name.rsplit("/", 1)[-1] if create_pr else None), commit.commit_id
            if commit.commit_id == since:
                break
    return None
