"""Where each repository keeps the weights of the U-Net of DDPM: its names beside those of `UNet2DModelCustom`.

A layout yields pairs of places, (ours, theirs), for L levels of n layers. `attends(i)` says whether level i has attention.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

Pairs = Iterator[tuple[str, str]]
Attends = Callable[[int], bool]


@dataclass(frozen=True)
class Layout:
    """The names of a repository.

    Args:
        places: (L, n, attends) -> pairs of places.
        counts: names of weights -> (L, n).
        resnet: the parts of a residual block; ours, theirs.
        attention: theirs of the normalization, of queries, keys and values (or of the three in one), and of the output.
        network: arguments of the network that the repository fixes.
        variance_type: of the reverse steps, by default; None if its configurations differ.
        are_sines_interleaved: time features are sin, cos, sin, cos, ... instead of all sines first.
    """

    places: Callable[[int, int, Attends], Pairs]
    counts: Callable[[Collection[str]], tuple[int, int]]
    resnet: dict[str, str]
    attention: tuple[str, tuple[str, ...], str]
    network: dict[str, object]
    variance_type: str | None
    are_sines_interleaved: bool = False


def _down(L: int, n: int) -> Iterator[tuple[int, int, str]]:
    """(level, layer, our stage) of each layer on the way down."""
    return ((i, j, f"down_blocks.{i}") for i in range(L) for j in range(n))


def _up(L: int, n: int) -> Iterator[tuple[int, int, str]]:
    """The same on the way up, where our stages are numbered from the lowest level, and have n + 1 layers."""
    return ((i, j, f"up_blocks.{L - 1 - i}") for i in reversed(range(L)) for j in range(n + 1))


def _count(names: Collection[str], prefix: str) -> int:
    """The number of different entries that follow `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


# ------------------------------------------------------------------ openai: blocks are numbered through the network

# How the names of an upsampling layer end: of a residual block, or of a convolution, after the layer or its attention.
RESAMPLING, CONV = (tuple(f".{place}.{part}.weight" for place in (1, 2)) for part in ("in_layers.0", "conv"))


def _openai(L: int, n: int, attends: Attends, resample: str) -> Pairs:
    """`resample`: what follows the place of a downsampling layer, ".op" for a convolution, "" for a residual block."""
    yield from {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "class_embedding": "label_emb", "conv_norm_out": "out.0",
        "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }.items()  # fmt: skip
    conv = ".conv" if resample else ""
    for i, j, ours in _down(L, n):
        place = f"input_blocks.{1 + i * (n + 1) + j}"
        yield f"{ours}.resnets.{j}", f"{place}.0"
        if attends(i):
            yield f"{ours}.attentions.{j}", f"{place}.1"
        if j == n - 1 and i < L - 1:
            yield f"{ours}.downsamplers.0{conv}", f"input_blocks.{(i + 1) * (n + 1)}.0{resample}"
    for i, j, ours in _up(L, n):
        place = f"output_blocks.{(L - 1 - i) * (n + 1) + j}"
        yield f"{ours}.resnets.{j}", f"{place}.0"
        if attends(i):
            yield f"{ours}.attentions.{j}", f"{place}.1"
        if j == n and i > 0:
            yield f"{ours}.upsamplers.0{conv}", f"{place}.{1 + attends(i)}{conv}"


def _openai_counts(names: Collection[str]) -> tuple[int, int]:
    blocks = _count(names, "output_blocks.")
    upsampled = {n.split(".")[1] for n in names if n.startswith("output_blocks.") and n.endswith(RESAMPLING + CONV)}
    L = len(upsampled) + 1
    return L, blocks // L - 1


# ------------------------------------------------------------------ pesser/pytorch_diffusion: names of the original code


def _pytorch_diffusion(L: int, n: int, attends: Attends) -> Pairs:
    yield from {
        "conv_in": "conv_in", "time_embedding.linear_1": "temb.dense.0", "time_embedding.linear_2": "temb.dense.1",
        "conv_norm_out": "norm_out", "conv_out": "conv_out", "mid_block.resnets.0": "mid.block_1",
        "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.1": "mid.block_2",
    }.items()  # fmt: skip
    for way, layers in (("down", _down(L, n)), ("up", _up(L, n))):
        for i, j, ours in layers:
            yield f"{ours}.resnets.{j}", f"{way}.{i}.block.{j}"
            if attends(i):
                yield f"{ours}.attentions.{j}", f"{way}.{i}.attn.{j}"
            if j == 0 and i != (L - 1 if way == "down" else 0):
                yield f"{ours}.{way}samplers.0.conv", f"{way}.{i}.{way}sample.conv"


# ------------------------------------------------------------------ w86763777/pytorch-ddpm: attention inside residual blocks


def _pytorch_ddpm(L: int, n: int, attends: Attends) -> Pairs:
    yield from {
        "conv_in": "head", "time_embedding.linear_1": "time_embedding.timembedding.1",
        "time_embedding.linear_2": "time_embedding.timembedding.3", "conv_norm_out": "tail.0", "conv_out": "tail.2",
        "mid_block.resnets.0": "middleblocks.0", "mid_block.attentions.0": "middleblocks.0.attn",
        "mid_block.resnets.1": "middleblocks.1",
    }.items()  # fmt: skip
    for i, j, ours in _down(L, n):
        place = f"downblocks.{i * (n + 1) + j}"
        yield f"{ours}.resnets.{j}", place
        if attends(i):
            yield f"{ours}.attentions.{j}", f"{place}.attn"
        if j == 0 and i < L - 1:
            yield f"{ours}.downsamplers.0.conv", f"downblocks.{i * (n + 1) + n}.main"
    for i, j, ours in _up(L, n):
        place = f"upblocks.{(L - 1 - i) * (n + 2) + j}"
        yield f"{ours}.resnets.{j}", place
        if attends(i):
            yield f"{ours}.attentions.{j}", f"{place}.attn"
        if j == 0 and i > 0:
            yield f"{ours}.upsamplers.0.conv", f"upblocks.{(L - 1 - i) * (n + 2) + n + 1}.main"


def _pytorch_ddpm_counts(names: Collection[str]) -> tuple[int, int]:
    L = 1 + sum(name.startswith("upblocks.") and name.endswith(".main.weight") for name in names)
    return L, (_count(names, "upblocks.") - (L - 1)) // L - 1


# ------------------------------------------------------------------ tqch/ddpm-torch: lists by level


def _ddpm_torch(L: int, n: int, attends: Attends) -> Pairs:
    yield from {
        "conv_in": "in_conv", "time_embedding.linear_1": "embed.0", "time_embedding.linear_2": "embed.2",
        "conv_norm_out": "out_conv.0", "conv_out": "out_conv.2", "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0": "middle.1", "mid_block.resnets.1": "middle.2",
    }.items()  # fmt: skip
    for way, layers in (("down", _down(L, n)), ("up", _up(L, n))):
        for i, j, ours in layers:
            place = f"{way}samples.level_{i}"
            yield f"{ours}.resnets.{j}", f"{place}.{j}.0" if attends(i) else f"{place}.{j}"
            if attends(i):
                yield f"{ours}.attentions.{j}", f"{place}.{j}.1"
            if j == 0 and i != (L - 1 if way == "down" else 0):
                yield f"{ours}.{way}samplers.0.conv", f"{place}.{n if way == 'down' else n + 1}.1"


def _ddpm_torch_counts(names: Collection[str]) -> tuple[int, int]:
    L = _count(names, "downsamples.")
    return L, _count(names, f"downsamples.level_{L - 1}.")


# ------------------------------------------------------------------ the table

OPENAI_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
# The names of the original code are those of diffusers, but for two.
ORIGINAL_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
COSINES_FIRST = {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1}
ORIGINAL = {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0}
OPENAI_LAYOUT = (_openai_counts, OPENAI_RESNET, ("norm", ("qkv",), "proj_out"), COSINES_FIRST, "fixed_large")


def layout_of(source: str, names: Collection[str]) -> Layout:
    """The layout of a repository (`options.Source`) for a checkpoint with these names of weights."""
    if source in ("improved-diffusion", "guided-diffusion"):
        as_resnet = any(name.startswith("output_blocks.") and name.endswith(RESAMPLING) for name in names)
        resample = "" if as_resnet else ".op"
        return Layout(lambda L, n, attends: _openai(L, n, attends, resample), *OPENAI_LAYOUT)
    return LAYOUTS[source]


LAYOUTS = {
    "pytorch_diffusion": Layout(
        _pytorch_diffusion,
        lambda names: (_count(names, "down."), _count(names, "down.0.block.")),
        ORIGINAL_RESNET | {"time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut"},
        ("norm", ("q", "k", "v"), "proj_out"),
        ORIGINAL,
        None,
    ),
    "pytorch-ddpm": Layout(
        _pytorch_ddpm,
        _pytorch_ddpm_counts,
        {
            "norm1": "block1.0",
            "conv1": "block1.2",
            "time_emb_proj": "temb_proj.1",
            "norm2": "block2.0",
            "conv2": "block2.3",
            "conv_shortcut": "shortcut",
        },  # fmt: skip
        ("group_norm", ("proj_q", "proj_k", "proj_v"), "proj"),
        ORIGINAL | {"freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1},
        "fixed_large",
        are_sines_interleaved=True,
    ),
    "ddpm-torch": Layout(
        _ddpm_torch,
        _ddpm_torch_counts,
        ORIGINAL_RESNET | {"time_emb_proj": "fc", "conv_shortcut": "skip"},
        ("norm", ("project_in",), "project_out"),
        ORIGINAL,
        None,
    ),
}
