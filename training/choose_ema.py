"""Choose the length of the EMA of the weights after training:

    python training/choose_ema.py --model outputs/run --lengths 0.05 0.1 0.15

Rebuilds averages of these lengths σ_rel from the snapshots of a run with `--ema_snapshot_every_images`
(ddpm_hf/training/posthoc_ema.py), measures each, prints and draws the results, and writes the best average into the run's
folder. The work is spread over the processes, and the results do not depend on their number.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import ddpm_hf
from ddpm_hf.files import atomic_file, atomic_folder, lock_folder, move_file
from ddpm_hf.options import check_options, option
from ddpm_hf.training.option_parser import OptionParser
from ddpm_hf.training.processes import fail, prepare_process

# Modules that import torch are imported in functions, after the options are parsed, so that --help answers at once.

PENDING = ".ema.pending"  # a complete set of files that replaces those in the run's folder


@dataclass
class EMAArguments:
    model: str = option(MISSING, "folder of a run that saved snapshots of its averages")
    lengths: list[float] = option(
        [0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2],
        "σ_rel: standard deviations in time of the averages, as shares of the run's length",
        "(0, 0.2887)",
    )
    images_seen: int | None = option(None, "end of the averages in images; None: the run's end", "[1, inf)")
    criterion: Literal["loss", "bits_per_dim", "fd"] = option(
        "loss", "lowest loss or bits/dim of validation images, or Fréchet distance of samples"
    )
    validation_images: int = option(1000, "loss and bits_per_dim: maximum number of validation images", "[1, inf)")
    bound_stride: int = option(20, "bits_per_dim: take each image at every n-th timestep", "[1, inf)")
    features: str | None = option(None, "fd: as for evaluate.py")
    num_samples: int = option(500, "fd: samples of each average", "[1, inf)")
    steps: int = option(100, "fd: sampling steps", "[1, inf)")
    seed: int = option(0, "seed of the noise and the samples", "[0, inf)")
    batch_size: int = option(256, "images per process at a time", "[1, inf)")
    cache_dir: str | None = option(None, "fd: folder for features of real images; None: in HF_HOME")
    measure_only: bool = option(False, "change nothing in the folder")

    def __post_init__(self):
        check_options(self)


def check(args: EMAArguments) -> None:
    """Raise ValueError for a folder that is not of a finished run."""
    for name in ("config.yaml", "metrics.json", "model_index.json"):
        if not (Path(args.model) / name).is_file():
            raise ValueError(f"model must be the folder of a finished run: {args.model} holds no {name}.")


Criterion = Callable[["ddpm_hf.DDPMPipelineCustom"], tuple[float, float | None]]


def make_criterion(args: EMAArguments, config, pipe, accelerator) -> tuple[str, Criterion]:
    """The name of what is minimized, and a function from a pipeline to its value and, if known, standard error. Whatever
    does not depend on the weights is computed here, once."""
    from ddpm_hf.evaluation.bounds import measure_bound
    from ddpm_hf.training.run_data import open_images
    from ddpm_hf.training.validation import ValidationLoss, load_validation_images

    if args.criterion == "fd":
        return make_frechet_criterion(args, config, pipe)
    wanted = replace(config, validation_images=args.validation_images, validate_every_steps=1)
    validation = open_images(config)[1] if config.validation_fraction else None
    validation = load_validation_images(wanted, validation, accelerator.device)
    if validation is None:
        raise ValueError(
            f"the data set {config.dataset!r} has no validation images for the criterion {args.criterion!r}: "
            "train with validation_fraction or validation_split, or choose by --criterion fd."
        )
    diffusion = pipe.scheduler.diffusion
    if args.criterion == "loss":
        loss = ValidationLoss(validation, diffusion, args.seed, accelerator, args.batch_size)
        return f"loss of {len(validation)} validation images", lambda pipe: (loss(pipe.unet), None)

    def bits_per_dim(pipe) -> tuple[float, float]:
        options = (args.validation_images, args.bound_stride, args.seed, "validation bound", args.batch_size)
        bound = measure_bound(pipe, diffusion, validation, *options)
        return bound.bits_per_dim, bound.standard_error

    return f"bits/dim of {len(validation)} validation images", bits_per_dim


def make_frechet_criterion(args: EMAArguments, config, pipe) -> tuple[str, Criterion]:
    """`make_criterion` for the Fréchet distance between samples and training images."""
    from ddpm_hf.data.finding import open_dataset
    from ddpm_hf.evaluation import features, measures
    from ddpm_hf.evaluation.metrics import check_enough, frechet_distance, moments

    backbone = features.load_backbone(args.features or features.default_features(config.dataset), pipe.device)
    check_enough(args.num_samples, backbone.dim, "num_samples")
    labels = {"label_column": config.label_column, "has_classes": config.class_embed_type is None}
    dataset = open_dataset(config.dataset, config.dataset_config, config.split, config.dataset_revision, **labels)
    training = measures.model_images(dataset, pipe.unet.config, asdict(config), config.image_column, None)
    measures.split_as_trained(training, asdict(config))
    source = {name: getattr(config, name) for name in ("dataset", "dataset_config", "split")}
    of_training = measures.real_features(backbone, training, source, args.batch_size, args.cache_dir)
    reference = moments(of_training, "the training split")
    conditions = measures.draw_conditions(pipe, training, args.num_samples, args.seed)

    def distance(pipe) -> tuple[float, None]:
        samples = measures.make_samples(pipe, args.num_samples, args.steps, args.seed, args.batch_size, conditions)
        of_samples = measures.features_of(backbone, lambda i: samples[i], len(samples), args.batch_size)
        return frechet_distance(moments(of_samples), reference), None

    return features.metric_name("FD", backbone.label, args.num_samples), distance


def load_parameters(state: Mapping, unet) -> None:
    """Copy rebuilt averages into a network's parameters. Raises ValueError for those of another network."""
    parameters = dict(unet.named_parameters())
    if {n: v.shape for n, v in state.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError("the snapshots are of another network than the model in the folder.")
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name])


