"""Smaller ONNX files: weights in half precision, and 8-bit arithmetic."""

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpm_hf.export.graph import import_onnx
from ddpm_hf.export.inputs import Inputs

if TYPE_CHECKING:
    import onnx


# Tensors with fewer numbers stay in float32: they take no space, and the frequencies of the time embedding, which are
# multiplied by t, are among them.
MIN_NUMBERS = 1024


def with_half_weights(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The model with its weights stored in float16: half the size. They are cast once, when the file is opened, so that
    every operation stays in float32, at its speed.

    Raises ValueError for weights that float16 cannot hold.
    """
    onnx = import_onnx()
    float32, make = onnx.TensorProto.FLOAT, onnx.helper.make_node
    half = onnx.ModelProto()
    half.CopyFrom(model)
    casts = []
    for tensor in half.graph.initializer:
        if tensor.data_type != float32 or math.prod(tensor.dims) < MIN_NUMBERS:
            continue
        weights = onnx.numpy_helper.to_array(tensor)
        if np.abs(weights).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(f"float16 cannot hold {tensor.name}, whose largest weight is {np.abs(weights).max():g}.")
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights.astype(np.float16), f"{name}/half"))
        casts.append(make("Cast", [tensor.name], [name], to=float32))
    nodes = list(half.graph.node)
    del half.graph.node[:]
    half.graph.node.extend([*casts, *nodes])
    return half


def quantized(model: "onnx.ModelProto", batches: Sequence[Inputs]) -> "onnx.ModelProto":
    """The model with convolutions and matrix products in 8 bits, except for the convolutions of its first and last level, at
    the full size of the image: 8 bits there would cost most of the quality (measured on MNIST). The ranges of the
    activations are those of `batches`; weights have a range for each channel."""
    onnx = import_onnx()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches: Iterator[Inputs] = iter(batches)

        def get_next(self) -> Inputs | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        original, prepared, file = (Path(folder, f"{name}.onnx") for name in ("original", "prepared", "quantized"))
        onnx.save(model, original)
        quant_pre_process(original, prepared, skip_symbolic_shape=True)
        convolutions = {n.name: n.input[1] for n in onnx.load(prepared).graph.node if n.op_type == "Conv"}
        ups = [int(i) for i in re.findall(r"up_blocks\.(\d+)\.", " ".join(convolutions.values()))]
        # The second but last level ends with a convolution at full size.
        full_size = (
            "conv_in.",
            "conv_out.",
            "down_blocks.0.",
            f"up_blocks.{max(ups)}.",
            f"up_blocks.{max(ups) - 1}.upsamplers",
        )
        quantize_static(
            prepared,
            file,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul"],
            nodes_to_exclude=[
                name for name, weight in convolutions.items() if any(part in weight for part in full_size)
            ],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        small = onnx.load(file)
    del small.metadata_props[:]
    small.metadata_props.extend(model.metadata_props)
    return small
