"""How good a model is after so many minutes of training: `python -m benchmarks.time_to_quality --dataset path/to/mnist
--classifier outputs/classifiers/mnist --side stock`, then the same with `--side ddpm_hf`

Both sides train a class-conditional network of the same number of parameters on this machine. The stock side is diffusers'
train_unconditional.py: `UNet2DModel` with its initialization, ε, uniform timesteps, AdamW with a rate of 1e-4 that falls
along a cosine, and its EMA. The other side is training/train.py with a preset, for each number of minutes a run of its own.
`--options` changes the preset, to see what helps; with `--images`, a run is as long as so many images, and the machine need
not be idle. After each length, training/evaluate.py measures the same figures of both on the features of a classifier
(benchmarks/classifier.py). Measuring does not count as training, and comes last.
"""

import contextlib
import io
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from ddpm_hf.scripts import evaluate, train
from diffusers import DDPMPipeline
from transformers.hf_argparser import HfArg, HfArgumentParser

from benchmarks.training import BenchmarkArguments, Stock
from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.training.artifacts import read_metrics
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.presets import load_preset

SHAPE = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "norm_num_groups")


@dataclass
class QualityArguments:
    dataset: str = HfArg(help="labelled images with the splits train and test")
    classifier: str = HfArg(help="folder of a classifier of these images")
    side: Literal["stock", "ddpm_hf"] = HfArg(help="who trains")
    preset: str = HfArg(default="mnist", help="of the network, and of the training of ddpm_hf")
    options: str = HfArg(default="", help="further options of train.py")
    minutes: list[float] = field(default_factory=lambda: [10.0, 20.0, 40.0, 60.0])
    images: list[int] | None = HfArg(default=None, help="ddpm_hf: train on so many images, in place of minutes")
    batch_size: int = HfArg(default=64, help="of stock")
    seconds_to_time: float = HfArg(
        default=20.0, help="for the speed of stock, from which the length of its cosine follows"
    )
    output_dir: str = HfArg(default="outputs/time_to_quality", help="folder of the models and their figures")
    num_samples: int = HfArg(default=2000, help="samples for the distance")
    steps: int = HfArg(default=100, help="sampling steps")
    scheduler: str | None = HfArg(default=None, help="sampler of evaluate.py; the model's own by default")
    bound_images: int = HfArg(default=100, help="test images for bits/dim")


def label_of(args: QualityArguments) -> str:
    words = re.sub(r"[^\w.]+", "_", args.options).strip("_")
    return args.side + (f"-{words}" if words else "")


def folder_of(args: QualityArguments, length: float) -> Path:
    return Path(args.output_dir) / label_of(args) / f"{length:g}_{'images' if args.images else 'minutes'}"


def run_script(script: ModuleType, *options: object) -> str:
    """Run a script; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script.main([str(option) for option in options])
    return printed.getvalue()


def train_ddpm_hf(args: QualityArguments, length: float) -> tuple[float, int]:
    """Train a model for so many minutes, or images. Returns the minutes that it took and the images seen."""
    folder = folder_of(args, length)
    options = ["--config", args.preset, "--dataset", args.dataset, *args.options.split(), "--output_dir", folder]
    options += ["--report_to", "none", "--quality_samples", 0, "--sample_steps", 50, "--sample_every_steps", 0]
    options += ["--validate_every_steps", 0, "--checkpoint_every_steps", 10**9]
    if args.images is None:
        printed = run_script(train, *options, "--total_images", 10**9, "--dry_run")
        rate = float(re.search(r"^Speed\s+([\d.,]+) images/s", printed, re.MULTILINE)[1].replace(",", ""))
        length *= 60 * rate
    run_script(train, *options, "--total_images", int(length), "--overwrite")
    training = read_metrics(folder)["training"]
    return training["seconds"] / 60, training["images_seen"]


def stock_trainer(args: QualityArguments, total_steps: int) -> Stock:
    config = TrainingConfig(**(load_preset(args.preset) | {"dataset": args.dataset, "batch_size": args.batch_size}))
    config = replace(config, num_classes=10, label_dropout=0.0)
    sizes = {"sample_size": config.resolution[0], "in_channels": config.channels, "out_channels": config.channels}
    shape = {name: getattr(config, name) for name in SHAPE} | {"num_class_embeds": config.num_classes}
    torch.manual_seed(0)
    unet = UNet2DModelCustom(**sizes, **shape)  # initialized as diffusers does
    return Stock(config, unet, DDPMSchedulerCustom(), BenchmarkArguments(), None, total_steps)


def train_stock(args: QualityArguments):
    """Train a model; yields, after each number of minutes, the minutes, the images seen and the pipeline."""
    trial, start, steps = stock_trainer(args, 0), time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds_to_time:
        trial.run(1)
        steps += 1
    trainer = stock_trainer(args, int(steps / args.seconds_to_time * 60 * max(args.minutes)))
    seconds = 0.0
    for minutes in sorted(args.minutes):
        start = time.perf_counter()
        while seconds + time.perf_counter() - start < 60 * minutes:
            trainer.run(1)
        seconds += time.perf_counter() - start
        unet = trainer.accelerator.unwrap_model(trainer.model)
        trainer.ema.store(unet.parameters())
        trainer.ema.copy_to(unet.parameters())
        yield minutes, seconds / 60, trainer.step * args.batch_size, DDPMPipeline(unet, trainer.scheduler)
        trainer.ema.restore(unet.parameters())
        unet.train()


def measure(args: QualityArguments, folder: Path) -> dict:
    """The figures of a model, from training/evaluate.py."""
    options = ["--model", folder, "--dataset", args.dataset, "--label_column", "label", "--features", args.classifier]
    options += ["--num_samples", args.num_samples, "--steps", args.steps, "--bound_images", args.bound_images]
    run_script(evaluate, *options, *(["--schedulers", args.scheduler] if args.scheduler else []))
    return read_metrics(folder)["evaluation"]


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(QualityArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if args.images and args.side == "stock":
        parser.error("--images is for --side ddpm_hf: the length of stock's cosine follows from its minutes")
    heads = ("minutes", "images seen", "FD", "recognized", "held-out loss of ε", "bits/dim")
    print(f"| {label_of(args)} | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}", flush=True)

    def report(folder: Path, minutes: float, images: int) -> None:
        evaluation = measure(args, folder)
        values = {figure["name"].split("-")[0]: figure["value"] for figure in evaluation["figures"]}
        bound = next(b for name, b in evaluation["bits_per_dim"].items() if name.startswith("validation"))
        by_t = bound["epsilon_mse"]
        loss = sum(by_t) / len(by_t)  # L_simple of ε over uniform t, whatever is predicted
        cells = (f"{minutes:.1f}", f"{images:,}", f"{values['FD']:.3f}", f"{values['recognized']:.1%}", f"{loss:.5f}")
        print(f"| | {' | '.join(cells)} | {bound['bits_per_dim']:.3f} |", flush=True)

    def trained():
        if args.side == "stock":
            for minutes, took, images, pipe in train_stock(args):
                pipe.save_pretrained(folder_of(args, minutes))
                yield folder_of(args, minutes), took, images
        else:
            for length in sorted(args.images or args.minutes):
                yield folder_of(args, length), *train_ddpm_hf(args, length)

    for folder, took, images in list(trained()):  # all training first: only that needs an idle machine
        report(folder, took, images)


if __name__ == "__main__":
    main(sys.argv[1:])
