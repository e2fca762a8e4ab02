"""Publish a trained model on the Hub: `ddpm-publish outputs/digits --repo_id user/name`.

One commit holds the pipeline, its card, figures, metrics and configuration. Checkpoints, logs and single samples are not
uploaded. Checkpoints that a training with `--push_to_hub` could not upload are published first. `--space user/name` publishes a
page that runs the model in the visitor's browser. Log in before (`hf auth login`), or set HF_TOKEN. In a clone,
`python training/publish.py` is the same command.
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
    space: str | None = option(
        None,
        "user/name of a static Space: a page that runs the model in a browser. Without --repo_id, that alone is published",
    )
    private: bool = option(False, "create a private repository")
    revision: str | None = option(None, "branch to commit to, created if it does not exist; None: main")
    create_pr: bool = option(False, "open a pull request instead of committing")
    tag: str | None = option(None, "tag for the commit")
    with_training_state: bool = option(False, "also upload the newest checkpoint, to the branch training-state")
    with_onnx: bool = option(False, "export the weights to onnx/model.onnx, and upload that too; needs ddpm_hf[export]")
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
    if args.repo_id is None and args.space is None and config.is_file():
        args = replace(args, repo_id=read_options(config).get("hub_model_id"))
    if args.repo_id is None and args.space is None:
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
        is_final = args.create_pr or args.revision or args.repo_id is None
        steps = [] if is_final else staged_steps(folder)
        for step_folder in steps:
            done = publish_step(step_folder, args.repo_id, private=args.private, retries=retries)
            print(f"Published: {step_folder.name}, {done.url}")
        if steps and not (folder / "model_index.json").is_file():
            return  # the training is not finished
        if args.with_onnx:
            from ddpm_hf import DDPMPipelineCustom
            from ddpm_hf.export.onnx_files import export_onnx

            export_onnx(DDPMPipelineCustom.from_pretrained(folder), folder)
        if args.repo_id is not None:
            others = {"model", "repo_id", "space", "first_wait_seconds"}
            options = {name: value for name, value in vars(args).items() if name not in others}
            done = publish(folder, args.repo_id, **options, retries=retries)
            print(f"Published: {done.url}")
        if args.space is not None:
            from ddpm_hf.demo.static_space import space_files
            from ddpm_hf.hub.spaces import publish_space

            files = space_files(folder, args.space.split("/")[-1], args.repo_id)
            done = publish_space(args.space, files, "static", private=args.private, retries=retries)
            print(f"Published: {done.url}")
    except ImportError as error:
        sys.exit(f"publish.py: error: {error}")
    except (ValueError, OSError) as error:
        sys.exit(f"publish.py: error: {explain_error(error, args.repo_id or args.space)}")


if __name__ == "__main__":
    main()
