"""The options of an evaluation, and the samplers that they ask for. Imports no torch, so that --help answers at once."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ddpm_hf.options import check_options, option

# A test compares them with what there is.
SamplerName = Literal["ddpm", "ddim", "dpmsolver++", "dpmsolver++sde", "unipc", "heun", "euler", "lms", "pndm", "deis"]
Variance = Literal["fixed_small", "fixed_large", "analytic"]
DEFAULT_STEPS = 100


@dataclass
class EvaluationOptions:
    """Every option of `training/evaluate.py`."""

    model: str = option(MISSING, "folder, or repository on the Hub")
    backend: Literal["torch", "onnxruntime"] = option(
        "torch", "what computes the network; 'onnxruntime': on the CPU, from the file of ddpm-export"
    )
    variant: str | None = option(None, "of the weights, such as fp16; of onnxruntime fp16 or int8")
    dataset: str | None = option(
        None,
        "'digits', 'photos', a folder of images, or a data set on the Hub; None: no data, for FD to reference alone",
    )
    dataset_config: str | None = option(None, "configuration of a data set on the Hub")
    dataset_revision: str | None = option(None, "branch, tag or commit of a data set on the Hub")
    split: str = option("train", "split that the model was trained on; distances are to it")
    validation_split: str | None = option(
        None,
        "split that it was not trained on; None: 'test'; without it, the run's validation_fraction of split, if any",
    )
    image_column: str | None = option(None, "column of images; None: the only one")
    label_column: str | None = option(None, "column of labels, for a class-conditional model; None: the run's")
    features: str | None = option(
        None,
        "'inception', a vision model of transformers, or a built-in data set that has features of its own; None: the data "
        "set's own, or facebook/dinov2-base; images of 2, 4 or more channels have none; 'none': the bound alone",
    )
    reference: str | None = option(
        None,
        ".npz file of moments mu and sigma that FD is to, as pytorch-fid and EDM write them; None: the training split's",
    )
    save_reference: str | None = option(None, ".npz file to write the moments of the training split to")
    num_samples: int | None = option(None, "number of samples; None: 500, or 5,000 for over 400 features", "[1, inf)")
    samples: str | None = option(None, "folder, .npz or .parquet of images to measure; None: sample from the model")
    schedulers: list[SamplerName] | None = option(None, "one or more samplers; None: the saved one")
    steps: list[int] | None = option(
        None,
        "one or more numbers of sampling steps, which are also the lengths of respaced chains; None: those that the model was "
        "distilled to, or 100",
        "[1, inf)",
    )
    variance_type: list[Variance] | None = option(
        None, "variances of the reverse process of ddpm; None: as saved with the model"
    )
    seed: int = option(0, "seed of samples, of the bound, and of the images it is taken on", "[0, inf)")
    bound_images: int = option(360, "maximum number of images for the bound", "[2, inf)")
    bound_stride: int = option(
        20, "full chain: take each image at every n-th timestep; less, if there are under 2n images", "[1, inf)"
    )
    analytic_images: int = option(64, "training images for the moments of analytic variance", "[1, inf)")
    batch_size: int = option(256, "images per process at a time", "[1, inf)")
    output_dir: str | None = option(None, "folder to write to; None: the model's")
    cache_dir: str | None = option(None, "folder for features of real images; None: in HF_HOME")

    def __post_init__(self):
        check_options(self)
        check_rules(self)


class Sampler(NamedTuple):
    """What samples are made with; None for the model's own."""

    scheduler: str | None
    variance_type: str | None
    steps: int

    @property
    def is_ancestral(self) -> bool:
        """Whether samples are drawn from the chain whose bound is measured."""
        return self.scheduler in (None, "ddpm")


def samplers_of(options: EvaluationOptions, distilled_steps: int | None = None) -> list[Sampler]:
    """All combinations. Variances are of ancestral sampling alone. `distilled_steps`: those of a distilled model."""
    samplers, numbers = [], options.steps or [distilled_steps or DEFAULT_STEPS]
    for scheduler in options.schedulers or [None]:
        variances = options.variance_type if scheduler in (None, "ddpm") else None
        samplers += [Sampler(scheduler, variance, steps) for variance in variances or [None] for steps in numbers]
    return samplers


def check_rules(options: EvaluationOptions) -> None:
    """Raise ValueError, naming the options, for values that do not fit together."""
    for name in ("steps", "schedulers", "variance_type"):
        values = getattr(options, name) or []
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must be different values, got {values}.")
    if options.variance_type and "ddpm" not in (options.schedulers or ["ddpm"]):
        raise ValueError(f"variance_type is of the scheduler ddpm, got schedulers={options.schedulers}.")
    if options.samples is not None and len(samplers_of(options)) > 1:
        raise ValueError("samples are those of one sampler: give one of steps, schedulers and variance_type with them.")
    if options.split == (options.validation_split or "test"):
        raise ValueError(f"validation_split must be another split than split, which is {options.split!r}.")
    if options.output_dir is None and not Path(options.model).is_dir():
        raise ValueError(
            f"output_dir must be given for a model that is not a local folder, got model {options.model!r}."
        )
    if options.backend != "torch" and options.output_dir is None:
        problem = "the model's card has the figures of its weights in PyTorch"
        raise ValueError(f"output_dir must be given with backend={options.backend!r}: {problem}.")
    if options.dataset is None and options.reference is None:
        raise ValueError("dataset must be given, or a reference to which FD alone is measured.")
    if options.dataset is None:
        needed = ("save_reference", "validation_split", "label_column", "variance_type")
        if given := [name for name in needed if getattr(options, name) is not None]:
            raise ValueError(f"dataset must be given for {given[0]}.")
    if options.features == "none" and (options.reference or options.save_reference):
        raise ValueError("features='none' measures no distance: reference and save_reference must be left out.")
