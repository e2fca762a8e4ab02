"""Resuming: kills, signals, full disks, dead workers and non-finite steps; on one or two processes, with and without FSDP."""

import contextlib
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ddpm_hf.data.batches import GlobalBatches
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.seeds import seed_dropout
from ddpm_hf.training.checkpoints import list_checkpoints, load_checkpoint, read_state
from ddpm_hf.training.posthoc_ema import list_snapshots
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.step_randomness import draw_randomness
from ddpm_hf.training.stopping import EXIT_NONFINITE, EXIT_NOT_SAVED
from tests.training.helpers import (
    NUM_IMAGES,
    ROOT,
    TINY,
    assert_bit_identical,
    assert_same_run,
    checkpoint,
    copied,
    default_signals,
    drop_checkpoints_after,
    photo_options,
    rows,
    steps_saved,
    tensors,
    torchrun,
    until,
)

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
EVERY_STEP = ("--checkpoint_every_steps", "1")


def losses(folder):
    return [(row["step"], row["loss"]) for row in rows(folder)]


def test_twenty_kills_at_random_moments_do_not_change_the_weights(trainer, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"random moments of seed {seed}")
    moments = random.Random(seed)
    kinds = ["inside a save"] * 8 + ["between"] * 7 + ["while starting"] * 5
    moments.shuffle(kinds)
    options = ["--batch_size", "4", "--total_images", "480", "--log_every_steps", "7"]
    assert trainer.run(tmp_path / "straight", *options, "--checkpoint_every_steps", "120")[0] == [0]

    killed, inside = tmp_path / "killed", 0
    checkpoints = killed / "checkpoints"
    checkpoints.mkdir(parents=True)

    def saves(unfinished):
        return {name for name in os.listdir(checkpoints) if ("unfinished" in name) == unfinished}

    for kind in kinds:
        saved, unfinished = saves(False), saves(True)
        (pid,) = trainer.start(killed, *options, *EVERY_STEP, "--keep_checkpoints", "2")
        if kind == "while starting":
            time.sleep(moments.uniform(0, 0.5))
        elif kind == "between":
            until(lambda: saves(False) - saved)  # noqa: B023
            time.sleep(moments.uniform(0, 0.05))
        else:
            until(lambda: saves(True) - unfinished, pause=0)  # noqa: B023
            time.sleep(moments.uniform(0, 0.002))
        os.kill(pid, signal.SIGKILL)
        assert trainer.wait([pid]) == [-signal.SIGKILL]
        inside += bool(saves(True) - unfinished)
    assert inside >= 2

    codes, output = trainer.run(killed, *options, *EVERY_STEP)
    assert codes == [0], output
    assert_bit_identical(checkpoint(killed, 120), checkpoint(tmp_path / "straight", 120))
    assert rows(killed) == rows(tmp_path / "straight") and len(rows(killed)) == 18


def has_logged(folder):
    return (folder / "log.jsonl").exists() and rows(folder)


