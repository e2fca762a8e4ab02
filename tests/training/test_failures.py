"""Errors of the machine end a run with one sentence: what failed, what is safe, what to do."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import SafetensorError

from ddpm_hf.data.decoding import UnreadableImage
from ddpm_hf.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from ddpm_hf.training.failures import describe, in_one_sentence, what_is_safe
from tests.training.helpers import ROOT, TINY, photo_options, steps_saved, until

MEMORY = "memory ran out.*Use a smaller --micro_batch_size"
RUNS_OUT = {
    "Python": "MemoryError()",
    "CPU": 'RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can\'t allocate memory: you tried")',
    "CUDA": "__import__('torch').OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')",
}


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), MEMORY),
        (MemoryError("Unable to allocate 7.28 TiB"), r"memory ran out \(Unable to allocate 7.28 TiB\)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines"), MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), MEMORY),
        (RuntimeError("std::bad_alloc"), MEMORY),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), MEMORY),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file"),
            "No space left on device: '/disk/file'. Free some",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"),
            "Permission denied: '/x'. Check the permissions",
        ),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system. Use another --output_dir"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files. Use fewer --num_workers"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (datasets.exceptions.DatasetGenerationError("An error occurred"), None),
        (chained(datasets.exceptions.DatasetGenerationError("x"), OSError(28, "No space left")), "Free some space"),
        (chained(datasets.exceptions.DatasetGenerationError("x"), KeyError("column")), "KeyError: 'column'"),
        (ConnectionError("the Hub cannot be reached"), "^the Hub cannot be reached[.]$"),
        (OfflineModeIsEnabled("Cannot reach https://hf.co/x"), "Cannot reach https://hf.co/x. Connect to the network"),
        (UnreadableImage("/data/1.png (cut short)"), "an image cannot be read any more: /data/1.png"),
        (RuntimeError("shapes do not match"), None),
        (KeyError("bug"), None),
    ],
)
def test_errors_of_the_machine_are_described_and_others_are_not(error, sentence):
    found = describe(error)
    assert found is None if sentence is None else re.search(sentence, found) and "\n" not in found, found


def test_the_newest_checkpoint_is_named_as_safe(tmp_path):
    assert what_is_safe(tmp_path) == "No checkpoint was saved before."
    for step in (7, 12):
        save_checkpoint(tmp_path / "checkpoints", step, {}, {})
    assert "checkpoint of step 12 is safe; the same command resumes" in what_is_safe(tmp_path)


def test_errors_of_the_program_keep_their_traceback(tmp_path):
    for output_dir, error in ((None, KeyError("bug")), (tmp_path, ValueError("bug")), (tmp_path, RuntimeError("bug"))):
        with pytest.raises(type(error), match="bug"), in_one_sentence(output_dir):
            raise error


class BrokenConnection(ConnectionResetError):
    """torch's handler of signals raises while this error is reported."""

    def __str__(self):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_a_worker_that_ends_while_its_error_is_reported_is_named(tmp_path):
    with pytest.raises(SystemExit, match="DataLoader worker .* is killed"), in_one_sentence(tmp_path):
        raise BrokenConnection


PREPARE = {"ddpm_hf.training.run_data": "load_images", "ddpm_hf.training.build": "build_unet"}
TRAIN = {"ddpm_hf.training.step": "training_step", "ddpm_hf.training.ema:EMA": "update"}
FINISH = {
    "ddpm_hf.training.artifacts": "write_artifacts",
    "ddpm_hf.pipelines.ddpm:DDPMPipelineCustom": "save_pretrained",
}


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [(*where, "Python") for where in (PREPARE | TRAIN | FINISH).items()]
    + [("ddpm_hf.training.step", "training_step", error) for error in ("CPU", "CUDA")],
)
def test_running_out_of_memory_is_one_sentence_with_what_is_safe(trainer, tmp_path, module, function, error):
    failure = {"module": module, "function": function, "error": RUNS_OUT[error], "at_call": 6 if module in TRAIN else 1}
    codes, output = trainer.run(tmp_path / "run", failures=[failure], finish=True)
    assert codes == [1] and "Traceback" not in output, output
    assert re.search(f"train.py: error: {MEMORY}", output)
    step = 4 if module in TRAIN else 12 if module in FINISH else None
    assert (f"The checkpoint of step {step} is safe; the same command resumes" in output) == (step is not None)
    if step:
        assert trainer.run(tmp_path / "run", finish=True)[0] == [0]


