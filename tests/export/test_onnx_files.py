"""Files of an export: all of them at the end, none if the graph is not the network."""

import pytest
import torch

from ddpm_hf.export import onnx_files
from ddpm_hf.export.onnx_files import TOLERANCE, export_onnx, export_program


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


def test_a_saved_program_is_loaded_and_called(tiny_pipeline, tmp_path):
    path = export_program(tiny_pipeline, tmp_path / "new")
    program = torch.export.load(path).module()
    x, t = torch.randn(5, 3, 8, 8), torch.arange(5).float()
    with torch.no_grad():
        expected = tiny_pipeline.unet(x, t).sample
        torch.testing.assert_close(program(sample=x, timestep=t), expected, rtol=0, atol=1e-5)
