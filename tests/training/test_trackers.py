"""A tracker that fails is reported once, and the run goes on to its end."""

from typing import get_args

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from ddpm_hf.training.config import Tracker
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.trackers import Trackers
from tests.training.helpers import steps_saved

TRACKED = ["--report_to", "tensorboard", "--log_every_steps", "1", "--sample_every_steps", "6"]
CLASS = "accelerate.tracking:TensorBoardTracker"


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given."""

    requires_logging_directory, tracker = False, None

    def __init__(self, project, **_):
        super().__init__()
        self.project, self.kept, self.closed = project, [], False

    def start(self):
        if self.fails_at == "start":
            raise OSError("no network")

    def store_init_configuration(self, values):
        self.kept.append(values)

    def log(self, values, step, **_):
        if self.fails_at == "log":
            raise OSError("no network")
        self.kept.append((step, values))

    def finish(self):
        self.closed = True


class Pictures(Recorder):
    def log_images(self, values, step, **options):
        self.kept.append((step, {name: pixels.shape for name, pixels in values.items()}, options))


@pytest.fixture
def recorders(monkeypatch):
    """Accelerate's trackers "aim" (one picture), "wandb" (several) and "trackio" (none) as recorders."""

    def make(fails_at=None):
        for name, cls in (("aim", Pictures), ("wandb", Pictures), ("trackio", Recorder)):
            fails = fails_at if name == "trackio" else None
            monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, type(name, (cls,), {"name": name, "fails_at": fails}))
        accelerator = Accelerator(cpu=True)
        accelerator.log_with = ["aim", "trackio", "wandb"]
        return accelerator, Trackers(accelerator, {"seed": "0"}, 0, "flowers")

    return make


@pytest.mark.parametrize(("fails_at", "left"), [(None, 3), ("start", 2), ("log", 2)])
def test_one_tracker_of_several_that_fails_is_left_out(recorders, caplog, fails_at, left):
    accelerator, trackers = recorders(fails_at)
    trackers.log({"loss": 1.0}, 4)
    trackers.log_picture("samples", np.zeros((1, 3, 5, 3), np.uint8), 4)
    kept = {tracker.name: tracker.kept for tracker in accelerator.trackers}
    assert len(kept) == left and all(k[:2] == [{"seed": "0"}, (4, {"loss": 1.0})] for k in kept.values())
    assert kept["aim"][2] == (4, {"samples": (3, 5, 3)}, {}) and kept["wandb"][2] == (4, {"samples": (1, 3, 5, 3)}, {})
    assert caplog.text.count("trackio failed (OSError: no network); training continues without it") == 3 - left
    assert {tracker.project for tracker in accelerator.trackers} == {"flowers"}
    alive = accelerator.trackers
    trackers.close()
    assert all(tracker.closed for tracker in alive)


def test_the_trackers_are_those_of_accelerate():
    assert set(get_args(Tracker)) - {"none"} == set(LoggerType.list()) - {"all"}


@pytest.mark.parametrize("names", [["none", "wandb"], ["wandb", "wandb"]])
def test_contradicting_trackers_are_refused(names):
    with pytest.raises(ValueError, match="report_to must be different trackers, or 'none' alone"):
        parse_config(["--report_to", *names])
    assert parse_config(["--report_to", "none"]).trackers == []
    assert parse_config(["--report_to", "wandb", "trackio"]).trackers == ["wandb", "trackio"]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("__init__", "OSError(28, 'No space left on device')"),
        ("store_init_configuration", "Exception('no login')"),
        ("log", "OSError(28, 'No space left on device')"),
        ("log_images", "MemoryError()"),
        ("finish", "Exception('no login')"),
    ],
)
def test_a_tracker_that_raises_is_reported_once_and_training_goes_on(trainer, tmp_path, function, error):
    failure = {"module": CLASS, "function": function, "error": error}
    codes, output = trainer.run(tmp_path / "run", *TRACKED, failures=[failure])
    assert codes == [0], output
    assert output.count("training continues without it") == 1 and "Traceback" not in output
    assert f"tensorboard failed ({error.split('(')[0]}" in output and steps_saved(tmp_path / "run") == [4, 8, 12]


def test_a_tracker_that_raises_is_reported_on_two_processes_too(trainer, tmp_path):
    failure = {"module": CLASS, "function": "log", "error": "OSError(5, 'Input/output error')"}
    codes, output = trainer.run(tmp_path / "run", *TRACKED, processes=2, failures=[failure])
    assert codes == [0, 0] and output.count("training continues without it") == 1, output


@pytest.mark.parametrize("num_bytes", [0, 4096])
def test_a_disk_too_small_for_the_tracker_does_not_end_the_run(trainer, tmp_path, num_bytes):
    disk = {"folder": str(tmp_path / "run" / "logs"), "num_bytes": max(num_bytes, 1), "num_inodes": 2 + bool(num_bytes)}
    codes, output = trainer.run(tmp_path / "run", *TRACKED, small_disk=disk)
    if "no file system can be mounted here" in output:
        pytest.skip("no file system can be mounted here")
    assert codes == [0] and steps_saved(tmp_path / "run") == [4, 8, 12], output
    assert output.count("tensorboard failed (OSError: [Errno 28] No space left on device") == 1
    assert "Traceback" not in output and "Exception in thread" not in output


def test_a_tracker_that_is_not_installed_is_refused(trainer, tmp_path):
    codes, output = trainer.run(tmp_path / "run", "--report_to", "tensorboard", "wandb")
    assert codes == [1] and "needs packages that are not installed: wandb" in output
    assert not (tmp_path / "run").exists()
