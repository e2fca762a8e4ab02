"""The parts of `UNet2DModelCustom`, built from its configuration, and the checks of that configuration."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.models.activations import ACT2CLS
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import nn

from ddpm_hf.checks import ArgumentTypeError, check_bool, check_choice, check_float, check_int, check_list, shown
from ddpm_hf.models.layers import AttentionBlock, Downsample, DownStage, MidStage, ResnetBlock, Upsample, UpStage

# Block type -> (has attention, how it resamples; None: by downsample_type or upsample_type).
DOWN_BLOCK_TYPES = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP_BLOCK_TYPES = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}
Check = Callable[[str, Any], Any]  # (name of an argument, value); raises ValueError or TypeError


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _each(check: Check) -> Check:
    def check_each(name: str, values: Any) -> None:
        if not isinstance(values, (list, tuple)):  # of a set or a generator the order, or the items, would be lost
            raise ArgumentTypeError(f"{name} must be a list or a tuple, got {shown(values)}.")
        check_list(f"each of {name}", values, check)

    return check_each


def _check_size(name: str, value: Any) -> None:
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number of pixels or a pair (height, width), got {shown(value)}.")
    for side in pair:
        check_int(name, side, 1, 2**16)


def _block_type(known: dict) -> Check:
    return lambda name, value: check_choice(name, _without_prefix(value), known)


def _without_prefix(block_type: Any) -> Any:
    """Old checkpoints name their blocks UNetResDownBlock2D and so on."""
    return block_type.removeprefix("UNetRes") if isinstance(block_type, str) else block_type


# Upper limits are far above every published network: they keep a mistyped number from filling the memory.
_COUNT = partial(check_int, minimum=1, maximum=2**14)
_TABLE_LENGTH = partial(check_int, minimum=1, maximum=10**6)
# The type and range of each constructor argument of the U-Net.
ARGUMENTS: dict[str, Check] = {
    "sample_size": _or_none(_check_size),
    "in_channels": _COUNT,
    "out_channels": _COUNT,
    "center_input_sample": check_bool,
    "time_embedding_type": partial(check_choice, choices=("positional", "fourier", "learned")),
    "time_embedding_dim": _or_none(_COUNT),
    "freq_shift": partial(check_int, minimum=0),
    "flip_sin_to_cos": check_bool,
    "down_block_types": _each(_block_type(DOWN_BLOCK_TYPES)),
    "mid_block_type": partial(check_choice, choices=("UNetMidBlock2D", None)),
    "up_block_types": _each(_block_type(UP_BLOCK_TYPES)),
    "block_out_channels": _each(_COUNT),
    "layers_per_block": partial(check_int, minimum=1, maximum=100),
    "mid_block_scale_factor": partial(check_float, interval="(0, inf)"),
    "downsample_padding": partial(check_choice, choices=(0, 1)),
    "downsample_type": partial(check_choice, choices=("conv", "resnet", None)),
    "upsample_type": partial(check_choice, choices=("conv", "resnet", None)),
    "dropout": partial(check_float, interval="[0, 1)"),
    "act_fn": lambda name, value: check_choice(name, value.lower() if isinstance(value, str) else value, ACT2CLS),
    "attention_head_dim": _or_none(_COUNT),
    "norm_num_groups": _COUNT,
    "attn_norm_num_groups": _or_none(_COUNT),
    "norm_eps": partial(check_float, interval="(0, 1]"),
    "resnet_time_scale_shift": partial(check_choice, choices=("default", "scale_shift")),
    "add_attention": check_bool,
    "class_embed_type": partial(check_choice, choices=(None, "timestep", "identity")),
    "num_class_embeds": _or_none(_TABLE_LENGTH),
    "num_train_timesteps": _or_none(_TABLE_LENGTH),
    "zero_init_output": check_bool,
}


def check_arguments(config: FrozenDict) -> None:
    """Raise ValueError or TypeError, naming the argument, if the configuration does not describe a U-Net."""
    for name, check in ARGUMENTS.items():
        check(name, config[name])
    channels = tuple(config.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        if len(config[name]) != len(channels):
            raise ValueError(f"{name} must be as long as block_out_channels {channels}, got {tuple(config[name])}.")
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ValueError("num_train_timesteps must be given if time_embedding_type is 'learned', got None.")
    if config.time_embedding_type == "positional" and config.freq_shift >= (half := channels[0] // 2):
        # The frequencies are 10000^(−i/(half − freq_shift)), i < half.
        raise ValueError(
            f"freq_shift must be less than half of block_out_channels[0], {half}, got {config.freq_shift}."
        )
    for name, divided in {"norm_num_groups": channels, "attn_norm_num_groups": channels[-1:]}.items():
        if config[name] is not None and any(c % config[name] for c in divided):
            raise ValueError(f"{name} must divide {divided} of block_out_channels, got {config[name]}.")
    # As in diffusers, one that does not divide them leaves the rest of the channels out.
    attended = _attended_channels(config)
    if config.attention_head_dim is not None and any(c < config.attention_head_dim for c in attended):
        least = f"{min(attended)}, the fewest channels of a level with attention"
        raise ValueError(f"attention_head_dim must be at most {least}, got {config.attention_head_dim}.")


def _attended_channels(config: FrozenDict) -> tuple[int, ...]:
    """The channels of the stages that have attention."""
    channels = list(config.block_out_channels)
    down = [DOWN_BLOCK_TYPES[_without_prefix(block_type)][0] for block_type in config.down_block_types]
    up = [UP_BLOCK_TYPES[_without_prefix(block_type)][0] for block_type in config.up_block_types]
    middle = config.mid_block_type is not None and config.add_attention
    stages = zip([*channels, channels[-1], *reversed(channels)], [*down, middle, *up])
    return tuple(dict.fromkeys(c for c, has_attention in stages if has_attention))


def image_size(config: Mapping) -> tuple[int, int] | None:
    """(H, W) of a network's images; None if its configuration has no `sample_size`."""
    size = config["sample_size"]
    return tuple(size) if isinstance(size, (list, tuple)) else size and (size, size)


