"""Figures, metrics and the printed hints of a finished run."""

import math

import torch

from ddpm_hf.training import artifacts
from ddpm_hf.training.artifacts import loss_figure, read_metrics, write_artifacts, write_metrics
from ddpm_hf.training.presets import parse_config
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
