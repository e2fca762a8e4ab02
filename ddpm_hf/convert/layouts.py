"""Where each repository keeps the weights of the U-Net of DDPM: its names beside those of `UNet2DModelCustom`.

A layout yields pairs of places, (ours, theirs), for L levels of n layers. `attends(i)` says whether level i has attention.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

Pairs = Iterator[tuple[str, str]]
Attends = Callable[[int], bool]
Place = Callable[[str, int, int], tuple[str, str, str]]


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


def _layers(L: int, n: int, attends: Attends, place: Place, conv: str = ".conv") -> Pairs:
    """The pairs of all stages, where those on the way up are numbered from the lowest level here, and have n + 1 layers.

    `place`: (way, level, layer) -> theirs of a residual block, of its attention, and of the convolution that resamples
    after the level. `conv`: ours of that convolution in its part.
    """
    for way, levels in (("down", range(L)), ("up", range(L - 1, -1, -1))):
        for stage, i in enumerate(levels):
            for j in range(n + (way == "up")):
                ours, (resnet, attention, resampling) = f"{way}_blocks.{stage}", place(way, i, j)
                yield f"{ours}.resnets.{j}", resnet
                if attends(i):
                    yield f"{ours}.attentions.{j}", attention
            if stage < L - 1:
                yield f"{ours}.{way}samplers.0{conv}", resampling


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

    def place(way: str, i: int, j: int) -> tuple[str, str, str]:
        if way == "down":
            layer, resampling = f"input_blocks.{1 + i * (n + 1) + j}", f"input_blocks.{(i + 1) * (n + 1)}.0{resample}"
        else:
            layer = f"output_blocks.{(L - 1 - i) * (n + 1) + j}"
            resampling = f"{layer}.{1 + attends(i)}{conv}"
        return f"{layer}.0", f"{layer}.1", resampling

    yield from _layers(L, n, attends, place, conv)


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
    yield from _layers(
        L,
        n,
        attends,
        lambda way, i, j: (f"{way}.{i}.block.{j}", f"{way}.{i}.attn.{j}", f"{way}.{i}.{way}sample.conv"),
    )


# ------------------------------------------------------------------ w86763777/pytorch-ddpm: attention inside residual blocks


def _pytorch_ddpm(L: int, n: int, attends: Attends) -> Pairs:
    yield from {
        "conv_in": "head", "time_embedding.linear_1": "time_embedding.timembedding.1",
        "time_embedding.linear_2": "time_embedding.timembedding.3", "conv_norm_out": "tail.0", "conv_out": "tail.2",
        "mid_block.resnets.0": "middleblocks.0", "mid_block.attentions.0": "middleblocks.0.attn",
        "mid_block.resnets.1": "middleblocks.1",
    }.items()  # fmt: skip

    def place(way: str, i: int, j: int) -> tuple[str, str, str]:
        first = i * (n + 1) if way == "down" else (L - 1 - i) * (n + 2)
        layer = f"{way}blocks.{first + j}"
        return layer, f"{layer}.attn", f"{way}blocks.{first + n + (way == 'up')}.main"

    yield from _layers(L, n, attends, place)


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

    def place(way: str, i: int, j: int) -> tuple[str, str, str]:
        level = f"{way}samples.level_{i}"
        layer = f"{level}.{j}.0" if attends(i) else f"{level}.{j}"
        return layer, f"{level}.{j}.1", f"{level}.{n + (way == 'up')}.1"

    yield from _layers(L, n, attends, place)


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
