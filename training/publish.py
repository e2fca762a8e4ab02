"""Publish a trained model on the Hub: `ddpm-publish outputs/digits --repo_id user/name`.

One commit holds the pipeline, its card, figures, metrics and configuration. Checkpoints, logs and single samples are not
uploaded. Checkpoints that a training with `--push_to_hub` could not upload are published first. `--space user/name` publishes a
page that runs the model in the visitor's browser, `--gradio_space user/name` the app of ddpm-demo. Log in before
(`hf auth login`), or set HF_TOKEN. In a clone, `python training/publish.py` is the same command.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_hf.options import check_options, option
from ddpm_hf.training.config_file import read_run
from ddpm_hf.training.option_parser import OptionParser

if TYPE_CHECKING:
    from ddpm_hf.transfer.downloads import Retries


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
    gradio_space: str | None = option(
        None,
        "user/name of a Gradio Space: the app of ddpm-demo for the model repo_id; without --model, that alone is published",
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


def parse(arguments: list[str] | None) -> PublishArguments:
    """The options. Raises ValueError if the folder or the repository's name is missing."""
    args = OptionParser(PublishArguments, __doc__.splitlines()[0]).parse_model_first(arguments)
    if args.model is None:
        if args.gradio_space is not None and args.repo_id is not None and args.space is None:
            return args
        raise ValueError("model must be the folder of a trained model, as in publish.py outputs/digits, got None.")
    if args.repo_id is None and (args.space is None or args.gradio_space is not None):
        args = replace(args, repo_id=read_run(args.model).get("hub_model_id"))
        if args.repo_id is None:
            raise ValueError(f"repo_id must be user/name, got None, and {args.model}/config.yaml has no hub_model_id.")
    return args


def demos(args: PublishArguments) -> Iterator[tuple[str, str, dict[str, Path | bytes]]]:
    """The Spaces that are asked for: name, kind and files."""
    if args.space is not None:
        from ddpm_hf.demo.static_space import space_files

        yield args.space, "static", space_files(args.model, args.space.split("/")[-1], args.repo_id)
    if args.gradio_space is not None:
        from ddpm_hf.demo.gradio_space import gradio_files

        yield args.gradio_space, "gradio", gradio_files(args.repo_id)


def publish_model(args: PublishArguments, retries: "Retries") -> bool:
    """Publish the checkpoints that wait, and the model if it has a name on the Hub. Returns whether its training is finished."""
    from ddpm_hf.hub.publish import publish
    from ddpm_hf.training.uploads import publish_step, staged_steps

    folder = Path(args.model)
    steps = [] if args.create_pr or args.revision or args.repo_id is None else staged_steps(folder)
    for step_folder in steps:
        done = publish_step(step_folder, args.repo_id, private=args.private, retries=retries)
        print(f"Published: {step_folder.name}, {done.url}")
    if steps and not (folder / "model_index.json").is_file():
        return False
    if args.with_onnx:
        from ddpm_hf import DDPMPipelineCustom
        from ddpm_hf.export.onnx_files import export_onnx

        export_onnx(DDPMPipelineCustom.from_pretrained(folder), folder)
    if args.repo_id is not None:
        others = {"model", "repo_id", "space", "gradio_space", "first_wait_seconds"}
        options = {name: value for name, value in vars(args).items() if name not in others}
        print(f"Published: {publish(folder, args.repo_id, **options, retries=retries).url}")
    return True


def main(arguments: list[str] | None = None) -> None:
    try:
        args = parse(arguments)
    except (ValueError, TypeError) as error:
        sys.exit(f"publish.py: error: {error}")
    # Imported after parsing, so that --help and wrong options are answered without waiting for torch.
    from ddpm_hf.hub.spaces import publish_space
    from ddpm_hf.transfer.client import hub_api
    from ddpm_hf.transfer.downloads import Retries
    from ddpm_hf.transfer.errors import explain_error, explained

    try:
        retries = Retries(first_wait_seconds=args.first_wait_seconds)
        if args.model is None:
            with explained(args.repo_id):
                hub_api(None).model_info(args.repo_id)  # a Space for a model that is not there would not start
        elif not publish_model(args, retries):
            return
        for name, kind, files in demos(args):
            done = publish_space(name, files, kind, private=args.private, retries=retries)
            print(f"Published: {done.url}")
    except ImportError as error:
        sys.exit(f"publish.py: error: {error}")
    except (ValueError, OSError) as error:
        sys.exit(f"publish.py: error: {explain_error(error, args.repo_id or args.space)}")


if __name__ == "__main__":
    main()
