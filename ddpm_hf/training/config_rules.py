"""The rules of a training configuration that one option alone cannot state: which values fit together.

Each function raises ValueError that names the options. `config` is a TrainingConfig whose options have passed `check_options`.
"""

from dataclasses import fields
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.checks import check_choice, check_int
from ddpm_hf.options import LARGEST

LENGTHS = ("total_images", "num_steps", "num_epochs")

# Options of a loss that distillation replaces; adapters would be those of the teacher's many steps.
DISTILLED_AWAY = ["loss_weighting", "input_perturbation", "offset_noise", "lora_rank"]
# Schedules that follow from T alone (`ddpm_hf.diffusion.schedules`).
WITHOUT_RANGE = ("squaredcos_cap_v2", "laplace", "jsd")


def check_rules(config) -> None:
    """Raise ValueError for values that do not fit together, and for those that would be ignored."""
    for check in (
        _check_choices,
        _check_size,
        _check_length,
        _check_data,
        _check_trackers,
        _check_ema,
        _check_uses,
        _check_chain,
    ):
        check(config)


def _check_choices(config) -> None:
    """Choices that are known only once torch is imported, and names on the Hub."""
    if config.distill_steps is None:  # otherwise they are those of the student
        check_int("sample_steps", config.sample_steps, 1, config.num_train_timesteps, "num_train_timesteps")
    if config.compile is not None:
        from torch.compiler import list_backends

        check_choice("compile", config.compile, list_backends(None))
    if config.hub_model_id is not None:
        try:
            validate_repo_id(config.hub_model_id)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id must be user/name, got {config.hub_model_id!r}: {error}") from error
    elif config.push_to_hub:
        raise ValueError("push_to_hub needs hub_model_id, the model's name on the Hub: user/name.")


def _check_size(config) -> None:
    if len(config.resolution) != 2:
        raise ValueError(f"resolution must be one number or height and width, got {config.resolution!r}.")
    _check_halvings(config)
    # The network takes others, as diffusers' does, and leaves the rest of the channels out of its attention.
    head_dim, levels = config.attention_head_dim or 1, (config.down_block_types, config.up_block_types[::-1])
    for channels, *names in zip(config.block_out_channels, *levels):
        if channels % head_dim and any(name.startswith("Attn") for name in names):
            raise ValueError(
                f"attention_head_dim = {head_dim} must divide the {channels} channels of a level with attention."
            )
    if config.stream_lanes is not None and config.batch_size % config.stream_lanes:
        raise ValueError(f"stream_lanes = {config.stream_lanes} must divide batch_size = {config.batch_size}.")


def _check_halvings(config) -> None:
    """Each level but the last halves the image. The error has values that fit, of the size or of the network."""
    (height, width), levels = config.resolution, len(config.block_out_channels)
    divisor = 2 ** (levels - 1)
    if not height % divisor and not width % divisor:
        return
    fits = next(n for n in range(levels - 1, 0, -1) if not height % 2 ** (n - 1) and not width % 2 ** (n - 1))
    larger = dict.fromkeys(
        -(-size // divisor) * divisor for size in ((height,) if height == width else (height, width))
    )
    blocks = {
        "block_out_channels": config.block_out_channels[:fits],
        "down_block_types": config.down_block_types[:fits],
        "up_block_types": config.up_block_types[-fits:],
    }
    smaller = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in blocks.items())
    size = " ".join(map(str, larger))
    raise ValueError(
        f"resolution {height}×{width} cannot be halved {levels - 1} times, once after each of {levels} levels but the last. "
        f"Use multiples of {divisor} (--resolution {size}) or {fits} level{'s' * (fits > 1)} ({smaller})."
    )


def _check_length(config) -> None:
    """The length is given in one unit. That of epochs is known once the data are (`TrainingConfig.with_length`)."""
    lengths = {name: getattr(config, name) for name in LENGTHS}
    given = {name: value for name, value in lengths.items() if value is not None}
    if len(given) != 1:
        found = ", ".join(f"{name} = {value}" for name, value in given.items()) or "none"
        raise ValueError(f"one of {', '.join(LENGTHS)} must be given, got {found}.")
    if config.num_epochs is not None and config.streaming:
        raise ValueError(
            f"num_epochs = {config.num_epochs} needs the number of images, which a stream does not tell: use total_images."
        )
    if config.num_steps is not None and config.num_steps * config.batch_size > LARGEST:
        raise ValueError(
            f"num_steps = {config.num_steps} of batch_size = {config.batch_size} are 2**63 images or more."
        )
    if config.total_images is not None and config.total_images < config.batch_size:
        raise ValueError(
            f"total_images = {config.total_images} is less than one batch, batch_size = {config.batch_size}."
        )


