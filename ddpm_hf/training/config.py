"""Options of a training run: their types, ranges and help texts. Rules between options are in config_rules.py.

Nothing here imports torch at module level, so that `--help` answers quickly.
"""

import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_origin, get_type_hints

import yaml

from ddpm_hf.options import LARGEST, check_options, option
from ddpm_hf.training.config_rules import check_rules

if TYPE_CHECKING:
    from ddpm_hf.diffusion.losses import Objective

T = TypeVar("T")
# An option that does not change the weights: it may differ between a checkpoint and the run that resumes from it.
MayChange = Annotated[T, "may change when a run is resumed"]
# Blocks and schedules by name; a test compares them with what the network and the scheduler know.
DownBlock = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
BetaSchedule = Literal[
    "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "quad", "quadratic", "const", "constant", "jsd",
    "warmup10", "warmup50",
]  # fmt: skip
Tracker = Literal[
    "none", "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab",
]  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """Every option of `training/train.py`. Lengths are in images or in steps, as the name says."""

    output_dir: MayChange[str] = option(
        "outputs/custom", "folder for the model, figures and checkpoints", group="Where"
    )
    overwrite: MayChange[bool] = option(False, "delete the checkpoints in output_dir and start again")

    init_from: str | None = option(
        None,
        "model to start from: a folder, a run of one's own, or a name on the Hub; it settles network and diffusion",
        group="Fine-tuning",
    )
    lora_rank: int | None = option(
        None, "train adapters of this rank (LoRA) instead of the weights, into which they are merged", "[1, 65536]"
    )
    distill_steps: int | None = option(
        None,
        "train a student that samples in this many steps of DDIM; init_from is its teacher, which takes twice as many",
        "[1, inf)",
    )

    dataset: str = option(
        "", "'digits', 'photos', a folder of images or arrays, or a data set on the Hub", group="Data"
    )
    dataset_config: str | None = option(None, "configuration of a data set on the Hub")
    dataset_revision: str | None = option(None, "branch, tag or commit of a data set on the Hub")
    dataset_name: MayChange[str | None] = option(
        None, "name of the data in the model card; None: dataset, without the folders of a path"
    )
    split: str = option("train", "split to train on")
    validation_split: MayChange[str | None] = option(None, "split for validation; None: 'test' if there is one")
    image_column: str | None = option(None, "column of the images; None: the only image column")
    label_column: str | None = option(None, "column of labels; makes the model class-conditional")
    num_classes: int | None = option(
        None, "number of classes 0, 1, ... in label_column; None: as in the data", "[1, inf)"
    )
    class_embed_type: Literal["timestep", "identity"] | None = option(
        None, "instead of classes, label_column has numbers ('timestep') or vectors ('identity')"
    )
    resolution: list[int] = option([32], "one number, or height and width", "[1, 65536]")
    channels: int = option(3, "1 gray, 3 RGB, 4 RGBA; or the number that arrays have, 1 to 8", "[1, 8]")
    crop: Literal["center", "pad"] = option("center", "fill the resolution and crop at the 'center', or 'pad' to it")
    background: str = option("white", "color behind transparent images and around padded ones")
    white_level: list[float] | None = option(
        None, "value of white, or of black and of white, in images of more than 8 bits; None: 0 65535", "(-inf, inf)"
    )
    random_flip: bool = option(False, "mirror each image with probability 1/2")
    skip_broken_images: bool = option(False, "skip images that cannot be read, and list them")
    validation_fraction: float = option(0.0, "fraction of the images to keep out of training, for validation", "[0, 1)")
    memory_limit_bytes: MayChange[int] = option(
        2**31, "data sets up to this size are decoded into device memory", "[0, inf)"
    )
    num_workers: MayChange[int] = option(2, "decoding processes for larger data sets; threads for a stream", "[0, inf)")
    streaming: bool = option(False, "read the data while training, without storing it on disk")
    shuffle_buffer: int = option(4096, "streaming: images that each process reads ahead to shuffle", "[1, inf)")
    stream_lanes: int | None = option(
        None, "streaming: parts, a multiple of the number of processes; None: one each", "[1, inf)"
    )

    block_out_channels: list[int] = option(
        [128, 256, 256, 256], "channels of each level", "[1, 65536]", group="Network (the names of UNet2DModel)"
    )
    down_block_types: list[DownBlock] = option(
        ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "blocks on the way down, first level first"
    )
    up_block_types: list[UpBlock] = option(
        ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "blocks on the way up, last level first"
    )
    layers_per_block: int = option(2, "residual layers per block", "[1, 64]")
    attention_head_dim: int | None = option(None, "channels per attention head; None: a single head", "[1, inf)")
    norm_num_groups: int = option(32, "groups of each group normalization", "[1, inf)")
    dropout: float = option(0.0, "dropout probability in the residual layers", "[0, 1)")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = option("default", "how the timestep enters a layer")
    norm_eps: float = option(1e-6, "ε of each normalization; 1e-5 in diffusers", "(0, 1]")
    downsample_padding: int = option(
        0, "0 pads downsampling convolutions at the right and bottom only; 1: all around, as in diffusers", "[0, 1]"
    )
    flip_sin_to_cos: bool = option(False, "put the cosines of the time embedding first, as in diffusers")
    freq_shift: int = option(1, "frequencies 10000^(-i/(half - freq_shift)); 0 in diffusers", "[0, 8191]")

    num_train_timesteps: int = option(
        1000, "length T of the diffusion chain", "[1, 100000]", group="Diffusion (the names of DDPMScheduler)"
    )
    beta_schedule: BetaSchedule = option("linear", "schedule of the variances β")
    beta_start: float = option(1e-4, "β of the first step, in schedules that have a range", "(0, 1)")
    beta_end: float = option(0.02, "β of the last step, in schedules that have a range", "(0, 1)")
    trained_betas: list[float] | None = option(None, "the T variances themselves, instead of a schedule", "(0, 1]")
    rescale_betas_zero_snr: bool = option(False, "end the chain in pure noise; not with prediction_type 'epsilon'")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("epsilon", "what the network predicts")
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = option(
        "fixed_small", "variance of the reverse steps; learned_range: predicted by the network and trained with L_vlb"
    )

    loss_weighting: Literal["simple", "min_snr", "p2", "vlb"] = option(
        "simple", "weight of L_simple over the timesteps; vlb: the variational bound itself", group="Objective"
    )
    min_snr_gamma: float = option(5.0, "γ of min_snr", "(0, inf)")
    p2_k: float = option(1.0, "k of p2", "(0, inf)")
    p2_gamma: float = option(1.0, "γ of p2", "[0, inf)")
    hybrid_lambda: float = option(0.001, "λ, the weight of L_vlb added to L_simple with learned_range", "(0, inf)")
    timestep_sampler: Literal["uniform", "stratified", "loss_second_moment"] = option("uniform", "how t is drawn")
    label_dropout: float = option(
        0.0, "fraction of images trained without label, for classifier-free guidance", "[0, 1)"
    )
    input_perturbation: float = option(0.0, "γ of Ning et al. (2023); 0: off", "[0, inf)")
    offset_noise: float = option(0.0, "strength of noise shared by all pixels of an image; 0: off", "[0, inf)")

    seed: int = option(
        0, "seed of the weights, the order of images and all noise", "[0, 4294967295]", group="Optimization"
    )
    total_images: int | None = option(None, "length of the run, in images seen", "[1, inf)")
    num_steps: int | None = option(None, "length in optimizer steps, instead of total_images", "[1, inf)")
    num_epochs: int | None = option(None, "length in passes over the data, instead of total_images", "[1, inf)")
    batch_size: int = option(128, "effective batch size: images per optimizer step, over all processes", "[1, inf)")
    micro_batch_size: MayChange[int | None] = option(
        None, "images per process at a time (gradient accumulation)", "[1, inf)"
    )
    learning_rate: float = option(2e-4, "Adam's learning rate after warm-up", "(0, inf)")
    adam_beta2: float = option(0.999, "Adam's β₂", "[0, 1)")
    weight_decay: float = option(0.0, "decoupled weight decay, as in AdamW; 0: off", "[0, inf)")
    warmup_steps: int = option(5000, "steps over which the learning rate rises linearly", "[0, inf)")
    learning_rate_schedule: Literal["constant", "cosine"] = option("constant", "after warm-up; cosine: falls to 0")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; inf: not clipped", "(0, inf]")
    max_nonfinite_steps: MayChange[int] = option(10, "stop after this many non-finite steps in a row", "[1, inf)")
    gradient_checkpointing: MayChange[bool] = option(False, "recompute activations to save memory")
    ema_halflife_images: int | None = option(
        None, "half-life of the EMA; None: 1,000,000; 0: use ema_decay", "[0, inf)"
    )
    ema_decay: float | None = option(
        None, "instead of a half-life, the decay per step, such as the paper's 0.9999", "(0, 1)"
    )
    ema_warmup: bool = option(True, "let the length of the EMA grow early in the run")
    ema_snapshot_every_images: int = option(
        0, "save snapshots for training/choose_ema.py at this interval; 0: never", "[0, inf)"
    )
    cpu_threads: MayChange[int | None] = option(
        None, "CPU threads per process; None: all cores, divided evenly", "[1, 1024]"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "precision of the network's forward pass; None: as `accelerate launch` says, or else 'no'"
    )
    tf32: bool = option(True, "NVIDIA GPUs: TF32 for float32 matrix products")
    process_group_timeout: MayChange[int] = option(
        21600, "seconds that processes wait for each other, also at the start", "[1, 1000000000]"
    )
    compile: MayChange[str | None] = option(None, "compile the network with this torch.compile backend: 'inductor'")

    dry_run: MayChange[bool] = option(
        False, "print a summary, time a few steps and stop; write nothing", group="Logging"
    )
    checkpoint_every_steps: MayChange[int] = option(5000, "save a checkpoint at this interval", "[1, inf)")
    keep_checkpoints: MayChange[int] = option(2, "number of checkpoints to keep", "[1, inf)")
    log_every_steps: MayChange[int] = option(50, "log the loss at this interval", "[1, inf)")
    validate_every_steps: MayChange[int] = option(
        1000, "compute the validation loss at this interval; 0: never", "[0, inf)"
    )
    validation_images: MayChange[int] = option(256, "maximum number of validation images, drawn once", "[1, inf)")
    sample_every_steps: MayChange[int] = option(0, "save sample images at this interval; 0: never", "[0, inf)")
    report_to: MayChange[list[Tracker]] = option(["tensorboard"], "trackers to log to, one or several")
    sample_steps: MayChange[int] = option(
        250, "sampling steps for figures and the quality check; a student's own", "[1, inf)"
    )
    quality_samples: MayChange[int] = option(
        0, "samples to judge at the end, if the data set has a judge; 0: none", "[0, inf)"
    )

    push_to_hub: MayChange[bool] = option(False, "upload checkpoints and the model to hub_model_id", group="Sharing")
    hub_model_id: MayChange[str | None] = option(None, "user/name on the Hub; created if it does not exist")
    hub_private: MayChange[bool] = option(False, "create hub_model_id as a private repository")
    push_every_checkpoints: MayChange[int] = option(
        1, "upload every this many checkpoints, and the final model", "[1, inf)"
    )
    push_wait_seconds: MayChange[float] = option(3600.0, "longest wait for uploads at the end of training", "[0, inf)")

    def __post_init__(self):
        if isinstance(self.crop, str) and self.crop == "centre":  # config.yaml of earlier versions
            object.__setattr__(self, "crop", "center")
        check_options(self)
        if len(self.resolution) == 1:
            object.__setattr__(self, "resolution", self.resolution * 2)
        if self.distill_steps is not None:
            object.__setattr__(self, "sample_steps", self.distill_steps)
        check_rules(self)
        if self.num_steps is not None:
            object.__setattr__(self, "total_images", self.num_steps * self.batch_size)
            object.__setattr__(self, "num_steps", None)
        if self.ema_halflife_images in (None, 0):
            object.__setattr__(self, "ema_halflife_images", 1_000_000 if self.ema_decay is None else None)

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
    def trackers(self) -> list[str]:
        """The names in `report_to`, without "none"."""
        return [name for name in self.report_to if name != "none"]

    @property
    def condition_width(self) -> int | None:
        """Numbers in a condition of class_embed_type "identity", which is added to the time embedding; else None."""
        return 4 * self.block_out_channels[0] if self.class_embed_type == "identity" else None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.total_images // self.batch_size

    def with_length(self, num_examples: int | None) -> "TrainingConfig":
        """The configuration with the `total_images` that `num_epochs` passes over the data are.

        Raises ValueError if they are less than one batch.
        """
        if self.num_epochs is None:
            return self
        total_images = self.num_epochs * num_examples
        if not self.batch_size <= total_images <= LARGEST:
            raise ValueError(
                f"num_epochs = {self.num_epochs} of {num_examples:,} images must be at least one batch, batch_size = "
                f"{self.batch_size}, and less than 2**63 images: {total_images:,}."
            )
        return replace(self, total_images=total_images, num_epochs=None)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up to `learning_rate`, then `learning_rate_schedule`."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.learning_rate_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.total_steps))
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
        saved["crop"] = "center" if saved["crop"] == "centre" else saved["crop"]
        mine = asdict(self)
        for name in ("dataset", "init_from"):
            if (
                saved.get(name) and saved[name] == Path(mine[name] or "").name
            ):  # a published checkpoint has no path of a machine
                saved[name] = mine[name]
        if differing := {k for k in mine.keys() | saved.keys() if k not in free and mine.get(k) != saved.get(k)}:
            table = "\n".join(f"  {k}: {saved.get(k)!r} there, {mine.get(k)!r} here" for k in sorted(differing))
            use = "Use the same options to resume, another --output_dir to keep both, or --overwrite to start again."
            raise ValueError(f"{where} was saved with a different configuration:\n{table}\n{use}")

    def to_yaml(self) -> str:
        """The configuration as a YAML file that `--config` accepts."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
