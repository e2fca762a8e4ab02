"""A pipeline's network as a graph of ONNX or of `torch.export`."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import ddpm_hf
from ddpm_hf.export.inputs import random_inputs
from ddpm_hf.interop import stock_config
from ddpm_hf.models.builders import image_size, temb_channels
from ddpm_hf.models.onnx_unet import INSTALL
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import class_names_of, null_class_of

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 20, 10

# What is computed around the network: one timestep or label for the whole batch is repeated, and if the guidance scale is
# not 1, the batch is doubled, with the null class in its second half. `copies` is 1 or 2.
GRAPH = """<ir_version: {ir_version}, opset_import: ["": {opset}]>
ddpm ({inputs}) => (float[batch, {out_channels}, height, width] prediction)
{{
    batch = Shape <start = 0, end = 1> (sample)
    {copies}
    ones = Constant <value_ints = [1, 1, 1]> ()
    repeats = Concat <axis = 0> (copies, ones)
    samples = Tile (sample, repeats)
    timestep_of_each = Expand (timestep, batch)
    timesteps = Tile (timestep_of_each, copies)
    {labels}
    {guidance}
}}"""
UNGUIDED = {
    "copies": "copies = Constant <value_ints = [1]> ()",
    "guidance": "prediction = Network (samples, timesteps{labels})",
}
GUIDED = {
    "copies": """one = Constant <value_float = 1.0> ()
    is_not_guided = Equal (guidance_scale, one)
    is_guided = Not (is_not_guided)
    more = Cast <to = 7> (is_guided)
    least = Constant <value_ints = [1]> ()
    copies = Add (least, more)""",
    "labels": """null_class = Constant <value_ints = [{null_class}]> ()
    label_of_each = Expand (class_labels, batch)
    null_of_each = Expand (null_class, batch)
    both = Concat <axis = 0> (label_of_each, null_of_each)
    zero = Constant <value_ints = [0]> ()
    number = Mul (batch, copies)
    labels = Slice (both, zero, number)""",
    # Without guidance, the first B predictions and the last B are the same.
    "guidance": """predictions = Network (samples, timesteps, labels)
    last = Constant <value_ints = [9223372036854775807]> ()
    minus_batch = Neg (batch)
    with_label = Slice (predictions, zero, batch, zero)
    without = Slice (predictions, minus_batch, last, zero)
    {guide}""",
}
GUIDE = """difference = Sub (with_label, without)
    scaled = Mul (guidance_scale, difference)
    prediction = Add (without, scaled)"""
# A learned variance, the second half of the channels, is that of the label.
GUIDE_MEAN = """with_mean, variance = Split <axis = 1, num_outputs = 2> (with_label)
    without_mean, unused = Split <axis = 1, num_outputs = 2> (without)
    difference = Sub (with_mean, without_mean)
    scaled = Mul (guidance_scale, difference)
    mean = Add (without_mean, scaled)
    prediction = Concat <axis = 1> (mean, variance)"""


def import_onnx():
    """The package onnx. ImportError, saying what to install, without what an export needs."""
    try:
        import onnx.compose
        import onnx.parser
        import onnxscript  # noqa: F401  the exporter of PyTorch needs it
    except ImportError as error:
        raise ImportError(f"an export to ONNX needs packages that are not installed ({error}): {INSTALL}") from error
    return onnx


class Network(nn.Module):
    """The network as a function of tensors alone."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        options = {} if class_labels is None else {"class_labels": class_labels}
        return self.unet(sample, timestep, return_dict=False, **options)[0]


def to_program(unet: nn.Module, T: int) -> ExportedProgram:
    """The network as a program of `torch.export`, for any number of images, and for any size if the network's
    configuration has none. Its inputs are those of `Network.forward`, with a timestep for each image."""
    inputs, batch, size = random_inputs(unet, T, 3), Dim("batch", min=1), {}
    if image_size(unet.config) is None:
        multiple = 2 ** (len(unet.config.block_out_channels) - 1)
        size = {2: multiple * Dim("rows", min=1), 3: multiple * Dim("columns", min=1)}
    shapes = {name: {0: batch} | (size if name == "sample" else {}) for name in inputs}
    with torch.no_grad():
        return torch.export.export(Network(unet).eval(), (), inputs, dynamic_shapes=shapes)


