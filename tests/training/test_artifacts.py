"""Figures, metrics and the printed hints of a finished run."""

import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from ddpm_hf.training import artifacts
from ddpm_hf.training.artifacts import loss_figure, read_metrics, run_folder, write_artifacts, write_metrics
from ddpm_hf.training.presets import parse_config
from tests.hub import HubServer
from tests.hub.test_model_card import TRAINING
from tests.training.helpers import TINY


def test_loss_figure_has_a_curve_for_each_loss_in_the_log():
    log = [
        {"images": 16, "loss": 1.0},
        {"images": 32, "loss": None, "validation_loss": 0.9},
        {"images": 48, "loss": 0.5},
    ]
    lines = loss_figure(log).axes[0].get_lines()
    points = [line.get_xdata().tolist() for line in lines]
    assert points[0] == [16, 48] and points[-1] == [32]


def test_metrics_are_read_as_written_and_empty_without_a_file(tmp_path):
    assert read_metrics(tmp_path) == {}
    write_metrics(tmp_path, {"training": {"steps": 3}})
    assert read_metrics(tmp_path) == {"training": {"steps": 3}}


def test_metrics_have_six_digits_and_lists_of_numbers_in_one_line(tmp_path):
    values = {
        "a": [1.23456789e-7, 2, -1234567.8],
        "b": {"c": [], "d": ["x", 1 / 3], "e": [[1, 2], [3, 4]]},
        "f": True,
        "g": 2**53,
    }
    write_metrics(tmp_path, values)
    found = {
        "a": [1.23457e-7, 2, -1234570.0],
        "b": {"c": [], "d": ["x", 0.333333], "e": [[1, 2], [3, 4]]},
        "f": True,
        "g": 2**53,
    }
    assert read_metrics(tmp_path) == found
    text = (tmp_path / "metrics.json").read_text()
    assert "[1.23457e-07, 2, -1234570.0]" in text and "[1, 2]" in text


def test_evaluation_is_suggested_only_with_images_to_evaluate_on(make_pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(artifacts, "show", lambda *_: ({}, {}))
    pipe = make_pipeline(in_channels=1, out_channels=1)
    for dataset, examples, suggested in (("digits", 0, True), ("folder", 0, False), ("folder", 9, True)):
        config = parse_config([*TINY, "--output_dir", str(tmp_path), "--dataset", dataset])
        log = [{"images": 16, "loss": 1.0}]
        write_artifacts(
            config, pipe.unet, pipe.scheduler, log, TRAINING | {"validation_examples": examples, "processes": 1}
        )
        printed = capsys.readouterr().out
        assert (f"evaluate.py --model {tmp_path} --dataset {dataset}" in printed) == suggested
        assert f"sample.py --model {tmp_path}" in printed and f"publish.py {tmp_path}" in printed


def test_model_whose_samples_are_not_finite_is_saved_without_pictures(make_pipeline, tmp_path, capsys):
    pipe = make_pipeline(in_channels=1, out_channels=1)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(math.nan)
    config = parse_config([*TINY, "--output_dir", str(tmp_path)])
    log = [{"images": 16, "loss": 1.0}]
    write_artifacts(config, pipe.unet, pipe.scheduler, log, TRAINING | {"processes": 1})
    printed = capsys.readouterr().out
    assert "No samples.png and denoising.png: samples must be finite" in printed and "from step 1 of" in printed
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file() and (tmp_path / "README.md").is_file()
    assert not (tmp_path / "samples.png").exists()


def test_configuration_and_metrics_of_a_model_on_the_hub_are_downloaded(tmp_path):
    with HubServer() as hub:
        hub.add_repo("u/run", {"config.yaml": b"crop: pad\n", "metrics.json": b'{"a": 1}', "samples.png": b"large"})
        hub.add_repo("u/plain", {"model_index.json": b"{}"})
        # In a process of its own: the client reads the address when it is imported.
        code = "from ddpm_hf.training.artifacts import *; print(*map(run_folder, ('u/run', 'u/plain')), sep='\\n')"
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
        )
    assert done.returncode == 0, done.stderr[-2000:]
    run, plain = map(Path, done.stdout.split())
    assert sorted(file.name for file in run.iterdir()) == ["config.yaml", "metrics.json"]
    assert read_metrics(run) == {"a": 1} and read_metrics(plain) == {} and run_folder(str(run)) == run