@pytest.mark.parametrize("processes", [1, 2])
def test_memory_that_a_checkpoint_needs_fails_the_save_alone(trainer, tmp_path, processes):
    failure = {"module": "ddpm_hf.training.checkpoints", "function": "save_checkpoint", "error": "MemoryError()"}
    codes, output = trainer.run(tmp_path / "run", failures=[failure], processes=processes)
    assert codes == [0] * processes and steps_saved(tmp_path / "run") == [8, 12], output
    assert "The checkpoint of step 4 could not be written (no memory is left); the last one is none" in output


def test_a_failed_deletion_of_an_old_checkpoint_is_no_failed_save(trainer, tmp_path):
    error = "OSError(16, 'Device or resource busy')"
    failure = {"module": "ddpm_hf.training.checkpoints", "function": "prune_checkpoints", "error": error}
    codes, output = trainer.run(tmp_path / "run", "--keep_checkpoints", "1", failures=[failure])
    assert codes == [0] and steps_saved(tmp_path / "run") == [12], output
    assert (
        "Old checkpoints could not be deleted ([Errno 16] Device or resource busy); that of step 4 is saved" in output
    )


@pytest.mark.parametrize("workers", ["0", "1", "2"])
@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_an_image_that_goes_during_training_is_named(trainer, photos, tmp_path, workers, damage):
    folder, image = tmp_path / "run", photos / "07.jpg"
    options = [
        *photo_options(photos),
        "--memory_limit_bytes",
        "0",
        "--num_workers",
        workers,
        "--total_images",
        "160000",
    ]
    (pid,) = trainer.start(folder, *options)
    until(lambda: (folder / "checkpoints").exists() and steps_saved(folder))
    content = image.read_bytes()
    if damage == "deleted":
        image.unlink()
    else:
        image.write_bytes(content[:1000])
    assert trainer.wait([pid]) == [1]
    output = Path(f"{folder}.txt").read_text()
    assert re.search(
        "train.py: error: an image cannot be read any more: .*07.jpg .*Put its file back as it was", output
    )
    assert "Traceback" not in output and f"step {steps_saved(folder)[-1]} is safe" in output
    load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def test_a_full_disk_at_the_end_is_one_sentence_and_the_run_resumes(trainer, tmp_path):
    error = "OSError(28, 'No space left on device', 'samples.png')"
    failure = {"module": "ddpm_hf.training.artifacts", "function": "show", "error": error}
    codes, output = trainer.run(tmp_path / "run", failures=[failure], finish=True)
    assert codes == [1] and "Traceback" not in output
    assert "No space left on device: 'samples.png'. Free some space. The checkpoint of step 12 is safe" in output
    assert trainer.run(tmp_path / "run", finish=True)[0] == [0] and (tmp_path / "run" / "README.md").is_file()


def test_a_disk_that_is_full_from_the_start_is_one_sentence(trainer, tmp_path):
    disk = {"folder": str(tmp_path / "run"), "num_bytes": 1, "num_inodes": 2}
    codes, output = trainer.run(tmp_path / "run", small_disk=disk)
    if "no file system can be mounted here" in output:
        pytest.skip("no file system can be mounted here")
    assert codes == [1] and "Traceback" not in output, output
    assert "No space left on device" in output and "Free some space." in output


@pytest.mark.parametrize("options", [[], ["--streaming"]])
def test_a_data_set_of_the_hub_without_a_network_is_one_sentence(tmp_path, options):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "training" / "train.py"), *TINY, "--dataset", "user/pictures", *options]
    command += ["--output_dir", str(tmp_path / "run")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert (
        "train.py: error: dataset 'user/pictures' is no folder here, is not cached, and the Hub cannot be"
        in ended.stderr
    )
    assert "unset HF_HUB_OFFLINE" in ended.stderr and not (tmp_path / "run").exists()
