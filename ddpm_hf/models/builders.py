"""The parts of `UNet2DModelCustom`, built from its configuration, and the checks of that configuration."""

from functools import partial

from diffusers.configuration_utils import FrozenDict
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import nn

from ddpm_hf.checks import check_choice, check_int
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
CHOICES = {
    "mid_block_type": ("UNetMidBlock2D", None),
    "time_embedding_type": ("positional", "fourier", "learned"),
    "class_embed_type": (None, "timestep", "identity"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "downsample_padding": (0, 1),
}


def check_arguments(config: FrozenDict) -> None:
    """Raise ValueError or TypeError, naming the argument, if the configuration does not describe a U-Net."""
    channels = tuple(config.block_out_channels)
    for name, known in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
        for block_type in config[name]:
            check_choice(f"each of {name}", _without_prefix(block_type), known)
        if len(config[name]) != len(channels):
            raise ValueError(f"{name} must be as long as block_out_channels {channels}, got {tuple(config[name])}.")
    for name, choices in CHOICES.items():
        check_choice(name, config[name], choices)
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ValueError("time_embedding_type='learned' needs num_train_timesteps, got None.")
    groups = check_int("norm_num_groups", config.norm_num_groups, 1)
    if any(c % groups for c in channels):
        raise ValueError(f"norm_num_groups must divide each of block_out_channels {channels}, got {groups}.")
    mid_groups = config.attn_norm_num_groups
    if mid_groups and channels[-1] % mid_groups:
        raise ValueError(f"attn_norm_num_groups must divide {channels[-1]}, the middle's channels, got {mid_groups}.")


def _without_prefix(block_type: str) -> str:
    """Old checkpoints name their blocks UNetResDownBlock2D and so on."""
    return block_type.removeprefix("UNetRes")


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
