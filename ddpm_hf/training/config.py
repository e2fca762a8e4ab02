"""What a training run is made of, typed: a preset from configs/*.yaml, overridden by command-line flags."""

import dataclasses
import importlib.resources
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from ddpm_hf.data.decoding import check_crop_and_background
from ddpm_hf.diffusion.losses import Objective

CONFIGS = importlib.resources.files("ddpm_hf.scripts") / "configs"  # data of the commands


def _list(*default):
    return field(default_factory=lambda: list(default))


@dataclass(frozen=True)
class TrainingConfig:
    """Every option of `training/train.py`. Lengths are in images or steps, as the name says."""

    # Where
    output_dir: str = field(
        default="outputs/custom", metadata={"help": "folder for the model, figures and checkpoints"}
    )
    overwrite: bool = field(default=False, metadata={"help": "delete the checkpoints in output_dir and start again"})

    # Data
    dataset: str = field(
        default="", metadata={"help": "'digits', 'photos', a folder of images, or a data set on the Hub"}
    )
    dataset_config: str | None = None
    dataset_revision: str | None = field(
        default=None, metadata={"help": "of a data set on the Hub: branch, tag, commit"}
    )
    split: str = "train"
    validation_split: str | None = field(
        default=None,
        metadata={"help": "validation images to measure the loss of; None: 'test', if the data set has it"},
    )
    image_column: str | None = None
    label_column: str | None = field(default=None, metadata={"help": "classes 0, 1, ...; makes the model conditional"})
    num_classes: int | None = field(default=None, metadata={"help": "how many classes label_column has"})
    resolution: list[int] = field(default_factory=lambda: [32], metadata={"help": "one number, or height and width"})
    channels: int = field(default=3, metadata={"help": "1 gray, 3 RGB, 4 RGBA"})
    crop: str = field(
        default="center", metadata={"help": "fill the resolution and cut at the 'center', or 'pad' to it"}
    )
    background: str = field(
        default="white", metadata={"help": "color under transparent images (channels 1 or 3) and around padded ones"}
    )
    random_flip: bool = field(default=False, metadata={"help": "mirror each image with probability 1/2"})
    skip_broken_images: bool = field(default=False, metadata={"help": "leave unreadable images out, and say which"})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "share of the images, chosen by a hash of each, that is never trained on"}
    )
    memory_limit_bytes: int = field(
        default=2**31, metadata={"help": "data sets up to this size stay decoded in the device's memory"}
    )
    num_workers: int = field(default=2, metadata={"help": "decoding processes for larger ones; threads for a stream"})
    streaming: bool = field(default=False, metadata={"help": "read while training, and keep nothing on the disk"})
    shuffle_buffer: int = field(default=4096, metadata={"help": "streaming: images of a process read ahead to shuffle"})
    stream_lanes: int | None = field(
        default=None,
        metadata={"help": "streaming: parts shared out among processes, whose number must divide it; None: one each"},
    )

    # Network (the names of UNet2DModel)
    block_out_channels: list[int] = _list(128, 256, 256, 256)
    down_block_types: list[str] = _list("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up_block_types: list[str] = _list("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    attention_head_dim: int | None = None
    norm_num_groups: int = 32
    dropout: float = 0.0
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"

    # Diffusion (the names of DDPMScheduler)
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = field(
        default="fixed_small", metadata={"help": "learned_range: predicted too, trained by L_vlb beside the loss"}
    )

    # Objective (ddpm_hf/losses.py, timestep_samplers.py)
    loss_weighting: Literal["simple", "min_snr", "p2", "vlb"] = field(
        default="simple", metadata={"help": "of L_simple over the timesteps; vlb: the variational bound itself"}
    )
    min_snr_gamma: float = field(default=5.0, metadata={"help": "γ of min_snr"})
    p2_k: float = field(default=1.0, metadata={"help": "k of p2"})
    p2_gamma: float = field(default=1.0, metadata={"help": "γ of p2"})
    hybrid_lambda: float = field(default=0.001, metadata={"help": "λ of L_vlb beside L_simple, with learned_range"})
    timestep_sampler: Literal["uniform", "stratified", "loss_second_moment"] = "uniform"
    label_dropout: float = field(
        default=0.0, metadata={"help": "share of images without their label, for classifier-free guidance; 0: none"}
    )
    input_perturbation: float = field(default=0.0, metadata={"help": "γ of Ning et al. 2023; 0: off"})
    offset_noise: float = field(default=0.0, metadata={"help": "noise shared by an image's pixels; 0: off"})

    # Optimization
    seed: int = 0
    total_images: int = field(default=0, metadata={"help": "length of the run, in images seen"})
    batch_size: int = field(default=128, metadata={"help": "images per optimizer step, over all processes"})
    micro_batch_size: int | None = field(default=None, metadata={"help": "images per process at a time; None: all"})
    learning_rate: float = 2e-4
    adam_beta2: float = 0.999
    warmup_steps: int = field(default=5000, metadata={"help": "steps over which the rate rises linearly"})
    learning_rate_schedule: Literal["constant", "cosine"] = field(
        default="constant", metadata={"help": "after warm-up: stay, or fall to 0 at the end of the run"}
    )
    max_grad_norm: float = 1.0
    max_nonfinite_steps: int = field(
        default=10, metadata={"help": "steps in a row without finite loss and gradient that end the run"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute every block twice, for less memory"})
    ema_halflife_images: int | None = field(
        default=None, metadata={"help": "half-life of the weights' average; None: 1,000,000; 0: by ema_decay"}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "in its place, the factor kept at every step, as the paper's 0.9999"}
    )
    ema_warmup: bool = field(default=True, metadata={"help": "let the average's length grow with the run at first"})
    ema_snapshot_every_images: int = field(
        default=0,
        metadata={"help": "follow and keep averages for training/choose_ema.py, which chooses a length; 0: do not"},
    )
    cpu_threads: int | None = field(default=None, metadata={"help": "per process; None: all cores, shared out"})
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    tf32: bool = field(default=True, metadata={"help": "NVIDIA GPUs: float32 products with TF32's 10-bit mantissa"})
    compile: str | None = field(
        default=None, metadata={"help": "train the network compiled by this backend of torch.compile: 'inductor'"}
    )

    # RunLogger
    dry_run: bool = field(default=False, metadata={"help": "print what the run would be, time a few steps, and stop"})
    checkpoint_every_steps: int = 5000
    keep_checkpoints: int = 2
    log_every_steps: int = 50
    validate_every_steps: int = field(default=1000, metadata={"help": "the loss of validation images; 0: never"})
    validation_images: int = field(default=256, metadata={"help": "as many of them, drawn once, at most"})
    sample_every_steps: int = field(default=0, metadata={"help": "samples and their denoising as pictures; 0: never"})
    report_to: Literal["none", "tensorboard", "wandb"] = "tensorboard"
    sample_steps: int = field(default=250, metadata={"help": "sampling steps of the figures and of the quality check"})
    quality_samples: int = field(
        default=0, metadata={"help": "samples to judge at the end, for a data set that has a judge (digits); 0: none"}
    )

    # Sharing
    push_to_hub: bool = field(default=False, metadata={"help": "push checkpoints and the model to hub_model_id"})
    hub_model_id: str | None = field(default=None, metadata={"help": "user/name on the Hub; made if it is not there"})
    hub_private: bool = field(default=False, metadata={"help": "make it a private repository"})
    push_every_checkpoints: int = field(default=1, metadata={"help": "push every so many checkpoints, and the end"})

    def __post_init__(self):
        size = list(self.resolution) * (2 if len(self.resolution) == 1 else 1)
        object.__setattr__(self, "resolution", size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"resolution must be one number or height and width, got {self.resolution!r}.")
        if not self.dataset:
            raise ValueError(
                "dataset must be given (the preset names none): --dataset with 'digits', 'photos', a folder of images, or a "
                "data set's name on the Hub."
            )
        multiple = 2 ** (len(self.block_out_channels) - 1)
        if any(length % multiple for length in size):
            raise ValueError(
                f"resolution {size[0]}×{size[1]} cannot be halved {len(self.block_out_channels) - 1} times, as "
                f"block_out_channels of {len(self.block_out_channels)} levels asks: use multiples of {multiple}, or fewer levels."
            )
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id, the model's name on the Hub: user/name.")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        at_least_1 = ("total_images", "batch_size", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps")
        for name in (*at_least_1, "max_nonfinite_steps", "push_every_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("ema_snapshot_every_images", "validate_every_steps", "sample_every_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 1, or 0 for never, got {getattr(self, name)}.")
        if self.validation_images < 1:
            raise ValueError(
                f"validation_images must be at least 1, got {self.validation_images}; --validate_every_steps 0 validates never."
            )
        if self.validation_split is not None and self.validation_split == self.split:
            raise ValueError(f"validation_split must be another split than split, which is {self.split!r}.")
        if self.validation_split is not None and self.validation_fraction:
            raise ValueError("validation_split and validation_fraction exclude each other: both say what is held out.")
        self._resolve_ema()
        if self.total_images < self.batch_size:
            raise ValueError(f"total_images = {self.total_images} is less than one batch of {self.batch_size}.")
        check_crop_and_background(self.crop, self.background)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {self.validation_fraction}.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}.")
        for name in ("shuffle_buffer", "stream_lanes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.stream_lanes is not None and self.batch_size % self.stream_lanes:
            raise ValueError(f"stream_lanes = {self.stream_lanes} must divide batch_size = {self.batch_size}.")
        if self.compile is not None and self.compile not in (known := torch.compiler.list_backends(None)):
            raise ValueError(f"compile must be one of {known}, got {self.compile!r}.")
        if not 1 <= self.sample_steps <= self.num_train_timesteps:
            raise ValueError(f"sample_steps must lie in 1..{self.num_train_timesteps}, got {self.sample_steps}.")
        self._check_objective()

    def _check_objective(self):
        """ValueError for what makes no objective, and for a number that would be ignored."""
        self.objective  # noqa: B018  its own checks
        learned, bound = self.variance_type == "learned_range", self.loss_weighting == "vlb"
        uses = {
            "min_snr_gamma": (self.loss_weighting == "min_snr", "loss_weighting='min_snr'"),
            "p2_k": (self.loss_weighting == "p2", "loss_weighting='p2'"),
            "p2_gamma": (self.loss_weighting == "p2", "loss_weighting='p2'"),
            "hybrid_lambda": (learned and not bound, "variance_type='learned_range' beside L_simple"),
            "num_classes": (self.label_column is not None, "label_column"),
            "label_dropout": (self.label_column is not None, "label_column"),
        }
        for name, (is_used, by) in uses.items():
            if not is_used and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} = {getattr(self, name)} is for {by} only: leave it out.")
        if self.label_column is not None and (self.num_classes is None or self.num_classes < 1):
            raise ValueError(
                f"num_classes must say how many classes label_column = {self.label_column!r} has, got {self.num_classes}."
            )
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}.")
        for name in ("input_perturbation", "offset_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if (bound and self.input_perturbation) or ((bound or learned) and self.offset_noise):
            name = "offset_noise" if self.offset_noise else "input_perturbation"
            raise ValueError(
                f"{name} = {getattr(self, name)} changes the chain that the variational bound is of: use it with "
                f"another loss than {'vlb' if bound else 'that of learned_range'}."
            )

    @property
    def objective(self) -> Objective:
        """What is minimized."""
        names = ("loss_weighting", "min_snr_gamma", "p2_k", "p2_gamma", "hybrid_lambda")
        return Objective(**{name: getattr(self, name) for name in names})

    @property
    def num_class_embeds(self) -> int | None:
        """Rows of the network's table of classes: the classes, and the null class where labels are left out."""
        return None if self.label_column is None else self.num_classes + (self.label_dropout > 0)

    def _resolve_ema(self) -> None:
        """Either a half-life or a decay, checked."""
        halflife, decay = self.ema_halflife_images, self.ema_decay
        if halflife is not None and halflife < 0:
            raise ValueError(f"ema_halflife_images must be at least 1, or 0 for none, got {halflife}.")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {decay!r}.")
        if halflife and decay is not None:
            raise ValueError(
                f"ema_halflife_images = {halflife} and ema_decay = {decay} exclude each other; "
                "--ema_halflife_images 0 takes back a preset's half-life."
            )
        if halflife == 0 and decay is None:
            raise ValueError("ema_halflife_images = 0 needs an ema_decay.")
        if decay is not None:
            object.__setattr__(self, "ema_halflife_images", None)
        elif halflife is None:
            object.__setattr__(self, "ema_halflife_images", 1_000_000)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.total_images // self.batch_size

    def learning_rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ...: a linear rise to `learning_rate`, then `learning_rate_schedule`."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = (
            0.5 * (1 + math.cos(math.pi * step / self.num_steps)) if self.learning_rate_schedule == "cosine" else 1.0
        )
        return self.learning_rate * warmup * decay

    def micro_batches(self, num_processes: int) -> int:
        """Parts that a process computes its share of a batch in. Raises ValueError if the batch does not divide."""
        share, rest = divmod(self.batch_size, num_processes)
        micro = min(self.micro_batch_size or share, share)
        if rest or share % micro:
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of {num_processes} processes × micro_batch_size = "
                f"{self.micro_batch_size}."
            )
        return share // micro

    def images_at_a_time(self, num_processes: int) -> int:
        """That a process computes at once: so many, with what their gradients need, are known to fit."""
        return self.batch_size // num_processes // self.micro_batches(num_processes)

    # What may differ between a checkpoint and the run that goes on from it: none of it changes the weights.
    MAY_CHANGE = frozenset(
        {
            "output_dir",
            "overwrite",
            "micro_batch_size",
            "memory_limit_bytes",
            "num_workers",
            "cpu_threads",
            "max_nonfinite_steps",
            "gradient_checkpointing",
            "compile",
            "checkpoint_every_steps",
        }
        | {"keep_checkpoints", "log_every_steps", "report_to", "sample_steps", "quality_samples"}
        | {"push_to_hub", "hub_model_id", "hub_private", "push_every_checkpoints"}
        | {"validation_split", "validate_every_steps", "validation_images", "sample_every_steps", "dry_run"}
    )

    def check_same_run(self, saved: dict, where: Path) -> None:
        """Raises ValueError, naming the options, if a checkpoint's configuration makes another run than this one.

        A run of constant rate may be made longer. One with dropout keeps its micro-batches, for which masks are drawn.
        """
        free = self.MAY_CHANGE | ({"total_images"} if self.learning_rate_schedule == "constant" else set())
        free -= {"micro_batch_size"} if self.dropout else set()
        mine = dataclasses.asdict(self)
        if differing := {k for k in mine.keys() | saved.keys() if k not in free and mine.get(k) != saved.get(k)}:
            table = "\n".join(f"  {k}: {saved.get(k)!r} there, {mine.get(k)!r} asked for" for k in sorted(differing))
            raise ValueError(
                f"{where} was made under another configuration:\n{table}\n"
                "Use the same options to go on, another --output_dir to keep both, or --overwrite to start again."
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def presets() -> list[str]:
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def parse_config(arguments: list[str] | None = None) -> TrainingConfig:
    """The configuration of a command line: `--config <preset or YAML file>` (default: digits), then flags over it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(TrainingConfig, description="Train a DDPM.", allow_abbrev=False)
    parser.add_argument("--config", default="digits", help=f"one of {presets()}, or a YAML file")
    known, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**load_preset(known.config))
    config, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return config


def load_preset(name: str) -> dict:
    """The options of a preset or YAML file. Raises ValueError for one that is not there, and for unknown options."""
    file = CONFIGS / f"{name}.yaml" if name in presets() else Path(name)
    if not file.is_file():
        raise ValueError(f"--config {name!r} is neither a preset ({', '.join(presets())}) nor a YAML file.")
    options = yaml.safe_load(file.read_text()) or {}
    known = {option.name for option in dataclasses.fields(TrainingConfig)}
    if not isinstance(options, dict) or (unknown := set(options) - known):
        raise ValueError(
            f"{file}: {sorted(unknown) if isinstance(options, dict) else options!r} is no option of a run."
        )
    return options
