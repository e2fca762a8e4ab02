"""Files of a finished run: pipeline, figures, metrics.json and model card, each complete or absent."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.data.builtin import BUILTIN
from ddpm_hf.evaluation.encoding import PNG_CHANNELS
from ddpm_hf.evaluation.judges import judge_of
from ddpm_hf.evaluation.plots import denoising_strip, figure_bytes, image_grid, loss_curve
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.files import atomic_file
from ddpm_hf.hub.model_card import make_card, update_results
from ddpm_hf.pipelines.denoising import NonFiniteSamples
from ddpm_hf.pipelines.guidance import class_names_of
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.progress import counted_steps, progress_bar
from ddpm_hf.transfer.downloads import Retries, download_snapshot

# What a run writes into its folder.
FILES = (
    "config.yaml",
    "log.jsonl",
    "metrics.json",
    "README.md",
    "model_index.json",
    "samples.png",
    "denoising.png",
    "loss.png",
    ".lock",
)
FOLDERS = ("checkpoints", "unet", "scheduler", "samples", "ema_snapshots", "unpublished", "logs", "lora")
NUMBERS = re.compile(r"\[\s*(-?\d[^\[\]{}\"]*?)\s*\]")
GRID, STRIP = 100, 4  # images in samples.png and in denoising.png


def write_artifacts(
    config: TrainingConfig,
    unet: UNet2DModelCustom,
    scheduler: DDPMSchedulerCustom,
    log: list[dict],
    training: dict,
    conditions: torch.Tensor | None = None,
) -> None:
    """Write all files into `config.output_dir` and print what can be done with them.

    Args:
        unet: with the averaged weights.
        log: the rows of log.jsonl.
        training: the entry "training" of metrics.json.
        conditions: see `show`.
    """
    output_dir = Path(config.output_dir)
    pipe = DDPMPipelineCustom(unet, scheduler)
    pipe.save_pretrained(output_dir)

    try:
        pictures, quality = show(pipe, config, config.images_at_a_time(training["processes"]), conditions)
    except NonFiniteSamples as error:
        print(f"\nNo samples.png and denoising.png: {error}")
        pictures, quality = {}, {}
    for name, content in (pictures | {"loss.png": figure_bytes(loss_figure(log))}).items():
        atomic_file(output_dir / name, content)
    if names := class_names_of(unet):
        training = training | {"class_names": names}
    write_metrics_and_card(output_dir, config.to_yaml(), {"training": training} | quality)

    figures = ", ".join([*pictures, "loss.png"])
    print(f"\nDone. The model, its figures ({figures}) and its card are in {output_dir}/")
    options = "" if config.channels in PNG_CHANNELS else " --format npz"
    options += "" if config.class_embed_type is None else " --class_label <condition>"
    folder = shlex.quote(str(output_dir))
    print(f"  sample:    python training/sample.py --model {folder} --num_images 64{options}")
    if config.dataset in BUILTIN or training["validation_examples"]:  # images that were not trained on
        print(f"  evaluate:  python training/evaluate.py --model {folder} --dataset {shlex.quote(config.dataset)}")
    print(f"  publish:   python training/publish.py {folder} --repo_id <user>/<name>")


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def show(
    pipe: DDPMPipelineCustom, config: TrainingConfig, batch_size: int, conditions: torch.Tensor | None = None
) -> tuple[dict[str, bytes], dict]:
    """samples.png and denoising.png, and {"quality": ...} of the data set's judge, if there is one and
    `quality_samples` are asked for; else {}. `batch_size`: images sampled at once. `conditions`: for a model with
    `class_embed_type`, those of the first training images."""
    judge = judge_of(config.dataset) if config.quality_samples else None
    indices, purpose = range(GRID), "samples.png"
    if judge is not None:
        indices, purpose = range(max(GRID, config.quality_samples)), "samples.png and quality check"
    pipe.set_progress_bar_config(disable=True)
    calls = -(-len(indices) // batch_size)
    with progress_bar(purpose, calls * config.sample_steps, "steps") as bar:
        how = (config.sample_steps, config.seed, batch_size, conditions)
        samples = sample_images(pipe, indices, *how, callback_on_step_end=counted_steps(bar))
    pictures = {
        "samples.png": figure_bytes(image_grid(samples[:GRID])),
        "denoising.png": figure_bytes(denoising_figure(pipe, config.sample_steps, config.seed, conditions)),
    }
    if judge is None:
        return pictures, {}
    return pictures, {"quality": judge.judge(samples[: config.quality_samples], config.sample_steps, config.seed)}


def denoising_figure(
    pipe: DDPMPipelineCustom, num_inference_steps: int, seed: int, conditions: torch.Tensor | None = None
) -> Figure:
    """Images at several steps from noise to sample; of a class-conditional model, one of each of the first classes or
    `conditions`."""
    return denoising_strip(pipe, STRIP, num_inference_steps, seed, conditions=conditions)


def loss_figure(log: Sequence[dict]) -> Figure:
    """Training and validation losses from the rows of a log."""

    def column(name: str) -> tuple[list[int], list[float]]:
        rows = [row for row in log if row.get(name) is not None]
        return [row["images"] for row in rows], [row[name] for row in rows]

    names = {"validation images": "validation_loss", "validation images, averaged weights": "validation_loss_ema"}
    validation = {label: points for label, name in names.items() if (points := column(name))[0]}
    return loss_curve(*column("loss"), validation=validation)


def read_metrics(folder: Path) -> dict:
    """The contents of metrics.json in a folder; {} if there is no such file."""
    file = folder / "metrics.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_metrics(folder: Path, metrics: dict) -> None:
    """Write metrics.json: numbers to six digits, which is more than any of them is known to, and a list of numbers in one
    line."""
    text = json.dumps(_rounded(metrics), indent=2)
    text = NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    atomic_file(folder / "metrics.json", text + "\n")


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_metrics_and_card(folder: Path, config_yaml: str, metrics: dict) -> None:
    """Write metrics.json, and the model card that is made from it."""
    write_metrics(folder, metrics)
    atomic_file(folder / "README.md", str(make_card(config_yaml, metrics)))


def write_evaluation(folder: Path, evaluation: dict, pictures: dict[str, bytes]) -> None:
    """Write an evaluation into metrics.json, its pictures, and its results into the card. The card of a training run is
    made again from its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        atomic_file(folder / name, content)
    metrics, card = read_metrics(folder) | {"evaluation": evaluation}, folder / "README.md"
    if "training" in metrics and (folder / "config.yaml").is_file():
        write_metrics_and_card(folder, (folder / "config.yaml").read_text(), metrics)
        return
    write_metrics(folder, metrics)
    if card.is_file():
        atomic_file(card, update_results(card.read_text(), folder.name, evaluation))


def run_folder(model: str) -> Path:
    """The folder of a model's config.yaml and metrics.json, if it has them: `model` itself, or a download from the Hub."""
    if Path(model).is_dir():
        return Path(model)
    return download_snapshot(model, Retries(tries=3), allow_patterns=["config.yaml", "metrics.json"])
