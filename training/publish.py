"""Publish a trained model on the Hub: `ddpm-publish outputs/digits --repo_id user/name`.

One commit holds the pipeline, its card, figures, metrics and configuration. Checkpoints, logs and single samples are not
uploaded. Checkpoints that a training with `--push_to_hub` could not upload are published first. Log in before
(`hf auth login`), or set HF_TOKEN. In a clone, `python training/publish.py` is the same command.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ddpm_hf.options import check_options, option
from ddpm_hf.training.config_file import read_options
from ddpm_hf.training.option_parser import OptionParser


@dataclass
class PublishArguments:
    model: str | None = option(None, "folder of a trained model; may be given first, without --model")
    repo_id: str | None = option(
        None, "user/name on the Hub, created if it does not exist; None: hub_model_id of config.yaml"
    )
    private: bool = option(False, "create a private repository")
    revision: str | None = option(None, "branch to commit to, created if it does not exist; None: main")
    create_pr: bool = option(False, "open a pull request instead of committing")
    tag: str | None = option(None, "tag for the commit")
    with_training_state: bool = option(False, "also upload the newest checkpoint, to the branch training-state")
    commit_message: str = option("Publish a model trained with ddpm_hf", "title of the commit")
    first_wait_seconds: float = option(1.0, "wait before a failed request is retried; it doubles each time", "[0, 60]")

    def __post_init__(self):
        check_options(self)


def parse(arguments: list[str]) -> PublishArguments:
    """The options. Raises ValueError if the folder or the repository's name is missing."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    args = OptionParser(PublishArguments, __doc__.splitlines()[0]).parse(arguments)
    if args.model is None:
        raise ValueError("model must be the folder of a trained model, as in publish.py outputs/digits, got None.")
    config = Path(args.model) / "config.yaml"
    if args.repo_id is None and config.is_file():
        args = replace(args, repo_id=read_options(config).get("hub_model_id"))
    if args.repo_id is None:
        raise ValueError(f"repo_id must be user/name, got None, and {config} has no hub_model_id.")
    return args


def main(arguments: list[str] | None = None) -> None:
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, TypeError) as error:
        sys.exit(f"publish.py: error: {error}")
    # Imported after parsing, so that --help and wrong options are answered without waiting for torch.
    from ddpm_hf.hub.publish import publish
    from ddpm_hf.training.uploads import publish_step, staged_steps
    from ddpm_hf.transfer.downloads import Retries
    from ddpm_hf.transfer.errors import explain_error

    folder = Path(args.model)
    try:
        retries = Retries(first_wait_seconds=args.first_wait_seconds)
        steps = [] if args.create_pr or args.revision else staged_steps(folder)
        for step_folder in steps:
            done = publish_step(step_folder, args.repo_id, private=args.private, retries=retries)
            print(f"Published: {step_folder.name}, {done.url}")
        if steps and not (folder / "model_index.json").is_file():
            return  # the training is not finished
        others = {"model", "repo_id", "first_wait_seconds"}
        options = {name: value for name, value in vars(args).items() if name not in others}
        done = publish(folder, args.repo_id, **options, retries=retries)
    except (ValueError, OSError) as error:
        sys.exit(f"publish.py: error: {explain_error(error, args.repo_id)}")
    print(f"Published: {done.url}")


if __name__ == "__main__":
    main()
