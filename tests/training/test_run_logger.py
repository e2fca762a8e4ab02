"""Logging: values are those of the steps, the run is not changed, and an interrupted log is continued."""

import errno
import io
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from ddpm_hf.scripts import train
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.batches import GlobalBatches
from ddpm_hf.diffusion.losses import Objective
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.seeds import make_generator
from ddpm_hf.training import log_file
from ddpm_hf.training.build import build
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.log_file import read_log
from ddpm_hf.training.posthoc_ema import list_snapshots, read_snapshot
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import load_images
from ddpm_hf.training.run_logger import RunLogger
from ddpm_hf.training.step import StepReport, training_step
from ddpm_hf.training.validation import BLOCK, load_validation_images
from tests.training.helpers import TINY, assert_bit_identical, checkpoint, rows

RUN = [*TINY, "--checkpoint_every_steps", "4", "--log_every_steps", "3", "--ema_snapshot_every_images", "48"]
LOGGING = ["--validate_every_steps", "2", "--sample_every_steps", "8", "--report_to", "tensorboard"]


def run(output_dir, *options):
    train.main([*RUN, "--output_dir", str(output_dir), *options])
    return checkpoint(output_dir, 12) | {"power_ema": power_ema(output_dir)}


def power_ema(output_dir):
    return load_file(output_dir / "checkpoints" / "checkpoint-00000012" / "power_ema.safetensors")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    return folder, run(folder, *LOGGING)


def test_logging_does_not_change_the_run(logged, tmp_path):
    assert_bit_identical(run(tmp_path / "alone", "--validate_every_steps", "0"), logged[1])
    assert all("validation_loss" not in row for row in read_log(tmp_path / "alone" / "log.jsonl"))
    assert not (tmp_path / "alone" / "samples").exists() and (logged[0] / "samples").is_dir()


def test_log_averages_and_snapshots_resume_as_if_uninterrupted(logged, tmp_path):
    folder, expected = logged
    shutil.copytree(folder, tmp_path / "cut")
    cut = tmp_path / "cut"
    for step in (8, 12):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step:08d}")
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"step": 13, "images": 20')  # incomplete, after rows of steps that will be repeated
    assert_bit_identical(run(cut, *LOGGING), expected)
    # Step 4 lies between two rows of the log: the sums in the checkpoint matter.
    assert rows(cut) == rows(folder)
    for here, there in zip(*(list_snapshots(f / "ema_snapshots") for f in (cut, folder)), strict=True):
        assert here.images_seen == there.images_seen
        assert_bit_identical({"snapshot": read_snapshot(here)}, {"snapshot": read_snapshot(there)})
    assert sorted(p.name for p in (cut / "samples").iterdir()) == sorted(p.name for p in (folder / "samples").iterdir())


