"""Choose the length of the weights' average after training:

    accelerate launch training/choose_ema.py --model outputs/run --lengths 0.05 0.1 0.15

rebuilds averages of these lengths σ_rel from the snapshots that a run with `--ema_snapshot_every_images` left
(ddpm_hf/posthoc_ema.py), measures each, prints the figures, draws them, and puts the best into the run's folder. Every
process computes a share, and the figures are the same for any number of them.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from ddpm_hf.scripts.evaluate import EvaluateArguments
from transformers import HfArgumentParser

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.evaluation.features import figure_name, load_backbone
from ddpm_hf.evaluation.measures import Shares, features_of, make_samples, measure_bound, real_features, training_images
from ddpm_hf.evaluation.metrics import check_enough, frechet_distance, moments
from ddpm_hf.evaluation.plots import figure_bytes, length_curve
from ddpm_hf.files import atomic_file, lock_folder
from ddpm_hf.training.artifacts import read_metrics, show, write_metrics_and_card
from ddpm_hf.training.config import TrainingConfig, load_preset
from ddpm_hf.training.posthoc_ema import list_snapshots, plan_rebuild, rebuild
from ddpm_hf.training.processes import fail
from ddpm_hf.training.run_data import open_images
from ddpm_hf.training.run_logger import SNAPSHOTS
from ddpm_hf.training.validation import ValidationLoss, load_validation_images

UNFINISHED, PENDING = ".ema.unfinished", ".ema.pending"


@dataclass
class EMAArguments:
    model: str = field(metadata={"help": "the folder of a run that kept snapshots of its averages"})
    lengths: list[float] = field(
        default_factory=lambda: [0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2],
        metadata={"help": "σ_rel: the averages' standard deviations in time, as shares of the run's length"},
    )
    images_seen: int | None = field(default=None, metadata={"help": "when in the run; None: at its end"})
    criterion: Literal["loss", "bits_per_dim", "fd"] = field(
        default="loss", metadata={"help": "least loss or bits/dim of validation images, or Fréchet distance of samples"}
    )
    validation_images: int = field(default=1000, metadata={"help": "for loss and bits_per_dim: as many, at most"})
    bound_stride: int = field(default=20, metadata={"help": "bits_per_dim: each image at every n-th timestep"})
    features: str | None = field(default=None, metadata={"help": "fd: see evaluate.py"})
    num_samples: int = field(default=500, metadata={"help": "fd: samples of each average"})
    steps: int = field(default=100, metadata={"help": "fd: sampling steps"})
    seed: int = 0
    batch_size: int = field(default=256, metadata={"help": "images per process at a time"})
    cache_dir: str | None = field(default=None, metadata={"help": "fd: features of real images; None: under HF_HOME"})
    measure_only: bool = field(default=False, metadata={"help": "change nothing in the folder"})

    def __post_init__(self):
        for name in ("validation_images", "bound_stride", "num_samples", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.lengths:
            raise ValueError("lengths must be one or more numbers, got none.")
        self.lengths = sorted(set(self.lengths))


@dataclass(frozen=True)
class Figure:
    """What is minimized: its name, and the function that takes it of a pipeline: value and standard error, if known."""

    name: str
    of: Callable[[DDPMPipelineCustom], tuple[float, float | None]]


def make_figure(args: EMAArguments, config: TrainingConfig, pipe: DDPMPipelineCustom, shares: Shares) -> Figure:
    """The figure of `args.criterion`; what does not depend on the weights is computed here, once."""
    options = EvaluateArguments(
        model=args.model,
        dataset=config.dataset,
        dataset_config=config.dataset_config,
        dataset_revision=config.dataset_revision,
        split=config.split,
        image_column=config.image_column,
        features=args.features,
        num_samples=args.num_samples,
        steps=args.steps,
        seed=args.seed,
        bound_images=max(args.validation_images, 2 * args.bound_stride),
        bound_stride=args.bound_stride,
        batch_size=args.batch_size,
        cache_dir=args.cache_dir,
    )
    if args.criterion == "fd":
        backbone = load_backbone(options.features, shares.accelerator.device)
        check_enough(args.num_samples, backbone.dim, "num_samples")
        training, _ = training_images(options, dataclasses.asdict(config), pipe.unet.config)
        reference = moments(real_features(backbone, training, config.split, options, shares), "the training split")

        def distance(pipe: DDPMPipelineCustom) -> tuple[float, None]:
            samples = make_samples(pipe, options, shares)
            features = features_of(backbone, lambda i: samples[i], len(samples), options, shares)
            return frechet_distance(moments(features), reference), None

        return Figure(figure_name("FD", backbone, args.num_samples), distance)
    wanted = dataclasses.replace(config, validation_images=args.validation_images, validate_every_steps=1)
    validation = open_images(config)[1] if config.validation_fraction else None
    validation = load_validation_images(wanted, validation, shares.accelerator.device)
    if validation is None:
        raise ValueError(
            f"the data set {config.dataset!r} has no validation images for the criterion {args.criterion!r}: "
            "train with validation_fraction or validation_split, or choose by --criterion fd."
        )
    diffusion = pipe.scheduler.diffusion
    if args.criterion == "loss":
        loss = ValidationLoss(validation, diffusion, args.seed, shares.accelerator, args.batch_size)
        return Figure(f"loss of {len(validation)} validation images", lambda pipe: (loss(pipe.unet), None))

    def bits(pipe: DDPMPipelineCustom) -> tuple[float, float]:
        bound = measure_bound(pipe, diffusion, validation, args.bound_stride, "validation bound", options, shares)
        return bound.bits_per_dim, bound.standard_error

    return Figure(f"bits/dim of {len(validation)} validation images", bits)


@torch.no_grad()
def load_parameters(state: Mapping[str, torch.Tensor], unet: torch.nn.Module) -> None:
    """Write rebuilt averages into a network's parameters. Raises ValueError for those of another network."""
    parameters = dict(unet.named_parameters())
    if {n: v.shape for n, v in state.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError("the snapshots are of another network than the model in the folder.")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def sweep(args: EMAArguments, config: TrainingConfig, accelerator: Accelerator) -> tuple[dict, DDPMPipelineCustom]:
    """The figures of all lengths, as metrics.json holds them under "ema", and the pipeline with the best weights."""
    folder, shares = Path(args.model), Shares(accelerator)
    snapshots = list_snapshots(folder / SNAPSHOTS)
    if not snapshots:
        raise ValueError(
            f"{folder} holds no snapshots of averages ({SNAPSHOTS}/): train with --ema_snapshot_every_images N."
        )
    for length in args.lengths:
        plan_rebuild(snapshots, length, args.images_seen)  # raises ValueError for a length that cannot be rebuilt
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    figure = make_figure(args, config, pipe, shares)
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    value, error = figure.of(pipe)
    accelerator.print(f"{'σ_rel':>10s} {'profile off by':>15s}   {figure.name}")
    accelerator.print(f"{'in folder':>10s} {'':>15s}   {_value(value, error)}")
    curve, best, best_value, images_seen = [], None, value, None
    for length in args.lengths:
        rebuilt = rebuild(snapshots, length, args.images_seen)
        load_parameters(rebuilt.state, pipe.unet)
        of_length, error = figure.of(pipe)
        images_seen = rebuilt.images_seen
        row = {"length": length, "value": of_length, "profile_error": rebuilt.profile_error}
        curve.append(row | ({} if error is None else {"standard_error": error}))
        accelerator.print(f"{length:10g} {rebuilt.profile_error:15.1e}   {_value(of_length, error)}")
        if of_length < best_value:
            best, best_value = length, of_length
    load_parameters(before if best is None else rebuild(snapshots, best, args.images_seen).state, pipe.unet)
    found = {"length": best, "value": best_value, "criterion": figure.name, "images_seen": images_seen}
    return found | {"value_before": value, "seed": args.seed, "curve": curve}, pipe


def write(folder: Path, config: TrainingConfig, ema: dict, pipe: DDPMPipelineCustom, batch_size: int) -> None:
    """The weights, their pictures and figures, metrics.json and the card, all together.

    Figures that were measured of the weights before are taken out.
    """
    pictures, quality = show(pipe, config, batch_size)
    metrics = {"training": read_metrics(folder)["training"], **quality, "ema": ema}
    beside = folder / UNFINISHED
    shutil.rmtree(beside, ignore_errors=True)
    pipe.save_pretrained(beside)
    for name, content in (pictures | {"ema.png": curve_picture(ema)}).items():
        atomic_file(beside / name, content)
    write_metrics_and_card(beside, (folder / "config.yaml").read_text(), metrics)
    os.replace(beside, folder / PENDING)
    finish_writing(folder)


def finish_writing(folder: Path) -> None:
    """Move what was written whole to its place; a process that was killed in this is made up for by the next one."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    for file in sorted(file for file in pending.rglob("*") if file.is_file()):
        place = folder / file.relative_to(pending)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(pending)


def curve_picture(ema: dict) -> bytes:
    lengths, values = [row["length"] for row in ema["curve"]], [row["value"] for row in ema["curve"]]
    errors = [row.get("standard_error", 0.0) for row in ema["curve"]]
    best = values.index(min(values))
    return figure_bytes(length_curve(lengths, values, ema["criterion"], errors if any(errors) else None, best))


def _value(value: float, error: float | None) -> str:
    return f"{value:.6g}" + ("" if error is None else f" ± {error:.2g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(EMAArguments, description=__doc__, allow_abbrev=False)
    with ExitStack() as stack:
        try:
            (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
            folder = Path(args.model)
            for name in ("config.yaml", "metrics.json", "model_index.json"):
                if not (folder / name).is_file():
                    raise ValueError(f"model must be the folder of a finished run: {folder} holds no {name}.")
            config = TrainingConfig(**load_preset(str(folder / "config.yaml")))
            accelerator = Accelerator(cpu=not torch.accelerator.is_available())
            if accelerator.is_main_process and not args.measure_only:
                stack.enter_context(lock_folder(folder, wait_seconds=1))
                finish_writing(folder)
            accelerator.wait_for_everyone()
            ema, pipe = sweep(args, config, accelerator)
        except (ValueError, OSError) as error:
            fail("choose_ema.py", error)
        if accelerator.is_main_process:
            if args.measure_only:
                print("Nothing was written.")
            elif ema["length"] is None:
                atomic_file(folder / "ema.png", curve_picture(ema))
                print(
                    f"The weights in {folder}/ are at least as good as these averages, and stay. The curve is in ema.png."
                )
            else:
                write(folder, config, ema, pipe, args.batch_size)
                print(
                    f"Best: σ_rel = {ema['length']:g}. Its weights, card and metrics are in {folder}/, the curve in ema.png."
                )
        accelerator.end_training()


if __name__ == "__main__":
    main()
