"""How processes are started: --help without torch, the launchers' processes, their signals and time-outs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from ddpm_hf.scripts import train

from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.processes import settle_with_launcher
from tests.training.helpers import ROOT, TINY, assert_bit_identical, default_signals, rows, run, until

LIGHT = """
import sys
from ddpm_hf.scripts import train
try:
    train.main([{option!r}])
except SystemExit as ended:
    print(ended)
    assert ended.code in {codes}, ended
assert not {{"torch", "diffusers", "datasets", "accelerate"}} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        ("--help", 0, "--total_images"),
        ("--hlep", "train.py: error: unknown option '--hlep'; --help lists all.", "--hlep"),
    ],
)
def test_help_and_unknown_options_are_answered_without_torch(option, code, words):
    program = LIGHT.format(option=option, codes=(code, code or None))
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert words in answer.stdout


MACHINES = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "1"]


@pytest.mark.parametrize(
    ("options", "config", "warned"),
    [
        ([], "", False),
        (["--num_processes", "1"], "", False),
        (["--num_processes", "2"], "", True),
        ([], "num_processes: 2", True),
        ([*MACHINES, "--machine_rank", "1"], "", True),
    ],
    ids=["default", "one", "two", "config file", "two machines"],
)
def test_one_process_instead_of_several_is_reported(tmp_path, capfd, monkeypatch, options, config, warned):
    for name in ("MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if config:
        text = f"compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n{config}\nnum_machines: 1\nuse_cpu: true\n"
        (tmp_path / "config.yaml").write_text(text)
        options = ["--config_file", str(tmp_path / "config.yaml")]
    command = [*options, str(ROOT / "training" / "train.py"), "--help"]
    launch_command(launch_command_parser().parse_args(command))
    out, err = capfd.readouterr()
    assert "--total_images" in out
    assert err.count("Only one process was started") == warned and ("torchrun --nproc_per_node N" in err) == warned


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_waiting_for_another_machine_ends_on_a_signal(number):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "1", str(ROOT / "training" / "train.py"), *TINY]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=default_signals, **silent)

    def waits():
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(waits, 60, pause=0.1)
        time.sleep(1)  # from the store to the rendezvous that needs it
        os.killpg(process.pid, number)
        assert process.wait(15) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("configured", "launched", "used", "said"),
    [
        (None, None, "no", ""),
        (None, "no", "no", ""),
        (None, "bf16", "bf16", ""),
        (None, "BF16", "bf16", ""),
        ("bf16", None, "bf16", ""),
        ("bf16", "no", "bf16", ""),  # which is what the launcher says by default
        ("bf16", "bf16", "bf16", ""),
        ("no", "bf16", "no", "mixed_precision = 'bf16' is not used: the run is configured with 'no'"),
        ("fp16", "bf16", "fp16", "mixed_precision = 'bf16' is not used: the run is configured with 'fp16'"),
    ],
)
def test_the_precision_is_the_configured_one_or_the_launchers(monkeypatch, capsys, configured, launched, used, said):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert settle_with_launcher(configured) == used
    error = capsys.readouterr().err
    assert said in error and bool(error) == bool(said)


def test_the_launchers_precision_is_that_of_the_run(tmp_path):
    """Also of the options that the run writes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"]
    command += [
        str(ROOT / "training" / "train.py"),
        *TINY,
        "--total_images",
        "16",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "in bf16 mixed precision" in ended.stdout
    assert parse_config(["--config", str(tmp_path / "run" / "config.yaml")]).mixed_precision == "bf16"


def test_the_launchers_accumulation_does_not_change_the_run(monkeypatch, tmp_path, capsys):
    plain = run(tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert_bit_identical(run(tmp_path / "told"), plain)
    assert rows(tmp_path / "told") == rows(tmp_path / "plain")  # the norm of the gradient too
    assert "gradient_accumulation_steps = 4 is not used: batch_size is that of a whole step" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "seconds"), [([], 6 * 3600), (["--process_group_timeout", "77"], 77)])
def test_processes_wait_for_the_one_that_prepares_the_data(monkeypatch, tmp_path, option, seconds):
    class Started(Exception):
        pass

    def init_process_group(*_, timeout=None, **__):
        raise Started(timeout)

    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    for name, value in (rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(Started) as started:
            train.make_accelerator(parse_config([*TINY, "--output_dir", str(tmp_path), *option]))
    finally:
        AcceleratorState._reset_state(True)
    assert started.value.args[0] == timedelta(seconds=seconds)


def test_the_process_stops_when_its_launcher_is_killed():
    if sys.platform != "linux":
        pytest.skip("only Linux sends a signal when the parent process ends")
    prepared = "import time; from ddpm_hf.training.processes import prepare_process; prepare_process(); print(1); time.sleep(60)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-uc', {prepared!r}])"
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", starts], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "1\n"
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait(10)
    assert not psutil.wait_procs([worker], 10)[1]
