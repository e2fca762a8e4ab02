"""Fine-tuning: network, diffusion and weights of the model that a run starts from, its `init_from`."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.checks import check_text, shown
from ddpm_hf.diffusion.schedules import BETA_SCHEDULES, make_betas
from ddpm_hf.model_files import read_json_object
from ddpm_hf.options import default_of
from ddpm_hf.pipelines.guidance import null_class_of
from ddpm_hf.pipelines.loading import check_model_index, download_pipeline, find_component, load_scheduler, load_unet
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.config_rules import WITHOUT_RANGE

# Options that are arguments of the network, or of the scheduler, of the same name.
NETWORK = (
    "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim",
    "norm_num_groups", "resnet_time_scale_shift", "norm_eps", "downsample_padding", "flip_sin_to_cos", "freq_shift",
    "class_embed_type",
)  # fmt: skip
DIFFUSION = (
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "variance_type",
)  # fmt: skip


@cache
def base_folder(init_from: str) -> Path:
    """The folder of a model: `init_from` itself, or its download from the Hub.

    Raises ValueError for what is neither, and the errors of `DDPMPipelineCustom.from_pretrained` for a network that fails.
    """
    try:
        folder = Path(init_from)
        if not folder.is_dir():
            folder = download_pipeline(init_from, allow_pickle=True)
        check_model_index(folder, ["unet", "scheduler"])
        find_component(folder, "unet", "config.json", init_from)
        find_component(folder, "scheduler", "scheduler_config.json", init_from)
    except (OSError, ValueError) as error:
        if isinstance(error, (ConnectionError, TimeoutError, PermissionError)):
            raise
        expected = "the folder of a pipeline, or its name on the Hub"
        raise ValueError(f"init_from must be {expected}, got {shown(init_from)}: {error}") from error
    return folder


def network_arguments(init_from: str) -> dict[str, Any]:
    """Every argument of the base model's network."""
    return _arguments(UNet2DModelCustom, _network_config(init_from))


def _network_config(init_from: str) -> dict[str, Any]:
    return read_json_object(find_component(base_folder(init_from), "unet", "config.json", init_from) / "config.json")


def scheduler_arguments(init_from: str) -> dict[str, Any]:
    """Every argument of the base model's scheduler as one of DDPM. Betas of a schedule that has a name are left out."""
    found = _arguments(DDPMSchedulerCustom, load_scheduler(base_folder(init_from), init_from).config)
    T, name, betas = found["num_train_timesteps"], found["beta_schedule"], found["trained_betas"]
    schedule = (name, T, found["beta_start"], found["beta_end"])
    if betas is not None and name in BETA_SCHEDULES and make_betas(*schedule).tolist() == list(betas):
        found["trained_betas"] = betas = None
    unused = ("beta_schedule",) if betas is not None else ()
    unused += ("beta_start", "beta_end") if betas is not None or name in WITHOUT_RANGE else ()
    unused += ("beta_start",) if name in ("const", "constant") else ()
    return found | {name: _defaults()[name] for name in unused}


def _arguments(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    found = defaults | {name: given[name] for name in defaults.keys() & given.keys()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _defaults() -> dict[str, Any]:
    return {name: default_of(spec) for name, spec in TrainingConfig.__dataclass_fields__.items()}


def settled_by_base(options: dict[str, Any]) -> dict[str, Any]:
    """`options` of a run, completed by those that its base model settles.

    Raises ValueError that names an option which contradicts the base model. The resolution is that of the model, unless
    another one is given. Classes may be added, not removed.
    """
    init_from = check_text("init_from", options["init_from"])
    network, scheduler = network_arguments(init_from), scheduler_arguments(init_from)
    settled = {name: network[name] for name in NETWORK} | {name: scheduler[name] for name in DIFFUSION}
    settled["channels"] = network["in_channels"]
    outputs = network["in_channels"] * (2 if scheduler["variance_type"] == "learned_range" else 1)
    if network["out_channels"] != outputs:
        given = f"out_channels = {network['out_channels']} with variance_type = {scheduler['variance_type']!r}"
        raise ValueError(f"init_from = {init_from!r} must predict {outputs} channels, got {given}.")
    is_conditional = settled["class_embed_type"] is not None or network["num_class_embeds"] is not None
    if not is_conditional and options.get("class_embed_type") == "timestep":  # added with a last layer of zeros
        del settled["class_embed_type"]
    for name, value in settled.items():
        if name in options and not _is_same(options[name], value):
            what = f"{name} = {shown(options[name])} contradicts init_from = {init_from!r}, where it is {shown(value)}"
            raise ValueError(f"{what}: leave it out of the command line and of the preset.")
    if is_conditional and options.get("label_column") is None:
        raise ValueError(f"init_from = {init_from!r} is class-conditional: give the label_column of the data.")
    sizes = {} if network["sample_size"] is None else {"resolution": network["sample_size"]}
    return sizes | options | settled | _classes(options, network["num_class_embeds"])


def _classes(options: dict[str, Any], rows: int | None) -> dict[str, int]:
    """The number of classes: at least those of the base model, whose embedding has this many rows."""
    if rows is None:
        return {}
    classes = rows - (_base_null_class(options["init_from"]) is not None)
    given = options.get("num_classes")
    if given is not None and isinstance(given, int) and given < classes:
        what = f"num_classes = {given} contradicts init_from = {options['init_from']!r}"
        raise ValueError(f"{what}, which has {classes} classes: classes may be added, not removed.")
    return {"num_classes": classes if given is None else given}


def _base_null_class(init_from: str) -> int | None:
    """The null class of the base model, if it is the last of the rows."""
    given = _network_config(init_from)
    null, rows = given.get("_null_class"), given.get("num_class_embeds")
    return null if rows is not None and null == rows - 1 else None


def _is_same(given: Any, settled: Any) -> bool:
    if isinstance(settled, list):
        given = list(given) if isinstance(given, (list, tuple)) else [given]
    return given == settled


@torch.no_grad()
def load_base_weights(unet: UNet2DModelCustom, init_from: str) -> None:
    """Copy the weights of the base model into the network of a run, which may have classes that the model lacks.

    Embeddings of new classes are zero, so that the first prediction is that of the base model whatever the label. The
    null class stays the last. Raises ValueError, naming the weights, for a network that is not that of the base model.
    """
    base = load_unet(base_folder(init_from), init_from)
    weights, mine = base.state_dict(), unet.state_dict()
    for name in mine.keys() - weights.keys():
        if name.startswith("class_embedding."):  # of two layers, the first stays random, or neither would learn
            weights[name] = mine[name] if "linear_1" in name else torch.zeros_like(mine[name])
    rows = "class_embedding.weight"
    if rows in mine and mine[rows].shape != weights[rows].shape:
        old, new, null = weights[rows], torch.zeros_like(mine[rows]), null_class_of(base)
        is_last = null == len(old) - 1
        kept = min(len(old) - is_last, len(new))
        new[:kept] = old[:kept]
        if is_last and null_class_of(unet) is not None:
            new[-1] = old[-1]
        weights[rows] = new
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"init_from = {init_from!r} does not fit the network of this run: {error}") from error