def temb_channels(config: FrozenDict) -> int:
    """D, the size of the time embedding."""
    return config.time_embedding_dim or config.block_out_channels[0] * 4


def build_embeddings(config: FrozenDict) -> tuple[nn.Module, TimestepEmbedding, nn.Module | None]:
    """The modules that map timesteps (B,) to features (B, n), features to (B, D), and class labels to (B, D)."""
    channels, D = config.block_out_channels[0], temb_channels(config)
    if config.time_embedding_type == "fourier":
        projection, features = GaussianFourierProjection(channels, scale=16), 2 * channels
    elif config.time_embedding_type == "learned":
        projection, features = nn.Embedding(config.num_train_timesteps, channels), channels
    else:
        projection, features = Timesteps(channels, config.flip_sin_to_cos, config.freq_shift), channels
    time_embedding, class_embedding = TimestepEmbedding(features, D), None
    if config.class_embed_type == "timestep":
        class_embedding = TimestepEmbedding(features, D)
    elif config.class_embed_type == "identity":
        class_embedding = nn.Identity()
    elif config.num_class_embeds is not None:
        class_embedding = nn.Embedding(config.num_class_embeds, D)
    return projection, time_embedding, class_embedding


def build_stages(config: FrozenDict) -> tuple[nn.ModuleList, MidStage | None, nn.ModuleList]:
    """The stages of the U: down, middle and up, created in the order in which stock creates them."""
    channels, layers, groups = list(config.block_out_channels), config.layers_per_block, config.norm_num_groups
    resnet = partial(
        ResnetBlock,
        temb_channels=temb_channels(config),
        groups=groups,
        eps=config.norm_eps,
        act_fn=config.act_fn,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
    )

    def attention(c: int, groups: int | None = groups, scale: float = 1.0) -> AttentionBlock:
        head_dim = config.attention_head_dim or c
        return AttentionBlock(c, head_dim, groups=groups, eps=config.norm_eps, output_scale_factor=scale)

    def alternate(inputs: list[int], c: int, has_attention: bool) -> tuple[list, list]:
        """Residual blocks from each number of channels in `inputs` to c, and attention blocks, created in turns."""
        pairs = [(resnet(n, c), attention(c) if has_attention else None) for n in inputs]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs if has_attention]

    last, skip_channels, c_in = len(channels) - 1, [channels[0]], channels[0]
    down, middle, up = nn.ModuleList(), None, nn.ModuleList()
    for i, (block_type, c) in enumerate(zip(config.down_block_types, channels)):
        has_attention, resample = DOWN_BLOCK_TYPES[_without_prefix(block_type)]
        resnets, attentions = alternate([c_in] + [c] * (layers - 1), c, has_attention)
        samplers = []
        if i < last:
            as_resnet = (resample or config.downsample_type) == "resnet"
            samplers = [resnet(c, c, resample="down") if as_resnet else Downsample(c, config.downsample_padding)]
        down.append(DownStage(resnets, attentions, samplers))
        skip_channels += [c] * (layers + (i < last))
        c_in = c
    if config.mid_block_type is not None:
        scale = config.mid_block_scale_factor
        mid_groups = config.attn_norm_num_groups or (groups if config.resnet_time_scale_shift == "default" else None)
        first = resnet(c_in, c_in, output_scale_factor=scale)
        attentions = [attention(c_in, mid_groups, scale)] if config.add_attention else []
        middle = MidStage([first, resnet(c_in, c_in, output_scale_factor=scale)], attentions)
    for i, (block_type, c) in enumerate(zip(config.up_block_types, reversed(channels))):
        has_attention, resample = UP_BLOCK_TYPES[_without_prefix(block_type)]
        inputs = [(c_in if j == 0 else c) + skip_channels.pop() for j in range(layers + 1)]
        resnets, attentions = alternate(inputs, c, has_attention)
        samplers = []
        if i < last:
            as_resnet = (resample or config.upsample_type) == "resnet"
            samplers = [resnet(c, c, resample="up") if as_resnet else Upsample(c)]
        up.append(UpStage(resnets, attentions, samplers))
        c_in = c
    return down, middle, up
