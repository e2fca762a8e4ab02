"""Pipelines from checkpoints of other repositories: their network is described by its weights and by a few options."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_hf.convert.layouts import Layout, layout_of
from ddpm_hf.convert.options import OPENAI, TOLD_T, ConvertOptions
from ddpm_hf.convert.reading import read_weights
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.schedules import make_betas, scale_betas_for_timesteps
from ddpm_hf.model_files import check_weights
from ddpm_hf.models.unet import UNet2DModelCustom
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom

FIRST_LAYER = "down_blocks.{}.resnets.0"


def convert(options: ConvertOptions) -> DDPMPipelineCustom:
    """The pipeline of a checkpoint, with the outputs of the network that it came from.

    Raises OSError for a file that cannot be read, and ValueError for one that is not of the `source`, and for a network
    that diffusers' `UNet2DModel` cannot express.
    """
    weights = read_weights(options.checkpoint, options.weights)
    layout = layout_of(options.source, weights)
    unet = convert_network(weights, layout, options)
    return DDPMPipelineCustom(unet, make_scheduler(options, layout, unet))


def make_scheduler(options: ConvertOptions, layout: Layout, unet: UNet2DModelCustom) -> DDPMSchedulerCustom:
    """The chain of a checkpoint. If the network is told t·1000/T, its chain of 1000 steps, which are every (T/1000)-th:
    there t is what the network is told."""
    is_learned = unet.config.out_channels != unet.config.in_channels
    variance_type = options.variance_type or ("learned_range" if is_learned else layout.variance_type)
    if variance_type is None or is_learned != (variance_type == "learned_range"):
        known = f"the network predicts {unet.config.out_channels} channels, and {options.source} has no default"
        raise ValueError(f"variance_type must fit the configuration of the checkpoint, got {variance_type}: {known}.")
    T, start, end = options.num_train_timesteps, options.beta_start, options.beta_end
    if options.source in OPENAI and options.noise_schedule == "linear":
        start, end = scale_betas_for_timesteps(T, start, end)
    name = {"cosine": "squaredcos_cap_v2", "quad": "scaled_linear"}.get(options.noise_schedule, options.noise_schedule)
    kinds = {"prediction_type": options.prediction_type, "variance_type": variance_type}
    if not options.is_told_other_timesteps:
        return DDPMSchedulerCustom(T, start, end, beta_schedule=name, **kinds)
    chain = GaussianDiffusion(make_betas(name, T, start, end)).respace(range(0, T, T // TOLD_T))
    return DDPMSchedulerCustom(TOLD_T, trained_betas=chain.betas.tolist(), **kinds)


def convert_network(weights: Mapping[str, Tensor], layout: Layout, options: ConvertOptions) -> UNet2DModelCustom:
    """The network of a checkpoint. Errors are those of `convert`."""
    L, n = layout.counts(weights)
    refusal = f"{options.checkpoint} is no checkpoint of {options.source} that can be converted"
    if L < 1 or n < 1:
        raise ValueError(f"{refusal}: its weights are {sorted(weights)[:4]}, ...")
    possible = dict(layout.places(L, n, lambda i: True))
    attended = [_has(weights, possible[f"down_blocks.{i}.attentions.0"]) for i in range(L)]
    places = dict(layout.places(L, n, attended.__getitem__))
    theirs = {ours: name for ours, place in places.items() for ours, name in _tensors(ours, place, layout).items()}
    theirs = {ours: name for ours, name in theirs.items() if name in weights}
    embedding = [name for name in weights if layout.are_sines_interleaved and name.endswith("timembedding.0.weight")]
    if unknown := sorted(weights.keys() - {*theirs.values(), *embedding}):
        raise ValueError(f"{refusal}: it has the unknown weights {', '.join(unknown[:4])}.")
    try:
        arguments = network_arguments({ours: weights[name] for ours, name in theirs.items()}, layout, attended, n)
    except KeyError as error:
        raise ValueError(f"{refusal}: it has no weights for {error}.") from error
    arguments["attention_head_dim"] = _head_dim(options, arguments["block_out_channels"], attended)
    with torch.device("meta"):
        unet = UNet2DModelCustom(sample_size=options.resolution, layers_per_block=n, **arguments)
    converted = {
        ours: _value(ours, weights[name].float(), layout, options, arguments["attention_head_dim"])
        for ours, name in theirs.items()
    }
    check_weights(options.checkpoint, converted, unet.state_dict(), check_shapes=True)
    unet.load_state_dict(converted, assign=True)
    return unet.to(memory_format=torch.channels_last).eval()


def network_arguments(weights: Mapping[str, Tensor], layout: Layout, attended: list[bool], n: int) -> dict[str, Any]:
    """The arguments of the network that follow from the shapes of its weights, which have our names."""
    L = len(attended)
    channels = [len(weights[FIRST_LAYER.format(i) + ".conv1.weight"]) for i in range(L)]
    D, features = weights["time_embedding.linear_1.weight"].shape
    inputs, outputs = weights["conv_in.weight"].shape[1], len(weights["conv_out.weight"])
    if features != channels[0]:
        raise ValueError(
            f"UNet2DModel has as many time features as channels in its first level, got {features} and {channels[0]}."
        )
    if outputs not in (inputs, 2 * inputs):
        raise ValueError(f"the network must predict {inputs} or {2 * inputs} channels from {inputs}, got {outputs}.")
    as_resnet = "down_blocks.0.downsamplers.0.conv1.weight" in weights
    projection = len(weights[FIRST_LAYER.format(0) + ".time_emb_proj.weight"])
    plain = "Resnet{}sampleBlock2D" if as_resnet else "{}Block2D"
    types = {way: [f"Attn{way}Block2D" if a else plain.format(way) for a in attended] for way in ("Down", "Up")}
    scale_shift, classes = projection == 2 * channels[0], weights.get("class_embedding.weight")
    return layout.network | {
        "in_channels": inputs,
        "out_channels": outputs,
        "block_out_channels": channels,
        "down_block_types": types["Down"],
        "up_block_types": types["Up"][::-1],
        "downsample_type": "resnet" if as_resnet else "conv",
        "upsample_type": "resnet" if as_resnet else "conv",
        "time_embedding_dim": None if 4 * channels[0] == D else D,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "attn_norm_num_groups": 32 if scale_shift else None,
        "num_class_embeds": None if classes is None else len(classes),
    }


def _head_dim(options: ConvertOptions, channels: list[int], attended: list[bool]) -> int | None:
    """Channels per head; None for one head."""
    if options.num_head_channels is not None:
        return options.num_head_channels
    if options.num_heads in (None, 1):
        return None
    widths = {c for c, has_attention in zip(channels, attended) if has_attention} | {channels[-1]}
    if len(widths) > 1 or any(c % options.num_heads for c in widths):
        problem = f"num_heads = {options.num_heads} over {sorted(widths)} channels"
        raise ValueError(f"{problem}: UNet2DModel has the same number of channels in every head.")
    return widths.pop() // options.num_heads


def _has(weights: Mapping[str, Tensor], place: str) -> bool:
    return any(name.startswith(place + ".") for name in weights)


def _tensors(ours: str, theirs: str, layout: Layout) -> dict[str, str]:
    """Our names of the tensors at a place, and theirs."""
    parts = {"": ""}
    norm, qkv, out = layout.attention
    if ".attentions." in ours:
        of_each = dict(zip(("to_q", "to_k", "to_v"), qkv * (3 // len(qkv))))
        parts = {"group_norm": norm, "to_out.0": out} | of_each
    elif ".resnets." in ours or ours.endswith("samplers.0"):
        parts = layout.resnet
    dotted = {f"{ours}.{a}" if a else ours: f"{theirs}.{b}" if b else theirs for a, b in parts.items()}
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in dotted.items() for kind in ("weight", "bias")}


def _value(ours: str, tensor: Tensor, layout: Layout, options: ConvertOptions, head_dim: int | None) -> Tensor:
    """Our tensor from theirs: convolutions of size 1 in attention are linear layers here, and each of queries, keys and
    values has its own."""
    if ours == "time_embedding.linear_1.weight" and layout.are_sines_interleaved:
        return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
    if ".attentions." not in ours or "group_norm" in ours:
        return tensor
    tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
    part = next((i for i, name in enumerate(("to_q.", "to_k.", "to_v.")) if name in ours), None)
    if part is None or len(layout.attention[1]) == 3:
        return tensor
    width = len(tensor) // 3
    heads = width // (head_dim or width)
    if heads == 1 or options.use_new_attention_order:
        return tensor.chunk(3)[part].clone()
    return tensor.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
