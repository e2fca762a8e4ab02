"""The summary of a run, its speed and the time left."""

import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm_hf.training import run_summary
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import open_images
from ddpm_hf.training.run_summary import SpeedReport, describe_data, describe_run, misfits
from tests.conftest import TINY_TRAINING, flags


@pytest.mark.parametrize(
    ("first_step", "num_steps", "reported"),
    [(0, 100, 6), (10, 100, 16), (0, 3, 3), (98, 100, 100), (99, 100, None), (100, 100, None)],
)
def test_speed_is_reported_once_after_five_timed_steps_or_at_the_end(first_step, num_steps, reported):
    speed = SpeedReport(first_step, num_steps, 16, torch.device("cpu"))
    lines = {done: line for done in range(first_step + 1, num_steps + 1) if (line := speed.after_step(done))}
    assert list(lines) == ([] if reported is None else [reported])


def test_speed_and_time_left_follow_from_the_timed_steps(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(run_summary.time, "monotonic", lambda: next(clock))
    speed = SpeedReport(0, 1005 + 1, 16, torch.device("cpu"))
    (line,) = [line for done in range(1, 8) if (line := speed.after_step(done))]
    assert line == "Speed       40.0 images/s over 5 steps; about 06:40 to go"


@pytest.mark.parametrize(("precision", "named"), [("no", "float32"), ("bf16", "bf16 mixed precision")])
def test_the_summary_names_the_precision(precision, named):
    config = parse_config([*flags(**TINY_TRAINING), "--output_dir", "somewhere"])
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        assert f"on 1 process (cpu) in {named}\n" in describe_run(config, accelerator, (1000, 1000), (8, 0), 0)
    finally:
        AcceleratorState._reset_state(True)


CUSTOM = ["--config", "custom", "--dataset", "somewhere"]
FOLDER = ["--config", "folder-64", "--dataset", "somewhere"]


@pytest.mark.parametrize(
    ("options", "parameters", "examples", "warnings"),
    [
        (CUSTOM, 26_623_363, 60, ["166,667 passes over 60 images .* --num_epochs 2000", "36 parameters for each of"]),
        (FOLDER, 5_072_643, 60, ["16,667 passes over 60 images"]),
        (FOLDER, 5_072_643, 300, []),
        (CUSTOM, 26_623_363, 10_000, []),
        (CUSTOM, 26_623_363, None, []),  # a stream
        ([*CUSTOM, "--num_steps", "500"], 26_623_363, 10_000, ["warmup_steps = 1,000 is longer .* --warmup_steps 50"]),
        (["--config", "cifar10"], 35_746_307, 50_000, []),
        (["--config", "digits-conditional"], 1_000_000, 1437, []),
        (["--config", "butterflies-128"], 113_673_219, 1000, []),
        (["--config", "mnist"], 6_469_889, 60_000, []),
    ],
)
def test_a_run_that_does_not_fit_its_data_is_warned_of(options, parameters, examples, warnings):
    summary = describe_run(parse_config(options), Accelerator(cpu=True), (parameters, parameters), (examples, 0), 0)
    found = [line for line in summary.splitlines() if line.startswith("Warning     ")]
    assert len(found) == len(warnings) and all(map(re.search, warnings, found)), summary


def test_proposed_options_end_the_warning():
    options = CUSTOM
    for _ in range(3):  # the warm-up is too long for the shorter run
        found = misfits(parse_config(options).with_length(3), 1000, 3)
        options = [*options, *(word for line in found for word in re.search(r"--\w+ \d+", line)[0].split())]
    assert found == [] and "--num_epochs" in options and "--warmup_steps" in options


@pytest.mark.parametrize(
    ("examples", "passes"), [(60, "166,667 passes"), (40_000_000, "0.2 passes"), (None, "images\n")]
)
def test_the_length_is_given_in_passes_over_the_data(examples, passes):
    summary = describe_run(parse_config(CUSTOM), Accelerator(cpu=True), (1000, 1000), (examples, 0), 0)
    assert f"156,250 steps of 64 images{', ' * (examples is not None)}{passes.removeprefix('images')}" in summary


def test_the_lines_about_the_data_follow_the_number_of_images():
    config = parse_config([*flags(**TINY_TRAINING), "--output_dir", "somewhere"])
    for data, lines in (
        ("", ["Network"]),
        ("Found       x\nLeft out    3 hidden\n", ["Found       x", "Left out    3", "Network"]),
    ):
        found = describe_run(config, Accelerator(cpu=True), (1000, 1000), (8, 0), 0, data).splitlines()
        assert found[0].startswith("Data        8 images") and all(map(str.startswith, found[1:], lines))


def test_classes_are_described_with_abbreviated_names(tmp_path):
    for name in ("a" * 60, *map(str, range(20))):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    options = [*flags(**TINY_TRAINING, channels=1), "--dataset", str(tmp_path)]
    for labels, unused in (([], "; --label_column trains on them\n"), (["--label_column", "label"], "\n")):
        images, _ = open_images(parse_config([*options, *labels]))
        names = "0, 1, 10, 11, 12, 13, 14, 15, 16, ..., [...]"
        assert f"Classes     21 in the column 'label': {names}{unused}" in describe_data(images)
