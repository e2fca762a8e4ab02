"""The launchers of docs/scaling.md: the Slurm script with stand-ins for Slurm's commands, and the Dockerfile."""

import os
import re
import socket
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

from diffusers import DDPMPipeline

ROOT = Path(__file__).resolve().parents[2]
# Two machines in one: srun starts the command once for each, and waits.
SLURM = {
    "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "localhost\\nnode2\\n"',
    "srun": 'set -e; "$@" & first=$!; "$@" & second=$!; wait $first; wait $second',
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
}
TINY_RUN = (
    *("--config", "digits", "--block_out_channels", "8", "16", "--layers_per_block", "1", "--attention_head_dim", "8"),
    *("--total_images", "64", "--batch_size", "16", "--sample_steps", "2", "--quality_samples", "0"),
    *("--report_to", "none", "--cpu_threads", "1"),
)


def test_the_slurm_script_trains_on_two_machines(tmp_path):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "train.slurm").write_text(script)
    (tmp_path / "training").symlink_to(ROOT / "training")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    for name, body in SLURM.items():
        command = tmp_path / ".venv/bin" / name
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{tmp_path}/.venv/bin:{os.environ['PATH']}",
        "MASTER_PORT": str(port),
        **{"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"},
    }
    done = subprocess.run(
        ["bash", "train.slurm", *TINY_RUN, "--output_dir", "run"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 200},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout + done.stderr
    assert DDPMPipeline.from_pretrained(tmp_path / "run").unet.config.block_out_channels == [8, 16]


def test_the_dockerfile_names_what_the_package_has():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (install,) = [line for line in lines if "pip install" in line]
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extras,) = re.findall(r"\.\[([\w,]+)\]", install)
    assert set(extras.split(",")) <= set(setup["options.extras_require"])
    assert (ROOT / re.findall(r"-c (\S+)", install)[0]).is_file()
    (command,) = re.findall(r'^ENTRYPOINT \["([\w-]+)"\]', "\n".join(lines), flags=re.MULTILINE)
    assert f"\n{command} =" in setup["options.entry_points"]["console_scripts"]