@pytest.mark.parametrize(
    ("number", "processes", "told"), [(signal.SIGTERM, 1, 0), (signal.SIGHUP, 1, 0), (signal.SIGINT, 2, 1)]
)
def test_a_signal_to_one_process_saves_and_resuming_is_bit_identical(trainer, tmp_path, number, processes, told):
    options = ["--total_images", "480", "--checkpoint_every_steps", "1000"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert trainer.run(straight, *options, processes=processes)[0] == [0] * processes

    pids = trainer.start(stopped, *options, processes=processes)
    until(lambda: has_logged(stopped))
    os.kill(pids[told], number)
    assert trainer.wait(pids) == [128 + number] * processes
    (step,) = steps_saved(stopped)
    output = Path(f"{stopped}.txt").read_text()
    assert 0 < step < 30 and f"Stopped after step {step} of 30" in output

    codes, output = trainer.run(stopped, *options, processes=processes)
    assert codes == [0] * processes and f"Resuming from step {step} of 30" in output
    assert_bit_identical(checkpoint(stopped, 30), checkpoint(straight, 30))


def test_under_nohup_a_hangup_does_not_stop_the_run(trainer, tmp_path):
    folder = tmp_path / "run"
    (pid,) = trainer.start(folder, "--total_images", "480", *EVERY_STEP, nohup=True)
    until(lambda: (folder / "checkpoints").exists() and steps_saved(folder))
    os.kill(pid, signal.SIGHUP)
    assert trainer.wait([pid]) == [0] and steps_saved(folder)[-1] == 30


@pytest.mark.parametrize("workers", [[], ["--memory_limit_bytes", "0", "--num_workers", "1"]])
def test_a_closed_terminal_saves_and_the_run_resumes(photos, tmp_path, workers):
    folder, (master, terminal) = tmp_path / "run", os.openpty()
    options = [*TINY, *photo_options(photos), *workers, "--output_dir", str(folder), "--total_images", "160000"]
    options += ["--keep_checkpoints", "10000"]
    program = "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", program, str(ROOT / "training" / "train.py"), *options]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=default_signals)
    os.close(terminal)

    def saved():
        while select.select([master], [], [], 0)[0]:
            os.read(master, 10000)  # as a terminal does: a full one would make the run wait
        assert process.poll() is None
        return (folder / "checkpoints").exists() and steps_saved(folder)

    try:
        until(saved, 120)
        os.close(master)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def test_a_signal_during_the_final_sampling_loses_nothing(trainer, tmp_path):
    folder = tmp_path / "run"
    (pid,) = trainer.start(folder, "--total_images", "16", "--sample_steps", "1000", finish=True)
    until(lambda: (folder / "checkpoints").exists() and steps_saved(folder) == [1])
    time.sleep(0.5)  # 1000 steps of sampling take longer
    os.kill(pid, signal.SIGTERM)
    assert trainer.wait([pid]) == [128 + signal.SIGTERM]
    assert steps_saved(folder) == [1] and not (folder / "README.md").exists()
    codes, _ = trainer.run(folder, "--total_images", "16", finish=True)
    assert codes == [0] and (folder / "README.md").exists()


@pytest.mark.parametrize(("launcher", "number"), [("accelerate", signal.SIGTERM), ("torchrun", signal.SIGINT)])
def test_a_signal_to_the_launcher_makes_its_processes_save_and_stop(tmp_path, launcher, number):
    options = ["--output_dir", str(tmp_path / "run"), "--total_images", "160000", "--checkpoint_every_steps", "10000"]
    with open(tmp_path / "output.txt", "w") as file:
        if launcher == "torchrun":
            process = torchrun(*TINY, *options, stdout=file)
        else:
            command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "training/train.py")]
            command += [*TINY, *options]
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def output():
        return (tmp_path / "output.txt").read_text()

    try:
        until(lambda: has_logged(tmp_path / "run") or process.poll() is not None, 120)
        assert process.poll() is None, output()
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(60)
        _, alive = psutil.wait_procs(workers, 60)
        assert workers and not alive, output()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (step,) = steps_saved(tmp_path / "run")
    assert f"Stopped after step {step} of 10000" in output()


@pytest.mark.parametrize(("processes", "rank", "value"), [(1, 0, "inf"), (2, 1, "nan")])
def test_a_nonfinite_step_is_skipped_by_every_process_and_reported(trainer, tmp_path, processes, rank, value):
    poison = {"at_step": 5, "rank": rank, "row": 2, "value": float(value)}
    folder = tmp_path / "run"
    codes, output = trainer.run(folder, *EVERY_STEP, "--keep_checkpoints", "20", processes=processes, nonfinite=poison)
    assert codes == [0] * processes
    before, after, next_one = (checkpoint(folder, step) for step in (5, 6, 7))
    assert_bit_identical(before, after)
    assert not torch.equal(after["model"]["conv_out.weight"], next_one["model"]["conv_out.weight"])

    config = parse_config(TINY)
    position = rank * 8 + 2
    index = GlobalBatches(NUM_IMAGES, 16, config.seed).indices(5)[position].item()
    sampler = make_timestep_sampler(config.timestep_sampler, 1000)
    t = draw_randomness(config, 5, range(16), torch.device("cpu"), sampler).t[position]
    assert output.count("was skipped") == 1
    assert (
        f"Step 6 was skipped: the loss of 1 of 16 images is not finite.\n  image {index}, t = {t}, loss {value}\n"
        in output
    )
    state = read_state(list_checkpoints(folder / "checkpoints")[-1])
    assert (state["nonfinite_steps"], state["nonfinite_steps_in_a_row"]) == (1, 0)
    assert (
        all(0 < loss < 2 for _, loss in losses(folder))
        and sum(row.get("skipped_steps", 0) for row in rows(folder)) == 1
    )


