"""Measure a trained model: `accelerate launch training/evaluate.py --model outputs/digits --dataset digits`.

Prints the variational bound of validation images in bits/dim, distances between samples and real images on the features
of a vision model, and how close samples are to training images. Writes them with their protocol into metrics.json,
draws figures, and adds the results to the model card. The work is spread over the processes, and the results do not
depend on their number.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from transformers.hf_argparser import HfArg, HfArgumentParser

import ddpm_hf
from ddpm_hf.checks import check_choice, check_int
from ddpm_hf.files import atomic_file
from ddpm_hf.training.processes import fail, prepare_process

# Modules that import torch are imported in functions, after the options are parsed, so that --help answers at once.

VARIANCES = ("fixed_small", "fixed_large", "analytic")


@dataclass
class EvaluateArguments:
    model: str = HfArg(help="folder, or repository on the Hub")
    dataset: str = HfArg(help="'digits', 'photos', a folder of images, or a data set on the Hub")
    dataset_config: str | None = HfArg(default=None, help="configuration of a data set on the Hub")
    dataset_revision: str | None = HfArg(default=None, help="branch, tag or commit of a data set on the Hub")
    split: str = HfArg(default="train", help="split that the model was trained on; distances are to it")
    validation_split: str | None = HfArg(
        default=None,
        help="split that it was not trained on; None: 'test'; without it, the run's validation_fraction of `split`, if any",
    )
    image_column: str | None = HfArg(default=None, help="column of images; None: the only one")
    label_column: str | None = HfArg(
        default=None, help="column of labels, for a class-conditional model; None: the run's"
    )
    features: str | None = HfArg(
        default=None,
        help="'inception', a vision model of transformers, or a built-in data set that has features of its own; "
        "None: the data set's own, or facebook/dinov2-base; images of 2, 4 or more channels have none; 'none': the bound alone",
    )
    num_samples: int | None = HfArg(default=None, help="number of samples; None: 500, or 5,000 for over 400 features")
    samples: str | None = HfArg(
        default=None, help="folder, .npz or .parquet of images to measure; None: sample from the model"
    )
    steps: int = HfArg(default=100, help="sampling steps, and the length of the respaced chain")
    variance_type: str | None = HfArg(default=None, help=f"{', '.join(VARIANCES)}; None: as saved with the model")
    seed: int = HfArg(default=0, help="seed of samples, of the bound, and of the images it is taken on")
    bound_images: int = HfArg(default=360, help="maximum number of images for the bound")
    bound_stride: int = HfArg(default=20, help="full chain: take each image at every n-th timestep")
    analytic_images: int = HfArg(default=64, help="training images for the moments of analytic variance")
    batch_size: int = HfArg(default=256, help="images per process at a time")
    output_dir: str | None = HfArg(default=None, help="folder to write to; None: the model's")
    cache_dir: str | None = HfArg(default=None, help="folder for features of real images; None: in HF_HOME")


def check(args: EvaluateArguments) -> None:
    """Raise ValueError, naming the option, for values that do not fit."""
    check_int("num_samples", 1 if args.num_samples is None else args.num_samples, 1)
    for name in ("steps", "bound_images", "bound_stride", "analytic_images", "batch_size"):
        check_int(name, getattr(args, name), 1)
    check_int("bound_images", args.bound_images, 2 * args.bound_stride, note="2 × bound_stride")
    if args.variance_type is not None:
        check_choice("variance_type", args.variance_type, VARIANCES)
    if args.split == (args.validation_split or "test"):
        raise ValueError(f"validation_split must be another split than split, which is {args.split!r}.")
    if args.output_dir is None and not Path(args.model).is_dir():
        raise ValueError(f"output_dir must be given for a model that is not a local folder, got model {args.model!r}.")


def default_num_samples(dim: int | None) -> int:
    """A number of samples that gives the covariance of `dim` features full rank; None for no features."""
    return 500 if dim is None or dim <= 400 else 5000


def evaluate(args: EvaluateArguments) -> dict:
    """All results: "evaluation" as in metrics.json, "pictures", PNG files by their names, and "problem", why features are
    missing, or None."""
    from accelerate import PartialState

    from ddpm_hf.data.finding import open_dataset
    from ddpm_hf.evaluation import features, measures, plots
    from ddpm_hf.evaluation.sample_files import read_samples
    from ddpm_hf.schedulers.samplers import as_ddpm

    check(args)
    state = PartialState()
    pipe = ddpm_hf.DDPMPipelineCustom.from_pretrained(args.model)
    pipe.to(state.device)
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=not state.is_main_process, desc="Sampling")
    config, run_file = pipe.unet.config, Path(args.model) / "config.yaml"
    run = yaml.safe_load(run_file.read_text()) if run_file.is_file() else {}
    has_features = config.in_channels in (1, 3) and args.features != "none"
    if config.in_channels not in (1, 3) and args.features not in (None, "none"):
        only = "the bound and distances in pixels can be measured without them"
        raise ValueError(f"features need images of 1 or 3 channels, the model has {config.in_channels}: {only}.")

    def open_split(split: str):
        labels = args.label_column or run.get("label_column")
        dataset = open_dataset(args.dataset, args.dataset_config, split, args.dataset_revision, label_column=labels)
        return measures.model_images(dataset, config, run, args.image_column, args.label_column)

    training, validation, validation_split = measures.real_images(open_split, run, args.split, args.validation_split)
    if validation is None:
        state.print("There are no validation images: their bound, best timesteps and memorization are left out.")
    samples = None
    if args.samples is not None and args.features != "none":
        samples = read_samples(args.samples, args.num_samples or 500, training.size, config.in_channels)
    if args.variance_type not in (None, as_ddpm(pipe.scheduler).config.variance_type):
        measures.set_variance(pipe, args.variance_type, training, args.analytic_images, args.seed)

    # First, because it needs neither features nor samples.
    bounds, table = measure_bounds(args, pipe, training, validation)
    pictures = {"bound.png": plots.figure_bytes(plots.bound_by_timestep(bounds))}
    evaluation = {
        "protocol": describe_protocol(args, pipe, training, validation_split, run) | {"num_samples": 0},
        "dataset": args.dataset,
        "bits_per_dim": {name: asdict(bound) for name, bound in bounds.items()},
        "best_timesteps": table,
        "figures": [],
        "memorization": {},
    }
    bound_alone = {"evaluation": evaluation, "pictures": pictures, "problem": None}
    backbone = None
    if has_features:
        try:
            backbone = features.load_backbone(args.features or features.default_features(args.dataset), state.device)
        except (ValueError, OSError) as error:
            return bound_alone | {"problem": f"no distances, because the features cannot be loaded: {error}"}
    elif args.features == "none":
        return bound_alone
    if samples is None:
        count = args.num_samples or default_num_samples(backbone and backbone.dim)
        conditions = measures.draw_conditions(pipe, training, count, args.seed)
        samples = measures.make_samples(pipe, count, args.steps, args.seed, args.batch_size, conditions)
    evaluation["protocol"]["num_samples"] = len(samples)
    splits = [(training, args.split), *([] if validation is None else [(validation, validation_split)])]
    return add_distances(args, evaluation, pictures, samples, splits, backbone)


def add_distances(args: EvaluateArguments, evaluation: dict, pictures: dict, samples, splits, backbone) -> dict:
    """The results with what is measured on samples. `splits`: training images and, if any, validation images, and their
    names."""
    from accelerate import PartialState

    from ddpm_hf.evaluation import measures

    state, protocol, images = PartialState(), evaluation["protocol"], [part for part, _ in splits]
    sets = None
    if backbone is None:
        state.print(
            f"Images of {images[0].channels} channels have no features: the bound and distances in pixels follow."
        )
    else:
        if images[0].channels == 1 and backbone.channels == 3:
            state.print("Gray images are repeated to RGB for the backbone.")
            protocol["channels"] = "gray repeated to RGB"
        sets = [measures.features_of(backbone, lambda i: samples[i], len(samples), args.batch_size)]
        for part, split in splits:
            source = {"dataset": args.dataset, "dataset_config": args.dataset_config, "split": split}
            sets.append(measures.real_features(backbone, part, source, args.batch_size, args.cache_dir))
        evaluation["figures"] = compute_metrics(*sets, backbone=backbone, protocol=protocol)
        if min(len(samples), len(images[0])) <= backbone.dim:
            found = f"there are {len(samples)} samples and {len(images[0])} training images"
            state.print(f"FD is left out: it needs at least {backbone.dim + 1} images on either side, {found}.")
    if len(images) == 2:
        evaluation["memorization"], closest = compare_with_training(samples, *images, sets)
        pictures = pictures | closest
    return {"evaluation": evaluation, "pictures": pictures, "problem": None}


def describe_protocol(args: EvaluateArguments, pipe, training, validation_split: str | None, run: dict) -> dict:
    """How the metrics are computed, as far as it does not depend on the backbone."""
    from ddpm_hf.evaluation import features, measures
    from ddpm_hf.hub.model_card import average_of_weights
    from ddpm_hf.training.artifacts import read_metrics

    scheduler, names = pipe.scheduler.config, ("variance_type", "timestep_spacing")
    return {
        "split": args.split,
        "validation_split": validation_split,
        "dataset_revision": args.dataset_revision or features.dataset_revision(training.dataset),
        "samples": "the model's" if args.samples is None else Path(args.samples).name,
        "sampler": ", ".join(
            [type(pipe.scheduler).__name__, *(scheduler[name] for name in names if scheduler.get(name))]
        ),
        "steps": args.steps,
        "seed": args.seed,
        "labels": training.label_column,
        "conditions": measures.describe_conditions(pipe, args.split) if args.samples is None else None,
        "weights": f"averaged {average_of_weights(run, read_metrics(Path(args.model)))}" if run else None,
        "resolution": list(training.size),
        "dataset_resize": measures.resizing(training),
    }


def measure_bounds(args: EvaluateArguments, pipe, training, validation) -> tuple[dict, dict | None]:
    """The full chain's bound on training and validation images, and on the latter that of two respaced chains: the sampling
    steps, and as many best timesteps. Also the table of best timesteps."""
    from ddpm_hf.diffusion.timesteps import spaced_timesteps
    from ddpm_hf.evaluation.best_timesteps import best_timesteps_table, timesteps_in_table
    from ddpm_hf.evaluation.measures import measure_bound
    from ddpm_hf.schedulers.samplers import as_ddpm

    ddpm = as_ddpm(pipe.scheduler)  # whatever the samples are made with
    full, config = ddpm.diffusion, ddpm.config

    def measure(chain, images, stride: int, purpose: str):
        return measure_bound(pipe, chain, images, args.bound_images, stride, args.seed, purpose, args.batch_size)

    bounds = {f"training, {len(full)} steps": measure(full, training, args.bound_stride, "training bound")}
    if validation is None:
        return bounds, None
    name = f"validation, {len(full)} steps"
    bounds[name] = measure(full, validation, args.bound_stride, "validation bound")
    table = best_timesteps_table(full, *bounds.values(), args.steps)
    chosen = {}
    if args.steps < len(full):
        spacing = (config.timestep_spacing, config.steps_offset)
        chosen[f"validation, {args.steps} steps"] = spaced_timesteps(len(full), args.steps, *spacing)
    if best := timesteps_in_table(table, args.steps):
        chosen[f"validation, best {args.steps} steps"] = best
    for name, timesteps in chosen.items():
        bounds[name] = measure(full.respace(timesteps), validation, 1, "validation bound")
    return bounds, table


def compute_metrics(samples, training, validation=None, *, backbone, protocol: dict) -> list[dict]:
    """Distances between features of samples and of training images, and the same of validation images to compare with."""
    from ddpm_hf.evaluation import metrics
    from ddpm_hf.evaluation.features import metric_name

    protocol = protocol | {"reference": f"{protocol['split']} split, {len(training)} images"} | backbone.protocol
    reference = metrics.moments(training, "the training split") if len(training) > backbone.dim else None
    kernel = "rbf" if backbone.label == "CLIP" else "polynomial"

    def measure(features) -> dict[str, tuple[float | None, float | None]]:
        """Values and, if known, standard errors."""
        has_moments = reference is not None and len(features) > backbone.dim
        distance = metrics.frechet_distance(metrics.moments(features), reference) if has_moments else None
        shares = (*metrics.precision_recall(training, features), *metrics.density_coverage(training, features))
        values = {"FD": (distance, None), "KD": metrics.kernel_distance(features, training, kernel)}
        return values | {
            name: (share, None) for name, share in zip(("precision", "recall", "density", "coverage"), shares)
        }

    rows, of_samples = [], measure(samples)
    of_validation = dict.fromkeys(of_samples, (None, None)) if validation is None else measure(validation)
    for kind, (value, error) in of_samples.items():
        if value is None:
            continue
        name = metric_name(kind, backbone.label, len(samples))
        row = {"name": name, "value": value, "validation": of_validation[kind][0], "protocol": protocol}
        rows.append(row if error is None else row | {"standard_error": error})
    return rows


def compare_with_training(samples, training, validation, feature_sets) -> tuple[dict, dict[str, bytes]]:
    """How close samples are to training images in pixels and, unless None, in features, and pictures of the closest pairs."""
    from ddpm_hf.evaluation import metrics, plots

    training, validation = (images[range(len(images))]["images"] for images in (training, validation))
    pixels = (images.flatten(1).float() / 255 for images in (samples, training, validation))
    results, pictures = {}, {}
    for space, rows in (("pixels", pixels), *([("features", feature_sets)] if feature_sets else [])):
        of_samples, of_training, of_validation = rows
        result = metrics.memorization(of_samples, of_validation, of_training)
        ours, theirs, distances = zip(*result.closest)
        cells = [x[list(i)].permute(0, 2, 3, 1).numpy() / 255 for x, i in ((samples, ours), (training, theirs))]
        pictures[f"closest_{space}.png"] = plots.figure_bytes(plots.closest_pairs(*cells, distances))
        results[space] = asdict(result)
    return results, pictures


def write(folder: Path, evaluation: dict, pictures: dict[str, bytes]) -> None:
    """Write metrics.json, the pictures and the card's results. The card of a training run is made again from its metrics."""
    from ddpm_hf.hub.model_card import update_results
    from ddpm_hf.training.artifacts import read_metrics, write_metrics, write_metrics_and_card

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


