"""Files of an export: all of them at the end, none if the graph is not the network."""

import copy

import numpy as np
import onnx
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


def test_all_files_are_written_with_their_differences(exports):
    _, folder, written = exports
    assert [file.path.name for file in written] == ["model.onnx", "model_fp16.onnx", "model_int8.onnx"]
    assert sorted(p.name for p in (folder / "onnx").iterdir()) == sorted(f.path.name for f in written)
    errors = [file.relative_error for file in written]
    assert written[0].relative_error < TOLERANCE and errors == sorted(errors) and errors[-1] < 0.2


def test_a_graph_that_differs_is_not_written(exports, tmp_path, monkeypatch):
    pipe, folder, _ = exports
    before = (folder / "onnx" / "model.onnx").read_bytes()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(before)
    damaged = onnx.load_from_string(before)
    weights = next(t for t in damaged.graph.initializer if t.name.endswith("time_embedding.linear_1.bias"))
    weights.raw_data = np.ones(weights.dims, np.float32).tobytes()
    monkeypatch.setattr(onnx_files, "to_onnx", lambda pipe: damaged)
    with pytest.raises(ValueError, match="differs from the network by .*nothing was written"):
        export_onnx(pipe, tmp_path)
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