def test_too_many_nonfinite_steps_end_the_run_with_a_code(trainer, tmp_path):
    options = ["--learning_rate", "1e30", "--max_nonfinite_steps", "3", "--checkpoint_every_steps", "2"]
    codes, output = trainer.run(tmp_path / "run", *options)
    assert codes == [EXIT_NONFINITE]
    assert "3 steps in a row had no finite loss and gradient; the checkpoints are unchanged" in output
    assert steps_saved(tmp_path / "run") == [2]
    tensors, state = load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert state["nonfinite_steps_in_a_row"] == 1
    assert all(value.isfinite().all() for group in tensors.values() for value in group.values())


def test_failed_saves_keep_earlier_checkpoints_and_end_with_a_code(trainer, tmp_path):
    folder = tmp_path / "run"
    constant = ["--learning_rate_schedule", "constant"]  # such a run may be made longer
    assert trainer.run(folder, *constant, "--total_images", "64")[0] == [0]
    earlier = checkpoint(folder, 4)
    largest = max(file.stat().st_size for file in list_checkpoints(folder / "checkpoints")[0].iterdir())
    codes, output = trainer.run(folder, *constant, largest_file=largest - 1000)
    assert codes == [EXIT_NOT_SAVED]
    for step in (8, 12):
        assert re.search(
            rf"The checkpoint of step {step} could not be written .*the last one is that of step 4", output
        )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-00000004"]
    assert_bit_identical(checkpoint(folder, 4), earlier)
    assert trainer.run(folder, *constant)[0] == [0] and steps_saved(folder) == [4, 8, 12]


def test_on_a_full_disk_old_checkpoints_make_room_for_the_newest(trainer, tmp_path):
    assert trainer.run(tmp_path / "measured", "--total_images", "64")[0] == [0]
    (saved,) = list_checkpoints(tmp_path / "measured" / "checkpoints")
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in saved.iterdir())
    for room, code, kept in ((3.5, 0, ("08", "12")), (1.5, EXIT_NOT_SAVED, ("04",))):
        folder = tmp_path / f"{room}"
        disk = {"folder": str(folder), "num_bytes": int(room * size)}
        codes, output = trainer.run(folder, "--total_images", "192", *EVERY_STEP[:1], "4", small_disk=disk)
        if "no file system can be mounted here" in output:
            pytest.skip("no file system can be mounted here")
        assert codes == [code], output
        whole = re.findall(r"whole: checkpoint-(\d+)", output)
        assert whole[-1].endswith(kept[-1]) and len(whole) <= 3
        assert ("could not be written (" in output) == (code != 0)


