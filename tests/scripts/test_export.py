"""The command `ddpm-export`, and sampling and measuring with the files that it writes."""

import json
import sys

import numpy as np
import pytest
from ddpm_hf.scripts import evaluate, export
from ddpm_hf.scripts import sample as sample_script

from ddpm_hf.evaluation.sample_files import read_samples


def test_a_model_is_exported_and_sampled_with_either_backend(model, tmp_path, capsys):
    export.main([str(model), "--variants", "fp16", "int8", "--calibration_images", "16"])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:]] == [
        str(model / "onnx" / name) for name in ("model.onnx", "model_fp16.onnx", "model_int8.onnx")
    ]
    samples = {}
    for backend in ("torch", "onnxruntime", "auto"):
        folder = tmp_path / backend
        sample = ["--model", model, "--num_images", 3, "--steps", 3, "--backend", backend, "--output_dir", folder]
        sample_script.main([str(word) for word in sample])
        samples[backend] = read_samples(str(folder), 3, (8, 8), 1).numpy().astype(int)
    assert "Backend: " in capsys.readouterr().out
    for backend in ("onnxruntime", "auto"):
        assert np.abs(samples[backend] - samples["torch"]).max() <= 1


def test_int8_is_calibrated_on_a_data_set_and_measured(model, tmp_path, capsys):
    export.main([str(model), "--variants", "int8", "--dataset", "digits", "--calibration_images", "32"])
    options = ["--model", model, "--dataset", "digits", "--backend", "onnxruntime", "--variant", "int8"]
    options += ["--num_samples", 32, "--steps", 2, "--bound_images", 4, "--output_dir", tmp_path / "out"]
    evaluate.main([str(word) for word in options])
    evaluation = json.loads((tmp_path / "out" / "metrics.json").read_text())["evaluation"]
    assert evaluation["protocol"]["backend"] == "onnxruntime int8" and evaluation["figures"]


def test_a_program_of_torch_export_is_written(model, tmp_path, capsys):
    export.main(["--model", str(model), "--format", "torch", "--output_dir", str(tmp_path / "new")])
    assert capsys.readouterr().out == f"Written: {tmp_path / 'new' / 'model.pt2'}\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere", "--output_dir", "x"], "nowhere"),
        (["--format", "tflite"], "format"),
        (["--dataset", "digits"], "calibration of int8"),
    ],
)
def test_errors_are_one_sentence(model, options, message):
    with pytest.raises(SystemExit, match=f"export.py: error: .*{message}"):
        export.main(["--model", str(model), *options])
    assert not (model / "onnx").exists()


def test_missing_packages_are_named_with_their_installation(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match=r"export.py: error: .*pip install ddpm_hf\[export\]"):
        export.main([str(model)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "auto", "--variant", "fp16"], "variant='fp16' cannot be given with backend='auto'"),
        (["--backend", "onnxruntime", "--device", "cpu"], "device='cpu' cannot be given"),
        (["--backend", "onnxruntime"], "model.onnx does not exist"),
    ],
)
def test_sampling_says_which_backend_options_exclude_each_other(model, options, message):
    with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}"):
        sample_script.main(["--model", str(model), *options])
