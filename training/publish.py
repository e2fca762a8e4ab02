"""Publish a trained model on the Hub: `python training/publish.py --model outputs/digits --repo_id user/name`.

One commit holds the pipeline, its card, figures, metrics and configuration; checkpoints, logs and single samples stay
here. Log in first (`hf auth login`), or set HF_TOKEN.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import HfArgumentParser

PUBLISHED = ["model_index.json", "unet/*", "scheduler/*", "README.md", "*.png", "metrics.json", "config.yaml"]


@dataclass
class PublishArguments:
    model: str = field(metadata={"help": "the folder of a trained model"})
    repo_id: str = field(metadata={"help": "user/name on the Hub; made if it is not there"})
    private: bool = False
    revision: str | None = field(default=None, metadata={"help": "branch to commit to; None: main"})
    create_pr: bool = field(default=False, metadata={"help": "open a pull request rather than commit"})
    commit_message: str = "Publish a model trained with ddpm_hf"


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(PublishArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        folder = Path(args.model)
        for needed in ("model_index.json", "README.md"):
            if not (folder / needed).is_file():
                raise ValueError(f"{folder} holds no {needed}: is it the output of training/train.py?")
        api = HfApi()
        repo_id = api.create_repo(args.repo_id, private=args.private or None, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=PUBLISHED,
            commit_message=args.commit_message,
            revision=args.revision,
            create_pr=args.create_pr,
        )
    except LocalTokenNotFoundError:
        sys.exit("publish.py: error: not logged in. Run `hf auth login`, or set HF_TOKEN to a token that may write.")
    except (ValueError, OSError, HfHubHTTPError) as error:
        sys.exit(f"publish.py: error: {error}")
    print(f"Published: {commit.pr_url or commit.commit_url}")


if __name__ == "__main__":
    main()