def test_a_killed_decoding_process_ends_the_run_with_a_sentence(trainer, photos, tmp_path):
    options = [*photo_options(photos), "--memory_limit_bytes", "0", "--num_workers", "1", "--total_images", "160000"]
    folder = tmp_path / "run"
    (pid,) = trainer.start(folder, *options, *EVERY_STEP)
    until(lambda: (folder / "checkpoints").exists() and steps_saved(folder))
    (worker,) = [p for p in psutil.Process(pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    worker.kill()
    assert trainer.wait([pid]) == [1]
    output = Path(f"{folder}.txt").read_text()
    assert re.search("train.py: error: (a )?DataLoader worker", output), output
    load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def test_a_killed_process_ends_the_others_with_a_sentence(trainer, tmp_path):
    folder = tmp_path / "run"
    pids = trainer.start(folder, "--total_images", "160000", *EVERY_STEP, processes=2)
    until(lambda: (folder / "checkpoints").exists() and steps_saved(folder))
    os.kill(pids[1], signal.SIGKILL)
    assert trainer.wait(pids) == [1, -signal.SIGKILL]
    output = Path(f"{folder}.txt").read_text()
    assert "train.py: error: another process of this run died" in output and "Traceback" not in output, output
    load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


@pytest.fixture(scope="module")
def with_dropout(trainer, tmp_path_factory):
    """Uninterrupted runs with dropout, on one process and on two, with the same micro-batches."""
    root = tmp_path_factory.mktemp("dropout")
    options = ["--dropout", "0.3", "--micro_batch_size", "4"]
    for processes in (1, 2):
        codes, output = trainer.run(root / str(processes), *options, processes=processes)
        assert codes == [0] * processes, output
    return root, options


def test_one_and_two_processes_make_the_same_run_with_dropout_too(with_dropout):
    root, _ = with_dropout
    assert_same_run(checkpoint(root / "1", 12), checkpoint(root / "2", 12))
    one, two = (losses(root / name) for name in ("1", "2"))
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], rel=1e-5)


@pytest.mark.parametrize(("begun_by", "ended_by"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_a_resumed_run_is_the_same_run_on_any_number_of_processes(trainer, with_dropout, tmp_path, begun_by, ended_by):
    root, options = with_dropout
    folder = copied(root / str(begun_by), tmp_path / "run", 4)
    codes, output = trainer.run(folder, *options, processes=ended_by)
    assert codes == [0] * ended_by and "Resuming from step 4 of 12" in output
    same = assert_bit_identical if begun_by == ended_by else assert_same_run
    same(checkpoint(folder, 12), checkpoint(root / str(begun_by), 12))


def test_dropout_masks_depend_on_seed_step_and_position(with_dropout):
    def mask(*address):
        seed_dropout(*address)
        return torch.nn.functional.dropout(torch.ones(1000), 0.5)

    first = mask(3, 7, 4)
    torch.rand(5)
    assert torch.equal(mask(3, 7, 4), first)
    assert not any(torch.equal(mask(*other), first) for other in ((4, 7, 4), (3, 8, 4), (3, 7, 0)))


def test_gradient_checkpointing_makes_the_same_run_bit_for_bit(trainer, with_dropout, tmp_path):
    root, options = with_dropout
    assert trainer.run(tmp_path / "run", *options, "--gradient_checkpointing")[0] == [0]
    assert_bit_identical(checkpoint(tmp_path / "run", 12), checkpoint(root / "1", 12))


def test_fsdp_makes_the_same_run_and_files_and_each_resumes_the_other(trainer, tmp_path):
    # Without dropout: masks follow the order of images in memory, which FSDP changes.
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    logging = ["--validation_fraction", "0.2", "--sample_every_steps", "12", "--ema_snapshot_every_images", "96"]
    assert trainer.run(whole, *logging)[0] == [0]
    codes, output = trainer.run(sharded, *logging, processes=2, environment=FSDP)
    assert codes == [0, 0], output
    expected, found = checkpoint(whole, 12), checkpoint(sharded, 12)
    assert_same_run(found, expected)
    assert {key: value.shape for key, value in tensors(found).items()} == {
        key: value.shape for key, value in tensors(expected).items()
    }
    logs = [
        [row["validation_loss_ema"] for row in rows(run) if "validation_loss_ema" in row] for run in (whole, sharded)
    ]
    assert logs[0] and logs[0] == pytest.approx(logs[1], rel=1e-5)
    for run in (whole, sharded):
        assert (run / "samples" / "step-00000012.png").exists() and len(list_snapshots(run / "ema_snapshots")) == 2
        drop_checkpoints_after(run, 8)
    assert trainer.run(sharded, *logging)[0] == [0]
    assert trainer.run(whole, *logging, processes=2, environment=FSDP)[0] == [0, 0]
    for run in (whole, sharded):
        assert_same_run(checkpoint(run, 12), expected)