def _check_data(config) -> None:
    from ddpm_hf.data.decoding import check_crop_and_background, check_white_level

    check_crop_and_background(config.crop, config.background)
    check_white_level(config.white_level)
    if not config.dataset:
        raise ValueError("dataset must be given: --dataset with 'digits', 'photos', a folder, or a name on the Hub.")
    if config.init_from is not None and Path(config.init_from).absolute() == Path(config.output_dir).absolute():
        raise ValueError(f"init_from must be another folder than output_dir, which is {config.output_dir!r}.")
    if config.validation_split == config.split:
        raise ValueError(f"validation_split must be another split than split, which is {config.split!r}.")
    if config.validation_split is not None and config.validation_fraction:
        raise ValueError("validation_split and validation_fraction exclude each other.")


def _check_trackers(config) -> None:
    names = config.report_to
    if len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise ValueError(f"report_to must be different trackers, or 'none' alone, got {names}.")


def _check_ema(config) -> None:
    """Either a half-life or a decay is given; the default is a half-life of 1,000,000 images."""
    halflife, decay = config.ema_halflife_images, config.ema_decay
    if halflife and decay is not None:
        both = f"ema_halflife_images = {halflife} and ema_decay = {decay}"
        raise ValueError(f"{both} exclude each other; --ema_halflife_images 0 removes a preset's half-life.")
    if halflife == 0 and decay is None:
        raise ValueError("ema_halflife_images = 0 needs an ema_decay.")


def _check_uses(config) -> None:
    """An option that only another one uses is left at its default without it."""
    learned, bound = config.variance_type == "learned_range", config.loss_weighting == "vlb"
    conditional, has_classes = config.label_column is not None, config.class_embed_type is None
    schedule = config.beta_schedule
    fine_tuning, whole = config.init_from is not None, config.lora_rank is None
    uses = [
        ("init_from", fine_tuning, ["lora_rank", "distill_steps"]),
        ("distill_steps=None", config.distill_steps is None, DISTILLED_AWAY),
        ("lora_rank=None", whole, ["ema_snapshot_every_images"]),
        ("loss_weighting='min_snr'", config.loss_weighting == "min_snr", ["min_snr_gamma"]),
        ("loss_weighting='p2'", config.loss_weighting == "p2", ["p2_k", "p2_gamma"]),
        ("variance_type='learned_range' without loss_weighting='vlb'", learned and not bound, ["hybrid_lambda"]),
        ("streaming", config.streaming, ["shuffle_buffer", "stream_lanes"]),
        ("label_column", conditional, ["num_classes", "label_dropout", "class_embed_type"]),
        ("class_embed_type=None", has_classes, ["num_classes", "label_dropout"]),
        ("trained_betas=None", config.trained_betas is None, ["beta_schedule", "beta_start", "beta_end"]),
        ("a beta_schedule with a range", schedule not in WITHOUT_RANGE, ["beta_start", "beta_end"]),
        ("a beta_schedule with a first β", schedule not in ("const", "constant"), ["beta_start"]),
    ]
    defaults = {spec.name: spec.default for spec in fields(config)}
    for user, is_given, names in uses:
        for name in names:
            if not is_given and getattr(config, name) != defaults[name]:
                raise ValueError(f"{name} = {getattr(config, name)} is for {user} only: leave it out.")


def _check_chain(config) -> None:
    """The objective fits the chain."""
    if config.distill_steps is not None:
        from ddpm_hf.diffusion.distillation import check_distilled

        check_distilled(config.distill_steps, config.num_train_timesteps, config.prediction_type, config.variance_type)
    learned, bound = config.variance_type == "learned_range", config.loss_weighting == "vlb"
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        why = "ε of pure noise says nothing about the image; use 'v_prediction' or 'sample'"
        raise ValueError(f"rescale_betas_zero_snr = True excludes prediction_type = 'epsilon': {why}.")
    if (bound and config.input_perturbation) or ((bound or learned) and config.offset_noise):
        name = "offset_noise" if config.offset_noise else "input_perturbation"
        with_what = "loss_weighting='vlb'" if bound else "variance_type='learned_range'"
        raise ValueError(
            f"{name} = {getattr(config, name)} changes the chain of the bound: use it without {with_what}."
        )
