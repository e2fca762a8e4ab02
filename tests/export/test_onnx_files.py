"""Files of an export: all of them at the end, none if the graph is not the network."""

import copy

import pytest
import torch

from ddpm_hf.export import onnx_files
from ddpm_hf.export.inputs import graph_inputs, random_inputs
from ddpm_hf.export.onnx_files import (
    TOLERANCE,
    differences,
    export_onnx,
    export_program,
    is_rounding,
    predictions,
)


def test_all_files_are_written_with_their_differences(tiny_pipeline, tmp_path):
    written = export_onnx(tiny_pipeline, tmp_path / "new", ["fp16", "int8"], num_images=16)
    assert [file.path.name for file in written] == ["model.onnx", "model_fp16.onnx", "model_int8.onnx"]
    assert sorted(p.name for p in (tmp_path / "new" / "onnx").iterdir()) == sorted(f.path.name for f in written)
    errors = [file.relative_error for file in written]
    assert written[0].relative_error < TOLERANCE and errors == sorted(errors) and errors[-1] < 0.2


def test_a_graph_that_differs_is_not_written(tiny_pipeline, tmp_path, monkeypatch):
    export_onnx(tiny_pipeline, tmp_path)
    before = (tmp_path / "onnx" / "model.onnx").read_bytes()
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias += 1
    graph = onnx_files.to_onnx

    def damaged(pipe):
        model = graph(pipe)
        weights = next(t for t in model.graph.initializer if t.name.endswith("conv_in.bias"))
        weights.raw_data = bytes(len(weights.raw_data))
        return model

    monkeypatch.setattr(onnx_files, "to_onnx", damaged)
    with pytest.raises(ValueError, match="differs from the network by .*nothing was written"):
        export_onnx(tiny_pipeline, tmp_path)
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == before
    assert [p.name for p in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


def test_rounding_is_measured_against_float64(tiny_pipeline):
    unet = tiny_pipeline.unet.eval()
    inputs = graph_inputs(unet, random_inputs(unet, 20, 4))
    expected = predictions(unet, inputs)
    own = differences([expected], [predictions(copy.deepcopy(unet).double(), inputs)])[1]
    assert 1e-8 < own < 1e-5
    answers = [is_rounding(relative, tiny_pipeline, [inputs], [expected]) for relative in (own, 2e-6, 1e-4)]
    assert answers == [True, True, False]
    # A network that cancels most of what it adds up amplifies rounding, in PyTorch as in ONNX Runtime.
    with torch.no_grad():
        unet.conv_in.bias += 300
    expected = predictions(unet, inputs)
    own = differences([expected], [predictions(copy.deepcopy(unet).double(), inputs)])[1]
    assert own > TOLERANCE and is_rounding(own, tiny_pipeline, [inputs], [expected])


def test_a_saved_program_is_loaded_and_called(tiny_pipeline, tmp_path):
    path = export_program(tiny_pipeline, tmp_path / "new")
    program = torch.export.load(path).module()
    x, t = torch.randn(5, 3, 8, 8), torch.arange(5).float()
    with torch.no_grad():
        expected = tiny_pipeline.unet(x, t).sample
        torch.testing.assert_close(program(sample=x, timestep=t), expected, rtol=0, atol=1e-5)
