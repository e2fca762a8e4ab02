"""Publish a saved pipeline on the Hub in one commit that is retried without being made twice."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo

from ddpm_hf.hub.commits import Published, ensure_repository, make_commit
from ddpm_hf.hub.contents import check_files, pipeline_parts, published_files
from ddpm_hf.hub.local_paths import without_local_paths
from ddpm_hf.hub.model_card import card_for_repository, merge_cards, plain_card
from ddpm_hf.transfer.client import hub_api
from ddpm_hf.transfer.downloads import DEFAULT_RETRIES, Retries, download_file, with_retries
from ddpm_hf.transfer.errors import NotStored, explained

TRAINING_STATE = "training-state"  # the branch


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    with_training_state: bool = False,
    with_onnx: bool = False,
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
        with_onnx: also upload the files that `ddpm_hf.export` wrote from these weights (onnx/*.onnx).
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
    files = published_files(folder, with_onnx)
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
        done = make_commit(api, repo_id, contents, replaced, commit_message, retries, **target)
        if tag is not None:
            tag_commit(repo_id, tag, done.commit, token, retries)
        if with_training_state:
            _ensure_branch(api, repo_id, TRAINING_STATE, retries)
            message, target = f"Training state: {checkpoints[-1].name}", {"revision": TRAINING_STATE}
            make_commit(api, repo_id, lambda existing: state, {"checkpoints"}, message, retries, **target)
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
