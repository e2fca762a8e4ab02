"""The options of an evaluation, and the samplers that they ask for. Imports no torch, so that --help answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers.hf_argparser import HfArg

from ddpm_hf.checks import check_choice, check_int

VARIANCES = ("fixed_small", "fixed_large", "analytic")


@dataclass
class EvaluationOptions:
    """Where there is a default of None, the help text says what it stands for."""

    model: str = HfArg(help="folder, or repository on the Hub")
    dataset: str | None = HfArg(
        default=None,
        help="'digits', 'photos', a folder of images, or a data set on the Hub; None: no data, for FD to --reference alone",
    )
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
    reference: str | None = HfArg(
        default=None,
        help=".npz file of moments mu and sigma that FD is to, as pytorch-fid and EDM write them; None: the training split's",
    )
    save_reference: str | None = HfArg(default=None, help=".npz file to write the moments of the training split to")
    num_samples: int | None = HfArg(default=None, help="number of samples; None: 500, or 5,000 for over 400 features")
    samples: str | None = HfArg(
        default=None, help="folder, .npz or .parquet of images to measure; None: sample from the model"
    )
    schedulers: list[str] | None = HfArg(
        default=None, help="one or more of those of sample.py, such as ddpm ddim dpmsolver++; None: the saved one"
    )
    steps: list[int] = HfArg(
        default_factory=lambda: [100],
        help="one or more numbers of sampling steps, which are also the lengths of respaced chains",
    )
    variance_type: list[str] | None = HfArg(
        default=None, help=f"of ddpm: one or more of {', '.join(VARIANCES)}; None: as saved with the model"
    )
    seed: int = HfArg(default=0, help="seed of samples, of the bound, and of the images it is taken on")
    bound_images: int = HfArg(default=360, help="maximum number of images for the bound")
    bound_stride: int = HfArg(
        default=20, help="full chain: take each image at every n-th timestep; less, if there are under 2n images"
    )
    analytic_images: int = HfArg(default=64, help="training images for the moments of analytic variance")
    batch_size: int = HfArg(default=256, help="images per process at a time")
    output_dir: str | None = HfArg(default=None, help="folder to write to; None: the model's")
    cache_dir: str | None = HfArg(default=None, help="folder for features of real images; None: in HF_HOME")


class Sampler(NamedTuple):
    """What samples are made with; None for the model's own."""

    scheduler: str | None
    variance_type: str | None
    steps: int

    @property
    def is_ancestral(self) -> bool:
        """Whether samples are drawn from the chain whose bound is measured."""
        return self.scheduler in (None, "ddpm")


def samplers_of(options: EvaluationOptions) -> list[Sampler]:
    """All combinations. Variances are of ancestral sampling alone."""
    samplers = []
    for scheduler in options.schedulers or [None]:
        variances = options.variance_type if scheduler in (None, "ddpm") else None
        samplers += [Sampler(scheduler, variance, steps) for variance in variances or [None] for steps in options.steps]
    return samplers


def check_options(options: EvaluationOptions) -> None:
    """Raise ValueError, naming the option, for values that do not fit."""
    from ddpm_hf.schedulers.samplers import SAMPLERS

    check_int("num_samples", 1 if options.num_samples is None else options.num_samples, 1)
    check_int("seed", options.seed, 0)
    check_int("bound_images", options.bound_images, 2)
    for name in ("bound_stride", "analytic_images", "batch_size"):
        check_int(name, getattr(options, name), 1)
    choices = {"steps": None, "schedulers": SAMPLERS, "variance_type": VARIANCES}
    for name, accepted in choices.items():
        values = getattr(options, name) or []
        if len(set(values)) < len(values) or (name == "steps" and not values):
            raise ValueError(f"{name} must be one or more different values, got {values}.")
        for value in values:
            check_int(name, value, 1) if accepted is None else check_choice(name, value, accepted)
    if options.variance_type and None not in (options.schedulers or [None]) and "ddpm" not in options.schedulers:
        raise ValueError(f"variance_type is of the scheduler ddpm, got schedulers={options.schedulers}.")
    if options.samples is not None and len(samplers_of(options)) > 1:
        raise ValueError("samples are those of one sampler: give one of steps, schedulers and variance_type with them.")
    if options.split == (options.validation_split or "test"):
        raise ValueError(f"validation_split must be another split than split, which is {options.split!r}.")
    if options.output_dir is None and not Path(options.model).is_dir():
        raise ValueError(
            f"output_dir must be given for a model that is not a local folder, got model {options.model!r}."
        )
    if options.dataset is None and options.reference is None:
        raise ValueError("dataset must be given, or a reference to which FD alone is measured.")
    if options.dataset is None:
        needed = ("save_reference", "validation_split", "label_column", "variance_type")
        if given := [name for name in needed if getattr(options, name) is not None]:
            raise ValueError(f"dataset must be given for {given[0]}.")
    if options.features == "none" and (options.reference or options.save_reference):
        raise ValueError("features='none' measures no distance: reference and save_reference must be left out.")
