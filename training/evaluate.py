"""Measure a trained model: `accelerate launch training/evaluate.py --model outputs/digits --dataset digits`.

Prints the variational bound of validation images in bits/dim, distances of samples to real images on the features of a
vision backbone, and how near samples lie to training images, each with its protocol; writes metrics.json, figures and the
model card's results. Every process computes a share, and the figures are the same for any number of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from transformers import HfArgumentParser

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.diffusion.timesteps import spaced_timesteps
from ddpm_hf.evaluation.features import dataset_revision, figure_name, load_backbone
from ddpm_hf.evaluation.measures import (
    Shares,
    choose_variance,
    features_of,
    make_samples,
    measure_bound,
    read_samples,
    real_features,
    real_images,
    resizing,
)
from ddpm_hf.evaluation.metrics import (
    check_enough,
    density_coverage,
    frechet_distance,
    kernel_distance,
    memorization,
    moments,
    precision_recall,
)
from ddpm_hf.evaluation.plots import bound_by_timestep, closest_pairs, figure_bytes
from ddpm_hf.files import atomic_file
from ddpm_hf.hub.model_card import average_of_weights, update_results
from ddpm_hf.training.artifacts import read_metrics, write_metrics, write_metrics_and_card
from ddpm_hf.training.processes import fail


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "a folder, or a repository on the Hub"})
    dataset: str = field(metadata={"help": "'digits', 'photos', a folder of images, or a data set on the Hub"})
    dataset_config: str | None = None
    dataset_revision: str | None = field(
        default=None, metadata={"help": "of a data set on the Hub: branch, tag, commit"}
    )
    split: str = field(default="train", metadata={"help": "what the model was trained on; distances are to these"})
    validation_split: str = field(
        default="test",
        metadata={"help": "what it was not trained on; if there is none, the run's validation_fraction of `split`"},
    )
    image_column: str | None = None
    label_column: str | None = field(
        default=None, metadata={"help": "the classes that a class-conditional model is told; None: the run's"}
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "'digits', 'inception', or a vision model of transformers; None: digits, or facebook/dinov2-base"
        },
    )
    num_samples: int = 500
    samples: str | None = field(default=None, metadata={"help": "a folder of images to judge; None: sample the model"})
    steps: int = field(default=100, metadata={"help": "sampling steps, and length of the respaced chain"})
    variance_type: str | None = field(
        default=None, metadata={"help": "fixed_small, fixed_large or analytic; None: the model's own"}
    )
    seed: int = 0
    bound_images: int = field(default=360, metadata={"help": "images that the bound is an average over, at most"})
    bound_stride: int = field(
        default=20, metadata={"help": "the full chain's terms: each image at every n-th timestep"}
    )
    analytic_images: int = field(default=64, metadata={"help": "training images for the moments of analytic variance"})
    batch_size: int = field(default=256, metadata={"help": "images per process at a time"})
    output_dir: str | None = field(default=None, metadata={"help": "where to write; None: the model's folder"})
    cache_dir: str | None = field(default=None, metadata={"help": "features of real images; None: under HF_HOME"})

    def __post_init__(self):
        for name in ("num_samples", "steps", "bound_images", "bound_stride", "analytic_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.bound_images < 2 * self.bound_stride:
            raise ValueError(
                f"bound_images must be at least 2 × bound_stride = {2 * self.bound_stride}, got {self.bound_images}."
            )
        if self.variance_type not in (None, "fixed_small", "fixed_large", "analytic"):
            raise ValueError(f"variance_type must be fixed_small, fixed_large or analytic, got {self.variance_type!r}.")
        if self.output_dir is None and not Path(self.model).is_dir():
            raise ValueError(f"output_dir must be given for a model that is no folder here, {self.model!r}.")
        self.features = self.features or ("digits" if self.dataset == "digits" else "facebook/dinov2-base")


def compare(samples, training, validation, backbone, protocol: dict) -> list[dict]:
    """Every figure of the samples' features against the training images', and validation images' for a yardstick."""
    figures = []
    protocol = protocol | {"reference": f"{protocol['split']} split, {len(training)} images"} | backbone.protocol

    def add(name, value, of_validation, error=None):
        entry = {"name": name, "value": value, "validation": of_validation, "protocol": protocol}
        figures.append(entry | ({} if error is None else {"standard_error": error}))

    reference, n = moments(training, "the training split"), len(samples)
    enough = len(validation) > backbone.dim
    add(
        figure_name("FD", backbone, n),
        frechet_distance(moments(samples, "num_samples"), reference),
        frechet_distance(moments(validation), reference) if enough else None,
    )
    kernel = "rbf" if backbone.label == "CLIP" else "polynomial"
    ours, theirs = (kernel_distance(x, training, kernel) for x in (samples, validation))
    add(figure_name("MMD", backbone, n), ours.value, theirs.value, ours.standard_error)
    names = ("precision", "recall", "density", "coverage")
    pairs = [(*precision_recall(training, x), *density_coverage(training, x)) for x in (samples, validation)]
    for name, of_samples, of_validation in zip(names, *pairs):
        add(figure_name(name, backbone, n), of_samples, of_validation)
    return figures


