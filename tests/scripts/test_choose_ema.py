"""The script that chooses the length of the EMA after training."""

import json
import os

import diffusers
import numpy as np
import pytest
import torch
from ddpm_hf.scripts import choose_ema as ema_script
from ddpm_hf.scripts import train
from PIL import Image

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.training import artifacts
from ddpm_hf.training.posthoc_ema import list_snapshots, plan_rebuild, rebuild
from tests.conftest import flags
from tests.training.helpers import TINY

RUN = [*TINY, *flags(total_images=320, warmup_steps=1, checkpoint_every_steps=20)]  # the last value of an option counts
LENGTHS = ["0.05", "0.08", "0.2"]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run shorter than its average's half-life, so that the average in its folder is far from the best."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    averaged = ["--ema_halflife_images", "100000", "--no_ema_warmup", "--ema_snapshot_every_images", "32"]
    train.main([*RUN, *averaged, "--output_dir", str(folder)])
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"evaluation": {}, "quality": {}}))
    return folder, files(folder)


@pytest.fixture
def folder(trained):
    """The folder as the run left it."""
    path, content = trained
    for file in [p for p in path.rglob("*") if p.is_file() and p.relative_to(path) not in content]:
        file.unlink()
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def sweep(folder, *options):
    ema_script.main(
        ["--model", str(folder), "--seed", "3", "--validation_images", "256", "--lengths", *LENGTHS, *options]
    )


def test_best_length_is_written_and_stays_in_a_second_sweep(folder, capsys):
    sweep(folder)
    printed = capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    found = metrics["ema"]
    values = {row["length"]: row["value"] for row in found["curve"]}
    assert list(values) == [0.05, 0.08, 0.2] and found["length"] == min(values, key=values.get)
    assert found["value"] == min(values.values()) < found["value_before"] and found["images_seen"] == 320
    assert all(f"{value:.6g}" in printed for value in [*values.values(), found["value_before"]])
    # The run measured the same average with the same noise.
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert found["value_before"] == pytest.approx(log[-1]["validation_loss_ema"], rel=1e-5)

    weights = DDPMPipelineCustom.from_pretrained(folder).unet.state_dict()
    expected = rebuild(plan_rebuild(list_snapshots(folder / "ema_snapshots"), found["length"]))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert diffusers.DDPMPipeline.from_pretrained(folder)(num_inference_steps=2).images
    # The metrics of the old weights are dropped.
    assert metrics.keys() == {"training", "ema"} and metrics["training"]["steps"] == 20
    assert f"σ_rel = {found['length']:g}" in (folder / "README.md").read_text()
    assert np.asarray(Image.open(folder / "ema.png")).std() > 1 and not list(folder.glob(".ema*"))

    before = files(folder)
    sweep(folder)
    assert "at least as good as these averages, and stay" in capsys.readouterr().out
    assert files(folder).keys() == before.keys()
    assert json.loads((folder / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize("criterion", ["bits_per_dim", "fd"])
def test_measure_only_writes_nothing_for_other_criteria(folder, tmp_path, capsys, criterion):
    before = files(folder)
    options = ["--criterion", criterion, "--measure_only", "--validation_images", "100", "--bound_stride", "50"]
    options += ["--num_samples", "60", "--steps", "5", "--cache_dir", str(tmp_path)]
    sweep(folder, *options)
    printed = capsys.readouterr().out
    assert {"bits_per_dim": "bits/dim of 100 validation images", "fd": "FD-digits classifier, n = 60"}[
        criterion
    ] in printed
    assert len([line for line in printed.splitlines() if line.split()[:1] and line.split()[0] in LENGTHS]) == 3
    assert files(folder) == before


def test_sweep_that_fails_in_writing_leaves_the_folder_unchanged(folder, monkeypatch):
    before = files(folder)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(artifacts, "write_metrics_and_card", full)
    with pytest.raises(OSError, match="No space"):
        sweep(folder)
    monkeypatch.undo()
    assert files(folder) == before


def test_next_sweep_completes_one_that_was_killed_moving_files(folder):
    old = files(folder)
    expected = dict(old)
    for name in old:
        if name.name in ("metrics.json", "README.md", "diffusion_pytorch_model.safetensors", "samples.png"):
            expected[name] = b"of the best average"
            place = folder / ema_script.PENDING / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(expected[name])
    os.replace(folder / ema_script.PENDING / "README.md", folder / "README.md")  # the kill came after this one
    ema_script.finish_writing(folder)
    assert files(folder) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "0.3"], r"lengths must be a finite number in \(0, 0.2887\), got 0.3"),
        (["--lengths", "0.05", "0.001"], "σ_rel = 0.001 is out of the range of these 10 snapshots"),
        (["--images_seen", "5"], "images_seen must be at least 32"),
        (["--steps", "0"], "steps must be an integer of at least 1"),
        (["--model", "./nowhere"], "nowhere holds no config.yaml"),
    ],
)
def test_wrong_options_are_one_sentence_and_nothing_is_written(folder, options, message):
    before = files(folder)
    with pytest.raises(SystemExit, match=f"choose_ema.py: error: .*{message}"):
        sweep(folder, *options)
    assert files(folder) == before


def test_run_without_snapshots_is_told_how_to_save_them(model):
    with pytest.raises(SystemExit, match="holds no snapshots .*--ema_snapshot_every_images"):
        sweep(model)
