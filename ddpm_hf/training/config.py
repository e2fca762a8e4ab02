"""Options of a training run, and the checks of their values.

Nothing here imports torch at module level, so that `--help` answers quickly.
"""

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.checks import check_choice, check_float, check_int

if TYPE_CHECKING:
    from ddpm_hf.diffusion.losses import Objective

T = TypeVar("T")
# An option that does not change the weights: it may differ between a checkpoint and the run that resumes from it.
MayChange = Annotated[T, "may change when a run is resumed"]


def _option(default: Any, help: str) -> Any:
    """A field of TrainingConfig with its help text."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """Every option of `training/train.py`. Lengths are in images or in steps, as the name says."""

    # Where
    output_dir: MayChange[str] = _option("outputs/custom", "folder for the model, figures and checkpoints")
    overwrite: MayChange[bool] = _option(False, "delete the checkpoints in output_dir and start again")

    # Data
    dataset: str = _option("", "'digits', 'photos', a folder of images or arrays, or a data set on the Hub")
    dataset_config: str | None = _option(None, "configuration of a data set on the Hub")
    dataset_revision: str | None = _option(None, "branch, tag or commit of a data set on the Hub")
    dataset_name: MayChange[str | None] = _option(
        None, "name of the data in the model card; None: dataset, without the folders of a path"
    )
    split: str = _option("train", "split to train on")
    validation_split: MayChange[str | None] = _option(None, "split for validation; None: 'test' if there is one")
    image_column: str | None = _option(None, "column of the images; None: the only image column")
    label_column: str | None = _option(None, "column of labels; makes the model class-conditional")
    num_classes: int | None = _option(None, "number of classes 0, 1, ... in label_column; None: as in the data")
    class_embed_type: Literal["timestep", "identity"] | None = _option(
        None, "instead of classes, label_column has numbers ('timestep') or vectors ('identity')"
    )
    resolution: list[int] = _option([32], "one number, or height and width")
    channels: int = _option(3, "1 gray, 3 RGB, 4 RGBA; or the number that arrays have, 1 to 8")
    crop: str = _option("center", "fill the resolution and crop at the 'center', or 'pad' to it")
    background: str = _option("white", "color behind transparent images and around padded ones")
    white_level: list[float] | None = _option(
        None, "value of white, or of black and of white, in images of more than 8 bits; None: 0 65535"
    )
    random_flip: bool = _option(False, "mirror each image with probability 1/2")
    skip_broken_images: bool = _option(False, "skip images that cannot be read, and list them")
    validation_fraction: float = _option(0.0, "fraction of the images to keep out of training, for validation")
    memory_limit_bytes: MayChange[int] = _option(2**31, "data sets up to this size are decoded into device memory")
    num_workers: MayChange[int] = _option(2, "decoding processes for larger data sets; threads for a stream")
    streaming: bool = _option(False, "read the data while training, without storing it on disk")
    shuffle_buffer: int = _option(4096, "streaming: images that each process reads ahead to shuffle")
    stream_lanes: int | None = _option(None, "streaming: parts, a multiple of the number of processes; None: one each")

    # Network (the names of UNet2DModel)
    block_out_channels: list[int] = _option([128, 256, 256, 256], "channels of each level")
    down_block_types: list[str] = _option(
        ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "blocks on the way down, first level first"
    )
    up_block_types: list[str] = _option(
        ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "blocks on the way up, last level first"
    )
    layers_per_block: int = _option(2, "residual layers per block")
    attention_head_dim: int | None = _option(None, "channels per attention head; None: a single head")
    norm_num_groups: int = _option(32, "groups of each group normalization")
    dropout: float = _option(0.0, "dropout probability in the residual layers")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = _option("default", "how the timestep enters a layer")

    # Diffusion (the names of DDPMScheduler)
    num_train_timesteps: int = _option(1000, "length T of the diffusion chain")
    beta_schedule: str = _option("linear", "schedule of the variances β")
    rescale_betas_zero_snr: bool = _option(False, "end the chain in pure noise; not with prediction_type 'epsilon'")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = _option("epsilon", "what the network predicts")
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = _option(
        "fixed_small", "variance of the reverse steps; learned_range: predicted by the network and trained with L_vlb"
    )

    # Objective (ddpm_hf.diffusion.losses and timestep_samplers)
    loss_weighting: Literal["simple", "min_snr", "p2", "vlb"] = _option(
        "simple", "weight of L_simple over the timesteps; vlb: the variational bound itself"
    )
    min_snr_gamma: float = _option(5.0, "γ of min_snr")
    p2_k: float = _option(1.0, "k of p2")
    p2_gamma: float = _option(1.0, "γ of p2")
    hybrid_lambda: float = _option(0.001, "λ, the weight of L_vlb added to L_simple with learned_range")
    timestep_sampler: Literal["uniform", "stratified", "loss_second_moment"] = _option("uniform", "how t is drawn")
    label_dropout: float = _option(0.0, "fraction of images trained without label, for classifier-free guidance")
    input_perturbation: float = _option(0.0, "γ of Ning et al. (2023); 0: off")
    offset_noise: float = _option(0.0, "strength of noise shared by all pixels of an image; 0: off")

    # Optimization
    seed: int = _option(0, "seed of the weights, the order of images and all noise")
    total_images: int = _option(0, "length of the run, in images seen")
    batch_size: int = _option(128, "effective batch size: images per optimizer step, over all processes")
    micro_batch_size: MayChange[int | None] = _option(None, "images per process at a time (gradient accumulation)")
    learning_rate: float = _option(2e-4, "Adam's learning rate after warm-up")
    adam_beta2: float = _option(0.999, "Adam's β₂")
    weight_decay: float = _option(0.0, "decoupled weight decay, as in AdamW; 0: off")
    warmup_steps: int = _option(5000, "steps over which the learning rate rises linearly")
    learning_rate_schedule: Literal["constant", "cosine"] = _option("constant", "after warm-up; cosine: falls to 0")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    max_nonfinite_steps: MayChange[int] = _option(10, "stop after this many non-finite steps in a row")
    gradient_checkpointing: MayChange[bool] = _option(False, "recompute activations to save memory")
    ema_halflife_images: int | None = _option(None, "half-life of the EMA; None: 1,000,000; 0: use ema_decay")
    ema_decay: float | None = _option(None, "instead of a half-life, the decay per step, such as the paper's 0.9999")
    ema_warmup: bool = _option(True, "let the length of the EMA grow early in the run")
    ema_snapshot_every_images: int = _option(0, "save snapshots for training/choose_ema.py at this interval; 0: never")
    cpu_threads: MayChange[int | None] = _option(None, "CPU threads per process; None: all cores, divided evenly")
    mixed_precision: Literal["no", "bf16", "fp16"] = _option("no", "precision of the network's forward pass")
    tf32: bool = _option(True, "NVIDIA GPUs: TF32 for float32 matrix products")
    compile: MayChange[str | None] = _option(None, "compile the network with this torch.compile backend: 'inductor'")

    # Logging
    dry_run: MayChange[bool] = _option(False, "print a summary, time a few steps and stop; write nothing")
    checkpoint_every_steps: MayChange[int] = _option(5000, "save a checkpoint at this interval")
    keep_checkpoints: MayChange[int] = _option(2, "number of checkpoints to keep")
    log_every_steps: MayChange[int] = _option(50, "log the loss at this interval")
    validate_every_steps: MayChange[int] = _option(1000, "compute the validation loss at this interval; 0: never")
    validation_images: MayChange[int] = _option(256, "maximum number of validation images, drawn once")
    sample_every_steps: MayChange[int] = _option(0, "save sample images at this interval; 0: never")
    report_to: MayChange[Literal["none", "tensorboard", "wandb"]] = _option("tensorboard", "tracker to log to")
    sample_steps: MayChange[int] = _option(250, "sampling steps for figures and the quality check")
    quality_samples: MayChange[int] = _option(0, "samples to judge at the end, if the data set has a judge; 0: none")

    # Sharing
    push_to_hub: MayChange[bool] = _option(False, "upload checkpoints and the model to hub_model_id")
    hub_model_id: MayChange[str | None] = _option(None, "user/name on the Hub; created if it does not exist")
    hub_private: MayChange[bool] = _option(False, "create hub_model_id as a private repository")
    push_every_checkpoints: MayChange[int] = _option(1, "upload every this many checkpoints, and the final model")
    push_wait_seconds: MayChange[float] = _option(3600.0, "longest wait for uploads at the end of training")

    def __post_init__(self):
        if self.crop == "centre":  # config.yaml of earlier versions
            object.__setattr__(self, "crop", "center")
        self._check_values()
        self._check_size()
        self._check_data()
        self._resolve_ema()
        self._check_objective()

    def _check_values(self) -> None:
        """Check the range of each option by itself."""
        for name, hint in get_type_hints(type(self)).items():
            value, accepted = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal:
                check_choice(name, value, accepted)
            elif value is None and type(None) in accepted:
                continue
            elif name in MINIMUM:
                check_int(name, value, MINIMUM[name])
            elif name in INTERVALS:
                check_float(name, value, INTERVALS[name])
        check_int("sample_steps", self.sample_steps, 1, self.num_train_timesteps)
        if self.compile is not None:
            from torch.compiler import list_backends

            check_choice("compile", self.compile, list_backends(None))
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        elif self.push_to_hub:
            raise ValueError("push_to_hub needs hub_model_id, the model's name on the Hub: user/name.")

    def _check_size(self) -> None:
        size = list(self.resolution) * (2 if len(self.resolution) == 1 else 1)
        object.__setattr__(self, "resolution", size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"resolution must be one number or height and width, got {self.resolution!r}.")
        (height, width), halvings = size, len(self.block_out_channels) - 1
        if height % 2**halvings or width % 2**halvings:
            needed = f"use multiples of {2**halvings}, or fewer block_out_channels"
            raise ValueError(f"resolution {height}×{width} cannot be halved {halvings} times: {needed}.")
        if self.total_images < self.batch_size:
            raise ValueError(f"total_images = {self.total_images} is less than one batch of {self.batch_size}.")
        if self.stream_lanes is not None and self.batch_size % self.stream_lanes:
            raise ValueError(f"stream_lanes = {self.stream_lanes} must divide batch_size = {self.batch_size}.")

    def _check_data(self) -> None:
        from ddpm_hf.data.arrays import MAX_CHANNELS
        from ddpm_hf.data.decoding import check_crop_and_background, check_white_level

        check_int("channels", self.channels, 1, MAX_CHANNELS)
        check_crop_and_background(self.crop, self.background)
        check_white_level(self.white_level)
        if not self.dataset:
            raise ValueError(
                "dataset must be given: --dataset with 'digits', 'photos', a folder, or a name on the Hub."
            )
        if self.validation_split == self.split:
            raise ValueError(f"validation_split must be another split than split, which is {self.split!r}.")
        if self.validation_split is not None and self.validation_fraction:
            raise ValueError("validation_split and validation_fraction exclude each other.")

    def _check_objective(self) -> None:
        """ValueError for an objective that does not exist, and for a value that would be ignored."""
        self.objective  # noqa: B018  its own checks
        learned, bound = self.variance_type == "learned_range", self.loss_weighting == "vlb"
        conditional, has_classes = self.label_column is not None, self.class_embed_type is None
        check_choice("class_embed_type", self.class_embed_type, (None, "timestep", "identity"))
        uses = [
            ("loss_weighting='min_snr'", self.loss_weighting == "min_snr", ["min_snr_gamma"]),
            ("loss_weighting='p2'", self.loss_weighting == "p2", ["p2_k", "p2_gamma"]),
            ("variance_type='learned_range' without loss_weighting='vlb'", learned and not bound, ["hybrid_lambda"]),
            ("label_column", conditional, ["num_classes", "label_dropout", "class_embed_type"]),
            ("class_embed_type=None", has_classes, ["num_classes", "label_dropout"]),
        ]
        for user, is_given, names in uses:
            for name in names:
                if not is_given and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"{name} = {getattr(self, name)} is for {user} only: leave it out.")
        if self.num_classes is not None:
            check_int("num_classes", self.num_classes, 1, note=f"the number of classes in {self.label_column!r}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            why = "ε of pure noise says nothing about the image; use 'v_prediction' or 'sample'"
            raise ValueError(f"rescale_betas_zero_snr = True excludes prediction_type = 'epsilon': {why}.")
        if (bound and self.input_perturbation) or ((bound or learned) and self.offset_noise):
            name = "offset_noise" if self.offset_noise else "input_perturbation"
            with_what = "loss_weighting='vlb'" if bound else "variance_type='learned_range'"
            raise ValueError(
                f"{name} = {getattr(self, name)} changes the chain of the bound: use it without {with_what}."
            )

    def _resolve_ema(self) -> None:
        """Check that either a half-life or a decay is given; the default is a half-life of 1,000,000 images."""
        halflife, decay = self.ema_halflife_images, self.ema_decay
        if halflife and decay is not None:
            both = f"ema_halflife_images = {halflife} and ema_decay = {decay}"
            raise ValueError(f"{both} exclude each other; --ema_halflife_images 0 removes a preset's half-life.")
        if halflife == 0 and decay is None:
            raise ValueError("ema_halflife_images = 0 needs an ema_decay.")
        object.__setattr__(self, "ema_halflife_images", (halflife or 1_000_000) if decay is None else None)

    @property
    def objective(self) -> "Objective":
        """The loss to minimize."""
        from ddpm_hf.diffusion.losses import Objective

        names = ("loss_weighting", "min_snr_gamma", "p2_k", "p2_gamma", "hybrid_lambda")
        return Objective(**{name: getattr(self, name) for name in names})

    @property
    def num_class_embeds(self) -> int | None:
        """Rows of the network's class embedding: the classes, and the null class with `label_dropout`."""
        return None if self.num_classes is None else self.num_classes + (self.label_dropout > 0)

    @property
    def condition_width(self) -> int | None:
        """Numbers in a condition of class_embed_type "identity", which is added to the time embedding; else None."""
        return 4 * self.block_out_channels[0] if self.class_embed_type == "identity" else None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.total_images // self.batch_size

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up to `learning_rate`, then `learning_rate_schedule`."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.learning_rate_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return rate

    def micro_batches(self, num_processes: int) -> int:
        """Micro-batches per step of each process: the number of gradient accumulation steps.

        Raises ValueError if the batch cannot be divided.
        """
        share, rest = divmod(self.batch_size, num_processes)
        micro = min(self.micro_batch_size or share, share)
        if rest or share % micro:
            divisor = f"{num_processes} processes × micro_batch_size = {self.micro_batch_size}"
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of {divisor}.")
        return share // micro

    def images_at_a_time(self, num_processes: int) -> int:
        """Images in a micro-batch. They are known to fit in memory together with their gradients."""
        return self.batch_size // num_processes // self.micro_batches(num_processes)

    def check_same_run(self, saved: dict, where: Path) -> None:
        """Raise ValueError, naming the options, if `saved`, the configuration of checkpoint `where`, is of another run.

        A run with a constant learning rate may be made longer. With dropout the micro-batch size must stay, because the
        dropout masks depend on it.
        """
        hints = get_type_hints(type(self), include_extras=True)
        free = {name for name, hint in hints.items() if get_origin(hint) is Annotated}
        free |= {"total_images"} if self.learning_rate_schedule == "constant" else set()
        free -= {"micro_batch_size"} if self.dropout else set()
        # An option that an earlier version did not have is at its default, which changes nothing.
        saved = {option.name: option.default for option in fields(self) if option.default is not MISSING} | saved
        saved["crop"] = saved["crop"].replace("centre", "center")
        mine = asdict(self)
        if saved.get("dataset") == Path(self.dataset).name:  # a published checkpoint has no path of a machine
            saved["dataset"] = self.dataset
        if differing := {k for k in mine.keys() | saved.keys() if k not in free and mine.get(k) != saved.get(k)}:
            table = "\n".join(f"  {k}: {saved.get(k)!r} there, {mine.get(k)!r} here" for k in sorted(differing))
            use = "Use the same options to resume, another --output_dir to keep both, or --overwrite to start again."
            raise ValueError(f"{where} was saved with a different configuration:\n{table}\n{use}")

    def to_yaml(self) -> str:
        """The configuration as a YAML file that `--config` accepts."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


MINIMUM = dict.fromkeys(("ema_snapshot_every_images", "validate_every_steps", "sample_every_steps", "num_workers"), 0)
MINIMUM["ema_halflife_images"] = 0
MINIMUM |= dict.fromkeys(("total_images", "batch_size", "checkpoint_every_steps", "keep_checkpoints"), 1)
MINIMUM |= dict.fromkeys(("log_every_steps", "max_nonfinite_steps", "push_every_checkpoints"), 1)
MINIMUM |= dict.fromkeys(("validation_images", "shuffle_buffer", "stream_lanes"), 1)
INTERVALS = dict.fromkeys(("validation_fraction", "label_dropout"), "[0, 1)")
INTERVALS |= dict.fromkeys(("input_perturbation", "offset_noise", "weight_decay", "push_wait_seconds"), "[0, inf)") | {
    "ema_decay": "(0, 1)"
}