def to_onnx(pipe: DDPMPipelineCustom) -> "onnx.ModelProto":
    """The network with its guidance, in float32, and what a program without this package needs to know about the model.

    Inputs: sample (B, C, H, W) float32; timestep (1,) or (B,); for a class-conditional model class_labels, (1,) or (B,);
    with a null class guidance_scale, a number. Output: prediction (B, C_out, H, W), what the network predicts at (x_t, t).
    """
    onnx, unet, T = import_onnx(), pipe.unet, pipe.scheduler.config.num_train_timesteps
    program = to_program(unet, T)
    options = {"opset_version": OPSET, "external_data": False, "verbose": False}
    with _without_warnings():
        network = torch.onnx.export(program, **options).model_proto
    _fix_shapes(network.graph)
    model = _around(unet, network)
    for name, value in facts_of(pipe).items():
        model.metadata_props.add(key=name, value=json.dumps(value, ensure_ascii=False))
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The exporter of PyTorch says that torchvision, which is not needed, is missing, and uses a function that it deprecates
    itself (seen in torch 2.13)."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _fix_shapes(graph: "onnx.GraphProto") -> None:
    """Give every Reshape a constant shape, with −1 for the number of images. The exporter computes it from other shapes, by
    more nodes than a small network has layers. Of a network for any size, shapes with several unknowns stay computed."""
    onnx = import_onnx()
    shapes = {
        value.name: [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.value_info]
    }
    whole = [node for node in graph.node if node.op_type == "Shape" and not any(a.i for a in node.attribute)]
    shape_of = {node.output[0]: node.input[0] for node in whole}
    for node in graph.node:
        if node.op_type == "Reshape":
            # The exporter leaves out the shape of a result that it gives the shape of another one.
            shape = shapes.get(shape_of.get(node.input[1], node.output[0]))
            if shape is not None and shape.count(-1) <= 1:
                node.input[1] = f"{node.output[0]}/shape"
                graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), node.input[1]))
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)


def _around(unet: nn.Module, network: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph of this module's text, with the nodes of the network in the place of `Network`."""
    onnx = import_onnx()
    model = onnx.parser.parse_model(graph_text(unet))
    nodes = list(model.graph.node)
    (place,) = (i for i, node in enumerate(nodes) if node.op_type == "Network")
    inner = onnx.compose.add_prefix_graph(network.graph, "network/")
    outer_names = {value.name: name for value, name in zip(inner.input, nodes[place].input, strict=True)}
    outer_names[inner.output[0].name] = nodes[place].output[0]
    for node in inner.node:
        for names in (node.input, node.output):
            names[:] = [outer_names.get(name, name) for name in names]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *inner.node, *nodes[place + 1 :]])
    model.graph.initializer.extend(inner.initializer)
    model.producer_name, model.producer_version = "ddpm_hf", ddpm_hf.__version__
    return model


def graph_text(unet: nn.Module) -> str:
    """The text of the graph around this network."""
    config, null_class = unet.config, null_class_of(unet)
    H, W = image_size(config) or ("height", "width")
    t = "int64" if config.time_embedding_type == "learned" else "float"
    inputs = [f"float[batch, {config.in_channels}, {H}, {W}] sample", f"{t}[timesteps] timestep"]
    lines = {"labels": "", **UNGUIDED}
    if config.class_embed_type is not None:
        size = f", {temb_channels(config)}" if config.class_embed_type == "identity" else ""
        inputs.append(f"float[labels{size}] class_labels")
        lines["labels"] = "labels = Identity (class_labels)"
    elif config.num_class_embeds is not None:
        inputs.append("int64[labels] class_labels")
        lines["labels"] = "labels = Expand (class_labels, batch)"
    lines["guidance"] = lines["guidance"].format(labels=", labels" if lines["labels"] else "")
    if null_class is not None:
        inputs.append("float guidance_scale")
        guide = GUIDE if config.out_channels == config.in_channels else GUIDE_MEAN
        lines = GUIDED | {
            "labels": GUIDED["labels"].format(null_class=null_class),
            "guidance": GUIDED["guidance"].format(guide=guide),
        }
    text = GRAPH.format(
        ir_version=IR_VERSION, opset=OPSET, inputs=", ".join(inputs), out_channels=config.out_channels, **lines
    )
    return text.replace("height, width] prediction", f"{H}, {W}] prediction")


def facts_of(pipe: DDPMPipelineCustom) -> Mapping[str, Any]:
    """What a program needs to know about a model to sample from its network: the metadata of an ONNX file, each value as
    JSON. `alphas_cumprod` is ᾱ_t in full precision."""
    unet, scheduler = pipe.unet, pipe.scheduler
    config = scheduler.config
    diffusion = getattr(scheduler, "diffusion", scheduler)
    return {
        "num_train_timesteps": config.num_train_timesteps,
        "alphas_cumprod": diffusion.alphas_cumprod.double().tolist(),
        "prediction_type": config.prediction_type,
        "clip_sample_range": config.clip_sample_range if config.get("clip_sample") else None,
        "channels": unet.config.in_channels,
        "sample_size": image_size(unet.config),
        "null_class": null_class_of(unet),
        "class_names": class_names_of(unet),
        "unet_config": stock_config(unet),
        "scheduler_config": stock_config(scheduler),
    }