def evaluate(args: EvaluateArguments, accelerator: Accelerator) -> dict:
    """All figures, as metrics.json holds them under "evaluation", and the figures' PNG files under "pictures"."""
    shares, device = Shares(accelerator), accelerator.device
    pipe = DDPMPipelineCustom.from_pretrained(args.model)
    pipe.to(device)
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=not accelerator.is_main_process, desc="Sampling")
    config = pipe.unet.config
    run = Path(args.model) / "config.yaml"
    run = yaml.safe_load(run.read_text()) if run.is_file() else {}
    training, validation, validation_split = real_images(args, run, config)
    size = training.size
    backbone = load_backbone(args.features, device)
    check_enough(args.num_samples, backbone.dim, "num_samples")
    check_enough(len(training), backbone.dim, f"split {args.split!r}")
    samples = None if args.samples is None else read_samples(args, size, config.in_channels)
    choose_variance(pipe, args.variance_type, training, args, device)

    diffusion, scheduler = pipe.scheduler.diffusion, pipe.scheduler.config
    spacing = spaced_timesteps(len(diffusion), args.steps, scheduler.timestep_spacing, scheduler.steps_offset)
    chain = diffusion.respace(spacing)
    bounds = {
        f"training, {len(diffusion)} steps": (diffusion, training, args.bound_stride, "training bound"),
        f"validation, {len(diffusion)} steps": (diffusion, validation, args.bound_stride, "validation bound"),
    }
    if args.steps < len(diffusion):
        bounds[f"validation, {args.steps} steps"] = (chain, validation, 1, "validation bound")
    bounds = {name: measure_bound(pipe, c, i, s, p, args, shares) for name, (c, i, s, p) in bounds.items()}

    protocol = {
        "num_samples": args.num_samples,
        "split": args.split,
        "validation_split": validation_split,
        "dataset_revision": args.dataset_revision or dataset_revision(training.dataset),
        "samples": "the model's" if args.samples is None else Path(args.samples).name,
        "sampler": f"{type(pipe.scheduler).__name__}, {scheduler.variance_type}, {scheduler.timestep_spacing}",
        "steps": args.steps,
        "seed": args.seed,
        "labels": training.label_column,
        "weights": f"averaged {average_of_weights(run, read_metrics(Path(args.model)))}" if run else None,
        "resolution": list(size),
        "dataset_resize": resizing(training),
    }
    if samples is None:
        samples = make_samples(pipe, args, shares)
    of_samples = features_of(backbone, lambda i: samples[i], len(samples), args, shares)
    of_training = real_features(backbone, training, args.split, args, shares)
    of_validation = real_features(backbone, validation, validation_split, args, shares)
    if config.in_channels == 1 and backbone.channels == 3:
        accelerator.print("The gray images are repeated to RGB for the backbone.")
        protocol["channels"] = "gray repeated to RGB"
    figures = compare(of_samples, of_training, of_validation, backbone, protocol)

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255

    real = [images[range(len(images))]["images"] for images in (validation, training)]
    near = {
        "pixels": memorization(pixels(samples), *(pixels(images) for images in real)),
        "features": memorization(of_samples, of_validation, of_training),
    }
    pictures = {"bound.png": figure_bytes(bound_by_timestep(bounds))}
    for space, result in near.items():
        mine, theirs, distances = zip(*result.closest)
        cells = [x[list(i)].permute(0, 2, 3, 1).numpy() / 255 for x, i in ((samples, mine), (real[1], theirs))]
        pictures[f"closest_{space}.png"] = figure_bytes(closest_pairs(*cells, distances))
    evaluation = {
        "protocol": protocol,
        "dataset": args.dataset,
        "bits_per_dim": {name: asdict(bound) for name, bound in bounds.items()},
        "figures": figures,
        "memorization": {space: result.as_dict() for space, result in near.items()},
    }
    return {"evaluation": evaluation, "pictures": pictures}


def write(folder: Path, evaluation: dict, pictures: dict[str, bytes]) -> None:
    """metrics.json, the pictures and the card's results; a run's own card is made anew from all its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        atomic_file(folder / name, content)
    metrics = read_metrics(folder) | {"evaluation": evaluation}
    if "training" in metrics and (folder / "config.yaml").is_file():
        write_metrics_and_card(folder, (folder / "config.yaml").read_text(), metrics)
        return
    write_metrics(folder, metrics)
    if (folder / "README.md").is_file():
        atomic_file(folder / "README.md", update_results((folder / "README.md").read_text(), folder.name, evaluation))


def report(evaluation: dict) -> str:
    """The figures as lines to print."""
    lines = []
    for name, bound in evaluation["bits_per_dim"].items():
        share = f", each at every {bound['stride']}th t" if bound["stride"] > 1 else ""
        lines.append(
            f"{'bits/dim, ' + name:44s} {bound['bits_per_dim']:9.4f} ± {bound['standard_error']:.4f}  "
            f"L_T {bound['prior']:.5f}, L_0 {bound['terms'][0]:.4f}; {bound['num_images']} images{share}"
        )
    for figure in evaluation["figures"]:
        error = f" ± {figure['standard_error']:.4g}" if "standard_error" in figure else ""
        beside = "" if figure["validation"] is None else f"  (validation images {figure['validation']:.4f})"
        lines.append(f"{figure['name']:44s} {figure['value']:9.4f}{error}{beside}")
    for space, near in evaluation["memorization"].items():
        lines.append(
            f"{'nearer to training than 95 % of held-out, ' + space:52s} "
            f"{near['closer_than_5_percent_of_validation']:.1%}, p of being no nearer {near['closer_p_value']:.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(EvaluateArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        results = evaluate(args, accelerator)
    except (ValueError, OSError) as error:
        fail("evaluate.py", error)
    if accelerator.is_main_process:
        folder = Path(args.output_dir or args.model)
        write(folder, **results)
        p = results["evaluation"]["protocol"]
        print(f"{p['num_samples']} samples, {p['sampler']}, {p['steps']} steps, seed {p['seed']}, against {p['split']}")
        print(report(results["evaluation"]), f"\nWritten: metrics.json, {', '.join(results['pictures'])} in {folder}/")
    accelerator.end_training()


if __name__ == "__main__":
    main()
