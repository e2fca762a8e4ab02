"""Tiny runs of train.py, and comparisons of the checkpoints and logs that they leave."""

import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from ddpm_hf.scripts import train
from safetensors.torch import load_file

from ddpm_hf.data.builtin import digits
from ddpm_hf.training.checkpoints import list_checkpoints
from tests.conftest import TINY_TRAINING, flags

ROOT = Path(__file__).resolve().parents[2]
TINY = flags(
    **TINY_TRAINING,
    total_images=192,
    checkpoint_every_steps=4,
    keep_checkpoints=10,
    log_every_steps=4,
    sample_steps=4,
    seed=3,
)

NUM_IMAGES = 64
DEADLINE = 120.0  # seconds for a run to end


def default_signals():
    """For `preexec_fn`: SIGINT and SIGHUP end a process, though those that started the tests, such as nohup, ignore them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Trainer:
    """Starts runs of train.py on some of the digits, by way of forking_trainer.py."""

    def __init__(self, folder):
        self.dataset = str(folder / "digits")
        digits()["train"].select(range(NUM_IMAGES)).save_to_disk(self.dataset)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT)])}
        command = [sys.executable, str(Path(__file__).parent / "forking_trainer.py")]
        pipe = subprocess.PIPE
        how = {"stdin": pipe, "stdout": pipe, "text": True, "env": environment}
        self.process = subprocess.Popen(command, **how, preexec_fn=default_signals)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE + 90)
        assert ready, f"no answer to {request}"
        return json.loads(self.process.stdout.readline())

    def start(self, folder, *options, processes=1, **how):
        arguments = [*TINY, "--output_dir", str(folder), "--dataset", self.dataset, *options]
        Path(f"{folder}.txt").touch()
        return self.ask({"arguments": arguments, "processes": processes, "output": f"{folder}.txt", **how})

    def wait(self, pids):
        return [self.ask({"wait": pid, "seconds": DEADLINE}) for pid in pids]

    def run(self, folder, *options, **how):
        """A run to its end: exit codes and output, after the output of earlier runs in this folder."""
        codes = self.wait(self.start(folder, *options, **how))
        return codes, Path(f"{folder}.txt").read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def run(output_dir, *options):
    """Train 12 steps in this process; the last checkpoint."""
    train.main([*TINY, "--output_dir", str(output_dir), *options])
    return checkpoint(output_dir, 12)


def torchrun(*arguments, script=ROOT / "training" / "train.py", processes=2, **how):
    """Start a script on several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    pipes["preexec_fn"] = default_signals
    return subprocess.Popen([*command, str(script), *map(str, arguments)], **(pipes | how))


def launch(output_dir, *options, processes):
    """Start train.py on several processes."""
    return torchrun(*TINY, "--output_dir", output_dir, *options, processes=processes)


def until(condition, seconds=60.0, pause=0.002):
    """Wait for a true value and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(pause)
    return value


def checkpoint(output_dir, step):
    folder = output_dir / "checkpoints" / f"checkpoint-{step:08d}"
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


def steps_saved(output_dir):
    return [int(path.name[-8:]) for path in list_checkpoints(output_dir / "checkpoints")]


def drop_checkpoints_after(output_dir, step):
    for path in list_checkpoints(output_dir / "checkpoints"):
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)


def copied(run, folder, step):
    """A copy of a run's folder as it was after a step."""
    subprocess.run(["cp", "-r", str(run), str(folder)], check=True)
    drop_checkpoints_after(folder, step)
    return folder


def write_sums(folder):
    """Make the checksums of a checkpoint fit its files."""
    files = sorted(file for file in folder.iterdir() if file.name != "SHA256SUMS")
    sums = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    (folder / "SHA256SUMS").write_text("".join(sums))


def tensors(saved):
    return {f"{name}/{key}": value for name, group in saved.items() for key, value in group.items()}


def rows(output_dir):
    """The log, without what depends on the clock."""
    lines = (output_dir / "log.jsonl").read_text().splitlines()
    clock = ("seconds", "images_per_second")
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def assert_bit_identical(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert {key: (a[key] - b[key]).abs().max() for key in a if not torch.equal(a[key], b[key])} == {}


def assert_same_run(a, b):
    """Equal but for the order of additions. Adam divides by a gradient's size, which magnifies rounding where the
    gradient is nearly zero; hence a bound on the whole and not on each number."""
    a, b = tensors(a), tensors(b)
    for key in a:
        if key.startswith(("model", "ema")):
            assert (a[key] - b[key]).norm() <= 1e-4 * (1e-2 + a[key].norm()), key


def photo_options(photos):
    """Options to train on the `photos` fixture."""
    return ["--dataset", str(photos), "--resolution", "16", "24", "--channels", "3", "--random_flip"]