def test_the_log_has_the_mean_losses_by_quartile_of_t(logged, tmp_path):
    folder, _ = logged
    config = parse_config([*RUN, "--output_dir", str(tmp_path)])
    unet, scheduler = initial(config)
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)
    (images, _), accelerator = load_images(config), Accelerator()
    batches, sampler = (
        GlobalBatches(len(images), config.batch_size, config.seed),
        make_timestep_sampler(config.timestep_sampler, 1000),
    )
    t, losses, norms = [], [], []
    for step in range(3):
        batch = images[batches.indices(step)]
        report = training_step(accelerator, unet, optimizer, scheduler.diffusion, config, step, [batch], sampler)
        t, losses, norms = t + report.t.tolist(), losses + report.losses.tolist(), norms + [report.grad_norm.item()]
    (row,) = [row for row in read_log(folder / "log.jsonl") if row["step"] == 3]
    assert row["images"] == 48
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert row["objective"] == pytest.approx(row["loss"], rel=1e-6)  # L_simple is minimized here
    assert row["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-3)
    quartiles = [np.mean([x for x, at in zip(losses, t) if at // 250 == q]) for q in range(4)]
    assert row["loss_by_t_quartile"] == pytest.approx(quartiles, rel=1e-4)
    assert row["learning_rate"] == config.learning_rate_at(2)


def initial(config):
    torch.manual_seed(config.seed)
    set_seed(config.seed)
    unet, scheduler = build(config)
    return unet.to(memory_format=torch.channels_last), scheduler


def test_the_losses_of_the_last_step_are_in_the_metrics(logged):
    folder, _ = logged
    training, last = json.loads((folder / "metrics.json").read_text())["training"], rows(folder)[-1]
    for name in ("loss", "validation_loss", "validation_loss_ema"):
        assert training[f"final_{name}"] == pytest.approx(last[name], rel=1e-5)
    assert (folder / "loss.png").stat().st_size > 0


def test_validation_loss_is_that_of_the_saved_and_averaged_weights(logged):
    folder, saved = logged
    config = parse_config(["--config", str(folder / "config.yaml")])
    images = load_validation_images(config)
    assert len(images) == config.validation_images
    unet, scheduler = build(config)
    unet.eval()
    with torch.no_grad():
        for name, key in (("model", "validation_loss"), ("ema", "validation_loss_ema")):
            unet.load_state_dict(saved[name])
            losses = []
            for start in range(0, len(images), BLOCK):
                batch = images[list(range(start, start + BLOCK))]["images"] / 127.5 - 1
                noise = torch.randn(batch.shape, generator=make_generator("cpu", 3, "validation", start))
                t = ((torch.arange(start, start + BLOCK) + 0.5) * 1000 / len(images)).long()
                losses.append(Objective()(unet, scheduler.diffusion, batch, t, noise).simple)
            assert torch.cat(losses).mean().item() == pytest.approx(rows(folder)[-1][key], rel=1e-5)


def test_tensorboard_has_the_values_of_the_log_and_the_pictures(logged):
    folder, _ = logged
    events = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0, "scalars": 0}).Reload()
    log = read_log(folder / "log.jsonl")
    for name in ("loss", "grad_norm", "learning_rate", "images_per_second", "validation_loss", "validation_loss_ema"):
        there = {event.step: event.value for event in events.Scalars(name)}
        assert there == pytest.approx({row["step"]: row[name] for row in log if name in row}, rel=1e-5) and there
    quartile = {event.step: event.value for event in events.Scalars("loss_t_quartile_4")}
    of_log = {row["step"]: row["loss_by_t_quartile"][3] for row in log if "loss_by_t_quartile" in row}
    assert quartile == pytest.approx({step: value for step, value in of_log.items() if value is not None}, rel=1e-5)
    for name, ending in (("samples", ""), ("denoising", "-denoising")):
        pictures = events.Images(name)
        assert [picture.step for picture in pictures] == [8]
        for picture in pictures:
            there = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB"))
            file = folder / "samples" / f"step-{picture.step:08d}{ending}.png"
            assert np.array_equal(there, np.asarray(Image.open(file).convert("RGB"))) and there.std() > 1


def test_snapshots_are_saved_at_their_interval_and_at_the_end(logged):
    folder, saved = logged
    snapshots = list_snapshots(folder / "ema_snapshots")
    assert [s.images_seen for s in snapshots] == [48, 96, 144, 192]
    last = load_file(snapshots[-1].file)
    assert last.keys() == saved["power_ema"].keys()
    assert all(torch.equal(value, saved["power_ema"][name]) for name, value in last.items())


def test_a_dry_run_prints_a_summary_and_writes_nothing(logged, tmp_path, capsys):
    folder, saved = logged
    capsys.readouterr()
    train.main([*RUN, *LOGGING, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    parameters = sum(value.numel() for value in saved["model"].values())
    adam = sum(value.nbytes for key, value in saved["optimizer"].items() if not key.endswith("/step"))
    averages = sum(value.nbytes for value in [*saved["ema"].values(), *saved["power_ema"].values()])
    assert f"{parameters:,} parameters on 1 process (cpu)" in printed
    for name, size in (("parameters", 4 * parameters), ("gradients", 4 * parameters), ("Adam", adam), ("averages", averages)):  # fmt: skip
        assert f"{name} {tqdm.format_sizeof(size, 'B')}" in printed
    assert (
        "12 steps of 16 images" in printed and "256 validation images" in printed and str(tmp_path / "out") in printed
    )
    assert "images/s over 5 steps" in printed and "to go" in printed and "nothing was written" in printed
    # In the folder of a finished run, and with --overwrite, it deletes nothing either.
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    train.main([*RUN, *LOGGING, "--output_dir", str(folder), "--dry_run", "--overwrite"])
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def log_steps(config, unet, *steps):
    """Log steps of (t, losses, grad_norm, skipped), one at a time."""
    scheduler, averages = build(config)[1], {"ema": EMA(unet, 100)}
    run_logger = RunLogger(config, Accelerator(cpu=True), unet, scheduler, averages, None, 0, None, 100)
    for done, (t, losses, norm, skipped) in enumerate(steps, start=1):
        losses = torch.tensor(losses)
        report = StepReport(torch.tensor(t), losses, torch.tensor(norm), 3 * losses, torch.tensor(skipped))
        run_logger.after_step(done, report)
        yield
    run_logger.close()


def test_skipped_steps_are_counted_and_left_out_of_the_means(tmp_path, make_unet):
    config = parse_config([*TINY, "--output_dir", str(tmp_path), "--log_every_steps", "3"])
    nan, t = math.nan, [0, 300, 600, 600]
    steps = [
        (t, [1.0, 5.0, 3.0, 4.0], 6.0, 0.0),
        (t, [1.0, nan, 3.0, math.inf], nan, 1.0),
        (t, [2.0, 6.0, 4.0, 5.0], 7.0, 0.0),
        *[(t, [nan] * 4, nan, 1.0)] * 3,
    ]
    list(log_steps(config, make_unet(), *steps))
    first, second = read_log(tmp_path / "log.jsonl")
    assert first["loss_by_t_quartile"] == [1.5, 5.5, 4.0, None] and first["skipped_steps"] == 1
    assert (first["loss"], first["objective"], first["grad_norm"]) == (3.75, 11.25, 6.5)
    assert (second["loss"], second["objective"], second["grad_norm"], second["skipped_steps"]) == (None, None, None, 3)


def test_preview_that_is_not_finite_does_not_end_the_training(tmp_path, make_unet, caplog):
    config = parse_config([*RUN, "--output_dir", str(tmp_path), "--sample_every_steps", "1", "--log_every_steps", "1"])
    unet = make_unet(in_channels=1, out_channels=1)
    with torch.no_grad():
        unet.conv_out.bias.fill_(math.nan)
    list(log_steps(config, unet, ([0], [1.0], 0.5, 0.0)))
    assert "No sample picture of step 1: samples must be finite" in caplog.text and not (tmp_path / "samples").exists()
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1]


def test_rows_refused_by_a_full_disk_are_written_once_there_is_room(tmp_path, make_unet, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = parse_config([*TINY, "--output_dir", str(tmp_path), "--log_every_steps", "1"])
    steps = log_steps(config, make_unet(), *[([0], [1.0], 1.0, 0.0)] * 3)
    next(steps)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(log_file, "open", refuse, raising=False)
        next(steps)
    assert "Row 2 of log.jsonl could not be written ([Errno 28] No space left on device)" in caplog.text
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1]
    assert list(steps) == [None]
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_the_saved_pipeline_has_the_average_of_a_logged_run(logged):
    folder, saved = logged
    weights = DDPMPipelineCustom.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(weights[name], average) for name, average in saved["ema"].items())
