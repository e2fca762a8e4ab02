"""What watches a run: its figures are those of the steps, it changes nothing, and it goes on where it was cut."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ddpm_hf.scripts import train
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.batches import GlobalBatches
from ddpm_hf.diffusion.losses import Objective
from ddpm_hf.seeds import make_generator
from ddpm_hf.training.build import build
from ddpm_hf.training.config import parse_config
from ddpm_hf.training.posthoc_ema import list_snapshots, read_snapshot
from ddpm_hf.training.run_logger import RunLogger, read_log
from ddpm_hf.training.step import StepReport, training_step
from ddpm_hf.training.validation import BLOCK, load_validation_images
from tests.scripts.test_train import TINY, assert_bit_identical, checkpoint, rows

RUN = [*TINY, "--checkpoint_every_steps", "4", "--log_every_steps", "3", "--ema_snapshot_every_images", "48"]
WATCHED = ["--validate_every_steps", "2", "--sample_every_steps", "8", "--report_to", "tensorboard"]


def run(output_dir, *options):
    train.main([*RUN, "--output_dir", str(output_dir), *options])
    return checkpoint(output_dir, 12) | {"power_ema": power_ema(output_dir)}


def power_ema(output_dir):
    return load_file(output_dir / "checkpoints" / "checkpoint-00000012" / "power_ema.safetensors")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    return folder, run(folder, *WATCHED)


def test_watching_changes_nothing(watched, tmp_path):
    assert_bit_identical(run(tmp_path / "alone", "--validate_every_steps", "0"), watched[1])
    assert all("validation_loss" not in row for row in read_log(tmp_path / "alone" / "log.jsonl"))
    assert not (tmp_path / "alone" / "samples").exists() and (watched[0] / "samples").is_dir()


def test_a_run_that_was_cut_off_goes_on_with_log_averages_and_snapshots_as_if_it_had_not_been(watched, tmp_path):
    folder, expected = watched
    shutil.copytree(folder, tmp_path / "cut")
    cut = tmp_path / "cut"
    for step in (8, 12):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step:08d}")
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"step": 13, "images": 20')  # torn, and behind rows of steps that will be made again
    assert_bit_identical(run(cut, *WATCHED), expected)
    # Step 4 lies between two rows of the log: what the checkpoint keeps of the sums decides.
    assert rows(cut) == rows(folder)
    for here, there in zip(*(list_snapshots(f / "ema_snapshots") for f in (cut, folder)), strict=True):
        assert here.images_seen == there.images_seen
        assert_bit_identical({"snapshot": read_snapshot(here)}, {"snapshot": read_snapshot(there)})
    assert sorted(p.name for p in (cut / "samples").iterdir()) == sorted(p.name for p in (folder / "samples").iterdir())


def test_the_log_holds_the_means_of_the_steps_by_quartile_of_t(watched, tmp_path):
    folder, _ = watched
    config = parse_config([*RUN, "--output_dir", str(tmp_path)])
    unet, scheduler = initial(config)
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)
    (images, _), accelerator = train.load_images(config), Accelerator()
    batches = GlobalBatches(len(images), config.batch_size, config.seed)
    t, losses, norms = [], [], []
    for step in range(3):
        batch = images[batches(step)]
        report = training_step(accelerator, unet, optimizer, scheduler.diffusion, config, step, [batch])
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
    train.set_seed(config.seed)
    unet, scheduler = build(config)
    return unet.to(memory_format=torch.channels_last), scheduler


def test_the_figures_of_the_last_step_are_in_the_metrics(watched):
    folder, _ = watched
    training, last = json.loads((folder / "metrics.json").read_text())["training"], rows(folder)[-1]
    for name in ("loss", "validation_loss", "validation_loss_ema"):
        assert training[f"final_{name}"] == last[name]
    assert (folder / "loss.png").stat().st_size > 0


def test_the_validation_loss_is_that_of_the_saved_weights_raw_and_averaged(watched):
    folder, saved = watched
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


def test_tensorboard_has_the_figures_of_the_log_and_the_pictures_of_the_files(watched):
    folder, _ = watched
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


def test_snapshots_are_kept_at_their_interval_and_at_the_end(watched):
    folder, saved = watched
    snapshots = list_snapshots(folder / "ema_snapshots")
    assert [s.images_seen for s in snapshots] == [48, 96, 144, 192]
    last = load_file(snapshots[-1].file)
    assert last.keys() == saved["power_ema"].keys()
    assert all(torch.equal(value, saved["power_ema"][name]) for name, value in last.items())


def test_a_dry_run_says_what_the_run_would_be_and_leaves_nothing(watched, tmp_path, capsys):
    folder, saved = watched
    capsys.readouterr()
    train.main([*RUN, *WATCHED, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    parameters = sum(value.numel() for value in saved["model"].values())
    adam = sum(value.nbytes for key, value in saved["optimizer"].items() if not key.endswith("/step"))
    averages = sum(value.nbytes for value in [*saved["ema"].values(), *saved["power_ema"].values()])
    assert f"{parameters:,} parameters on 1 process (cpu)" in printed
    for name, size in (("parameters", 4 * parameters), ("gradients", 4 * parameters), ("Adam", adam), ("averages", averages)):  # fmt: skip
        assert f"{name} {size / 1e3:.3g} kB" in printed
    assert (
        "12 steps of 16 images" in printed and "256 validation images" in printed and str(tmp_path / "out") in printed
    )
    assert "images/s over 5 steps" in printed and "to go" in printed and "nothing was written" in printed
    # Beside a run that is there, and with --overwrite, it takes nothing away either.
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    train.main([*RUN, *WATCHED, "--output_dir", str(folder), "--dry_run", "--overwrite"])
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def fed(config, unet, *steps):
    """RunLogger that took in steps of (t, losses, grad_norm, skipped), one at a time."""
    records = RunLogger(config, Accelerator(cpu=True), unet, None, {}, None, 0, None, 100)
    for done, (t, losses, norm, skipped) in enumerate(steps, start=1):
        losses = torch.tensor(losses)
        report = StepReport(torch.tensor(t), losses, torch.tensor(norm), 3 * losses, torch.tensor(skipped))
        records.after_step(done, report)
        yield
    records.close()


def test_skipped_steps_are_counted_and_kept_out_of_the_means(tmp_path, make_unet):
    config = parse_config([*TINY, "--output_dir", str(tmp_path), "--log_every_steps", "3"])
    nan, t = math.nan, [0, 300, 600, 600]
    steps = [
        (t, [1.0, 5.0, 3.0, 4.0], 6.0, 0.0),
        (t, [1.0, nan, 3.0, math.inf], nan, 1.0),
        (t, [2.0, 6.0, 4.0, 5.0], 7.0, 0.0),
        *[(t, [nan] * 4, nan, 1.0)] * 3,
    ]
    list(fed(config, make_unet(), *steps))
    first, second = read_log(tmp_path / "log.jsonl")
    assert first["loss_by_t_quartile"] == [1.5, 5.5, 4.0, None] and first["skipped_steps"] == 1
    assert (first["loss"], first["objective"], first["grad_norm"]) == (3.75, 11.25, 6.5)
    assert (second["loss"], second["objective"], second["grad_norm"], second["skipped_steps"]) == (None, None, None, 3)


def test_rows_that_a_full_disk_did_not_take_are_in_the_log_once_there_is_room(tmp_path, make_unet, caplog):
    config = parse_config([*TINY, "--output_dir", str(tmp_path), "--log_every_steps", "1"])
    steps = fed(config, make_unet(), *[([0], [1.0], 1.0, 0.0)] * 3)
    next(steps)
    log = tmp_path / "log.jsonl"
    log.rename(tmp_path / "kept")
    log.symlink_to("/dev/full")
    next(steps)
    assert "Row 2 of log.jsonl could not be written ([Errno 28] No space left on device)" in caplog.text
    assert list(steps) == [None]
    assert [row["step"] for row in read_log(log)] == [1, 2, 3] and not log.is_symlink()


def test_a_pipeline_of_the_weights_in_the_folder_is_what_was_averaged(watched):
    folder, saved = watched
    weights = DDPMPipelineCustom.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(weights[name], average) for name, average in saved["ema"].items())
