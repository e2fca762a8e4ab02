"""Measure a trained model: `python training/evaluate.py --model outputs/digits --dataset digits`.

Prints the variational bound of validation images in bits/dim, distances between samples and real images on the features
of a vision model, and how close samples are to training images. Writes them with their protocol into metrics.json,
draws figures, and adds the results to the model card. Several `--schedulers`, `--steps` or `--variance_type` are compared
in one table. The work is spread over the processes, and the results do not depend on their number.
"""

from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.files import check_output_folder
from ddpm_hf.training.option_parser import OptionParser
from ddpm_hf.training.processes import fail, prepare_process

FILES = ("metrics.json", "README.md", "bound.png", "closest_pixels.png", "closest_features.png")
# Modules that import torch are imported in functions, after the options are parsed, so that --help answers at once.


def evaluate(options: EvaluationOptions) -> tuple[str, str | None]:
    """Measure, and write the results whenever those of a sampler are complete. Returns what to print, and why there are
    no distances, or None."""
    from accelerate import PartialState

    from ddpm_hf import DDPMPipelineCustom
    from ddpm_hf.evaluation.evaluation import Evaluation
    from ddpm_hf.evaluation.report import report
    from ddpm_hf.hub.model_card import average_of_weights
    from ddpm_hf.training.artifacts import read_metrics, run_folder, write_evaluation
    from ddpm_hf.training.config_file import read_run

    state, folder = PartialState(), Path(options.output_dir or options.model)
    check_output_folder("output_dir", folder, FILES)
    pipe = DDPMPipelineCustom.from_pretrained(options.model, backend=options.backend, variant=options.variant)
    pipe.to(state.device)
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=not state.is_main_process, desc="Sampling")
    files = run_folder(options.model)
    run = read_run(files)
    evaluation = Evaluation(options, pipe, run, average_of_weights(run, read_metrics(files)) if run else None)
    evaluation.measure_bounds()
    written, problem = False, evaluation.problem
    try:
        for _ in evaluation.measure_samples():
            if state.is_main_process:
                write_evaluation(folder, evaluation.result, evaluation.pictures)
            written = True
    except (ValueError, OSError) as error:
        problem = f"no distances, because of an error: {error}"
    lines = [describe(evaluation.result), report(evaluation.result)]
    if not written and problem and read_metrics(folder).get("evaluation", {}).get("figures"):
        lines.append(f"Not written: {folder / 'metrics.json'} has distances, which this evaluation lacks.")
    else:
        if not written and state.is_main_process:
            write_evaluation(folder, evaluation.result, evaluation.pictures)
        lines.append(f"Written: metrics.json, {', '.join(evaluation.pictures)} in {folder}/")
    return "\n".join(lines), problem


def describe(evaluation: dict) -> str:
    """The line above the results."""
    p = evaluation["protocol"]
    reference = f"the {p['split']} split" if p["split"] else p["reference"]
    return f"{p['num_samples']} samples, {p['sampler']}, {p['steps']} steps, seed {p['seed']}, against {reference}"


def main(arguments: Sequence[str] | None = None) -> None:
    prepare_process()
    parser = OptionParser(EvaluationOptions, __doc__.splitlines()[0])
    try:
        options = parser.parse(arguments)
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())
        text, problem = evaluate(options)
    except (ValueError, TypeError, OSError) as error:
        fail("evaluate.py", error)
    if state.is_main_process:
        print(text)
    if problem is not None:
        fail("evaluate.py", problem)


if __name__ == "__main__":
    main()