def report(evaluation: dict) -> str:
    """The results as lines to print."""
    lines = []
    for name, bound in evaluation["bits_per_dim"].items():
        share = f", each at 1 of {bound['stride']} timesteps" if bound["stride"] > 1 else ""
        lines.append(
            f"{'bits/dim, ' + name:44s} {bound['bits_per_dim']:9.4f} ± {bound['standard_error']:.4f}  "
            f"L_T {bound['prior']:.5f}, L_0 {bound['terms'][0]:.4f}; {bound['num_images']} images{share}"
        )
    if table := evaluation["best_timesteps"]:
        rows = ", ".join(f"{row['steps']} steps {row['predicted_bits_per_dim']:.4f}" for row in table["rows"])
        lines.append(f"{'bits/dim predicted for the best timesteps':44s} {rows}")
    elif any(name.startswith("validation") for name in evaluation["bits_per_dim"]):
        lines.append("no best timesteps: they are for fixed variances, the model's is learned")
    for figure in evaluation["figures"]:
        error = f" ± {figure['standard_error']:.4g}" if "standard_error" in figure else ""
        validation = "" if figure["validation"] is None else f"  (validation images: {figure['validation']:.4f})"
        lines.append(f"{figure['name']:44s} {figure['value']:9.4f}{error}{validation}")
    for space, near in evaluation["memorization"].items():
        lines.append(
            f"closer to training images than 95 % of validation images, {space}: "
            f"{near['closer_than_5_percent_of_validation']:.1%} of samples (p = {near['closer_p_value']:.2f}; "
            "a small p indicates copies)"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    prepare_process()
    parser = HfArgumentParser(EvaluateArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())
        results = evaluate(args)
    except (ValueError, OSError) as error:
        fail("evaluate.py", error)
    if state.is_main_process:
        folder = Path(args.output_dir or args.model)
        write(folder, results["evaluation"], results["pictures"])
        p = results["evaluation"]["protocol"]
        print(f"{p['num_samples']} samples, {p['sampler']}, {p['steps']} steps, seed {p['seed']}, against {p['split']}")
        print(report(results["evaluation"]), f"\nWritten: metrics.json, {', '.join(results['pictures'])} in {folder}/")
    state.destroy_process_group()
    if results["problem"] is not None:
        fail("evaluate.py", results["problem"])


if __name__ == "__main__":
    main()
