"""Publish a trained model on the Hub: `python training/publish.py --model outputs/digits --repo_id user/name`.

One commit holds the pipeline, its card, figures, metrics and configuration; checkpoints, logs and single samples stay
here. Log in first (`hf auth login`), or set HF_TOKEN.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: the client's own, whichever library it uses
from transformers import HfArgumentParser

# Patterns of `Path.glob`, in which * stays within a folder: samples/*.png and checkpoints/* are none of them.
PARTS = ["unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
PUBLISHED = ["model_index.json", *PARTS, "README.md", "*.png", "metrics.json", "config.yaml"]


@dataclass
class PublishArguments:
    model: str = field(metadata={"help": "the folder of a trained model"})
    repo_id: str = field(metadata={"help": "user/name on the Hub; made if it is not there"})
    private: bool = field(default=False, metadata={"help": "make it a private repository"})
    revision: str | None = field(default=None, metadata={"help": "branch to commit to, made if need be; None: main"})
    create_pr: bool = field(default=False, metadata={"help": "open a pull request rather than commit"})
    commit_message: str = "Publish a model trained with ddpm_hf"


def publish(args: PublishArguments) -> str:
    """Commit what the folder holds of `PUBLISHED`; the address of the commit, or of the pull request."""
    folder = Path(args.model)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {args.model!r}.")
    for needed in ("model_index.json", "README.md"):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder} holds no {needed}: is it the output of training/train.py?")
    if args.create_pr and args.revision is not None:
        raise ValueError("give revision or create_pr, not both: a pull request is against main.")
    if get_token() is None:
        raise ValueError("not logged in. Run `hf auth login`, or set HF_TOKEN to a token that may write.")
    files = sorted({file for pattern in PUBLISHED for file in folder.glob(pattern) if not file.name.startswith(".")})
    names = [file.relative_to(folder).as_posix() for file in files]

    api = HfApi()
    repo_id = api.create_repo(args.repo_id, private=args.private or None, exist_ok=True).repo_id
    if args.private and not api.model_info(repo_id).private:
        # create_repo leaves a repository that exists as it is.
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or choose another name.")
    if args.revision is not None:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
    # Weights that an earlier model left beside these would be loaded in their place, or mixed with them.
    there = api.list_repo_files(repo_id, revision=args.revision)
    stale = [name for name in there if name.startswith(("unet/", "scheduler/")) and name not in names]
    # The card's examples load the folder; on the Hub they should load the repository.
    card = (folder / "README.md").read_text(encoding="utf-8")
    card = re.sub(r'from_pretrained\("[^"]*"\)', f'from_pretrained("{repo_id}")', card).encode()
    # Not upload_folder, which may split what it uploads into several commits.
    commit = api.create_commit(
        repo_id=repo_id,
        operations=[CommitOperationDelete(name) for name in stale]
        + [CommitOperationAdd(name, card if name == "README.md" else file) for name, file in zip(names, files)],
        commit_message=args.commit_message,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    return commit.pr_url or commit.commit_url


def in_one_sentence(error: Exception, repo_id: str) -> str:
    """What went wrong and what to do about it: the client's messages span lines, and often blame something else."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading …", from a thread
        return f"{str(error).rstrip('.')}: {in_one_sentence(error.__cause__, repo_id)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "no more").split())
        if status == 401:
            return (
                "the Hub does not accept this token. Run `hf auth login`, or set HF_TOKEN to a token that may write "
                f"(it said: {said})."
            )
        if status == 403:
            return f"this token may not write to {repo_id} (the Hub said: {said})."
        return f"the Hub answered {status} for {repo_id} (it said: {said})."
    if isinstance(error, HTTPError):
        return f"{HfApi().endpoint} cannot be reached, or broke off ({' '.join(str(error).split())}); try again later."
    return " ".join(str(error).split())


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(PublishArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        sys.exit(f"publish.py: error: {error}")
    try:
        address = publish(args)
    except (ValueError, OSError, HTTPError, RuntimeError) as error:
        sys.exit(f"publish.py: error: {in_one_sentence(error, args.repo_id)}")
    print(f"Published: {address}")


if __name__ == "__main__":
    main()
