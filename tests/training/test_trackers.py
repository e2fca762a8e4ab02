"""A tracker that fails is reported once, and the run goes on to its end."""

import pytest

from tests.training.helpers import Trainer, steps_saved

TRACKED = ["--report_to", "tensorboard", "--log_every_steps", "1", "--sample_every_steps", "6"]
CLASS = "accelerate.tracking:TensorBoardTracker"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("data"))
    yield trainer
    trainer.close()


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
    codes, output = trainer.run(tmp_path / "run", "--report_to", "wandb")
    assert codes == [1] and "report_to = 'wandb' needs a package that is not installed: wandb" in output
    assert not (tmp_path / "run").exists()