def sweep(args: EMAArguments, config, accelerator) -> tuple[dict, "ddpm_hf.DDPMPipelineCustom"]:
    """The values of all lengths, as "ema" in metrics.json, and the pipeline with the best weights."""
    from ddpm_hf.training.posthoc_ema import list_snapshots, plan_rebuild, rebuild
    from ddpm_hf.training.run_logger import SNAPSHOTS

    folder, lengths = Path(args.model), sorted(set(args.lengths))
    snapshots = list_snapshots(folder / SNAPSHOTS)
    if not snapshots:
        raise ValueError(f"{folder} holds no snapshots ({SNAPSHOTS}/): train with --ema_snapshot_every_images N.")
    plans = {length: plan_rebuild(snapshots, length, args.images_seen) for length in lengths}
    pipe = ddpm_hf.DDPMPipelineCustom.from_pretrained(folder)
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    name, criterion = make_criterion(args, config, pipe, accelerator)
    before = {key: p.detach().clone() for key, p in pipe.unet.named_parameters()}
    value_before, error = criterion(pipe)
    accelerator.print(f"{'σ_rel':>10s} {'profile error':>15s}   {name}")
    accelerator.print(f"{'in folder':>10s} {'':>15s}   {format_value(value_before, error)}")
    curve, best, best_value, images_seen = [], None, value_before, None
    for length, plan in plans.items():
        load_parameters(rebuild(plan), pipe.unet)
        value, error = criterion(pipe)
        images_seen = plan.images_seen
        row = {"length": length, "value": value, "profile_error": plan.profile_error}
        curve.append(row | ({} if error is None else {"standard_error": error}))
        accelerator.print(f"{length:10g} {plan.profile_error:15.1e}   {format_value(value, error)}")
        if value < best_value:
            best, best_value = length, value
    load_parameters(before if best is None else rebuild(plans[best]), pipe.unet)
    found = {"length": best, "value": best_value, "criterion": name, "images_seen": images_seen}
    return found | {"value_before": value_before, "seed": args.seed, "curve": curve}, pipe


def write(folder: Path, config, ema: dict, pipe, batch_size: int) -> None:
    """Replace the weights, their pictures and metrics, metrics.json and the card. Metrics of the old weights are dropped."""
    from ddpm_hf.training.artifacts import read_metrics, show, write_metrics_and_card
    from ddpm_hf.training.run_data import open_images, preview_conditions

    conditions = preview_conditions(open_images(config)[0], config) if config.class_embed_type else None
    pictures, quality = show(pipe, config, batch_size, conditions)
    metrics = {"training": read_metrics(folder)["training"], **quality, "ema": ema}
    with atomic_folder(folder / PENDING) as staged:
        pipe.save_pretrained(staged)
        for name, content in (pictures | {"ema.png": draw_curve(ema)}).items():
            atomic_file(staged / name, content)
        write_metrics_and_card(staged, (folder / "config.yaml").read_text(), metrics)
    finish_writing(folder)


def finish_writing(folder: Path) -> None:
    """Move the pending files into the folder. If the process is killed meanwhile, the next call completes it."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    for file in sorted(file for file in pending.rglob("*") if file.is_file()):
        target = folder / file.relative_to(pending)
        target.parent.mkdir(parents=True, exist_ok=True)
        move_file(file, target)
    shutil.rmtree(pending)


def draw_curve(ema: dict) -> bytes:
    from ddpm_hf.evaluation.plots import figure_bytes, length_curve

    lengths, values = [row["length"] for row in ema["curve"]], [row["value"] for row in ema["curve"]]
    errors = [row.get("standard_error", 0.0) for row in ema["curve"]]
    best = values.index(min(values))
    return figure_bytes(length_curve(lengths, values, ema["criterion"], errors if any(errors) else None, best))


def format_value(value: float, error: float | None) -> str:
    return f"{value:.6g}" + ("" if error is None else f" ± {error:.2g}")


def main(arguments: Sequence[str] | None = None) -> None:
    prepare_process()
    parser = OptionParser(EMAArguments, __doc__)
    with ExitStack() as stack:
        try:
            args = parser.parse(arguments)
            check(args)
            import torch
            from accelerate import Accelerator

            from ddpm_hf.training.config import TrainingConfig
            from ddpm_hf.training.presets import load_preset

            folder = Path(args.model)
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
                atomic_file(folder / "ema.png", draw_curve(ema))
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
