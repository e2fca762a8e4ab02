"""Smaller files: half the bytes with weights in float16, and 8-bit arithmetic that stays near the network."""

import copy
import re

import onnx
import pytest
import torch

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.export.graph import to_onnx
from ddpm_hf.export.inputs import noised_images
from ddpm_hf.export.variants import MIN_NUMBERS, quantized, with_half_weights
from ddpm_hf.models.onnx_unet import open_session
from tests.conftest import TINY_SCHEDULER, TINY_UNET
from tests.export.comparison import errors


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    unet = UNet2DModelCustom(**{**TINY_UNET, "block_out_channels": (32, 64)}).eval()
    pipe = DDPMPipelineCustom(unet, DDPMSchedulerCustom(**TINY_SCHEDULER))
    return pipe, to_onnx(pipe).SerializeToString()


@pytest.fixture
def pipe(exported):
    return copy.deepcopy(exported[0])


@pytest.fixture
def model(exported):
    return onnx.load_from_string(exported[1])


def test_half_weights_are_those_of_a_network_rounded_to_float16(pipe, model, tmp_path):
    half = with_half_weights(model)
    onnx.save(half, tmp_path / "half.onnx")
    assert half.ByteSize() < 0.6 * model.ByteSize()
    assert list(half.metadata_props) == list(model.metadata_props)
    images = noised_images(pipe, torch.rand(16, 3, 8, 8) * 2 - 1, None)
    rounding = errors(tmp_path / "half.onnx", pipe, images)[1]
    for parameter in pipe.unet.parameters():
        if parameter.numel() >= MIN_NUMBERS:
            parameter.data = parameter.half().float()
    assert errors(tmp_path / "half.onnx", pipe, images)[0] < 2e-6 < 1e-5 < rounding < 1e-2


def test_weights_that_float16_cannot_hold_are_refused(model):
    weight = next(t for t in model.graph.initializer if t.name.endswith("mid_block.resnets.0.conv1.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = 1e5
    weight.raw_data = values.tobytes()
    with pytest.raises(ValueError, match="float16 cannot hold .*mid_block.resnets.0.conv1.weight.*100000"):
        with_half_weights(model)


def test_8_bits_are_smaller_and_stay_near_the_network(pipe, model, tmp_path):
    images = noised_images(pipe, torch.rand(32, 3, 8, 8) * 2 - 1, None)
    small = quantized(model, images)
    onnx.save(small, tmp_path / "int8.onnx")
    assert small.ByteSize() < 0.6 * model.ByteSize()
    assert {p.key: p.value for p in small.metadata_props} == {p.key: p.value for p in model.metadata_props}
    types = {node.op_type for node in small.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types
    floats = {t.name for t in small.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4}
    assert floats and all(
        re.search(r"conv_in|conv_out|down_blocks\.0|up_blocks\.1|up_blocks\.0\.upsamplers", name) for name in floats
    )
    others = noised_images(pipe, torch.rand(16, 3, 8, 8) * 2 - 1, None)
    assert 1e-4 < errors(tmp_path / "int8.onnx", pipe, others)[1] < 0.1
    assert open_session(tmp_path / "int8.onnx").get_modelmeta().custom_metadata_map["prediction_type"]
