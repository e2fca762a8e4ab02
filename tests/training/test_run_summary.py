"""The summary of a run, its speed and the time left."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ddpm_hf.training import run_summary
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_summary import SpeedReport, describe_run
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
        assert f"on 1 process (cpu) in {named}\n" in describe_run(config, accelerator, 1000, (8, 0), 0)
    finally:
        AcceleratorState._reset_state(True)


def test_the_summary_says_what_is_left_out():
    config = parse_config([*flags(**TINY_TRAINING), "--output_dir", "somewhere"])
    for reasons, line in (("", "Network"), ("3 hidden", "Left out    3 hidden")):
        lines = describe_run(config, Accelerator(cpu=True), 1000, (8, 0), 0, reasons).splitlines()
        assert lines[1].startswith(line)
