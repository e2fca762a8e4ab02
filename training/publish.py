"""Publish a trained model on the Hub: `python training/publish.py outputs/digits --repo_id user/name`.

One commit holds the pipeline, its card, figures, metrics and configuration; checkpoints, logs and single samples stay
here. Pipelines of single steps that a training could not push (`--push_to_hub`) go first. Log in first
(`hf auth login`), or set HF_TOKEN.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub.errors import HTTPError
from transformers import HfArgumentParser

from ddpm_hf.hub.publish import publish
from ddpm_hf.training.uploads import publish_waiting, waiting
from ddpm_hf.transfer import Retries, explain_error


@dataclass
class PublishArguments:
    model: str | None = field(default=None, metadata={"help": "the folder of a trained model; may stand alone, first"})
    repo_id: str | None = field(
        default=None,
        metadata={"help": "user/name on the Hub, made if it is not there; None: hub_model_id of config.yaml"},
    )
    private: bool = field(default=False, metadata={"help": "make it a private repository"})
    revision: str | None = field(default=None, metadata={"help": "branch to commit to, made if need be; None: main"})
    create_pr: bool = field(default=False, metadata={"help": "open a pull request rather than commit"})
    tag: str | None = field(default=None, metadata={"help": "a name for the commit"})
    with_training_state: bool = field(
        default=False, metadata={"help": "commit the newest checkpoint too, to the branch training-state"}
    )
    commit_message: str = "Publish a model trained with ddpm_hf"
    first_wait_seconds: float = field(
        default=1.0, metadata={"help": "before a call that failed is made again; then twice as long each time"}
    )


def parse(arguments: list[str]) -> PublishArguments:
    parser = HfArgumentParser(PublishArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if args.model is None:
        raise ValueError("give the folder of a trained model: publish.py outputs/digits --repo_id user/name.")
    config = Path(args.model) / "config.yaml"
    if args.repo_id is None and config.is_file():
        args.repo_id = (yaml.safe_load(config.read_text()) or {}).get("hub_model_id")
    if args.repo_id is None:
        raise ValueError(f"give --repo_id user/name: {config} names no hub_model_id.")
    return args


def main(arguments: list[str] | None = None) -> None:
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        sys.exit(f"publish.py: error: {error}")
    folder, retries = Path(args.model), Retries(first_wait_seconds=args.first_wait_seconds)
    plain = not (args.create_pr or args.revision)
    try:
        if plain and waiting(folder):
            publish_waiting(folder, args.repo_id, args.private, retries, say=print)
            if not (folder / "model_index.json").is_file():
                return  # a run that was stopped has no more than its steps
        options = {name: getattr(args, name) for name in ("private", "revision", "create_pr", "tag")}
        done = publish(
            folder,
            args.repo_id,
            **options,
            with_training_state=args.with_training_state,
            commit_message=args.commit_message,
            retries=retries,
        )
    except (ValueError, OSError, HTTPError, RuntimeError) as error:
        sys.exit(f"publish.py: error: {explain_error(error, args.repo_id)}")
    print(f"Published: {done.url}")


if __name__ == "__main__":
    main()
