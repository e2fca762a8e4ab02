"""The examples run with the packages that they name, and nothing else."""

import importlib.metadata
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDIMSchedulerCustom, DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.export.onnx_files import export_onnx
from ddpm_hf.pipelines.guidance import mark_null_class
from tests.conftest import TINY_SCHEDULER

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "sample_onnx.py"
PACKAGES = ("onnxruntime", "numpy", "pillow")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder of packages that holds `PACKAGES`, with what they need, alone."""
    folder, wanted = tmp_path_factory.mktemp("packages"), list(PACKAGES)
    for name in wanted:
        distribution = importlib.metadata.distribution(name)
        needed = [r for r in distribution.requires or [] if "extra" not in r]
        wanted += [n for r in needed if (n := r.split("<")[0].split(">")[0].split("=")[0].strip()) not in wanted]
        for file in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
            if not (folder / file).exists():
                os.symlink(distribution.locate_file(file), folder / file)
    return folder


def run(bare: Path, *arguments: object) -> None:
    """Run the script with Python's own modules and those packages alone: without site-packages (-S, -s)."""
    command = [sys.executable, "-S", "-s", str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env={"PYTHONPATH": str(bare)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_packages_are_those_that_the_example_names(bare):
    code = "import importlib.util as u; print([n for n in ('onnxruntime', 'torch', 'diffusers', 'ddpm_hf') if u.find_spec(n)])"
    command = [sys.executable, "-S", "-s", "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": str(bare)}, capture_output=True, text=True, timeout=60, cwd=bare)
    assert done.stdout.strip() == "['onnxruntime']", done.stderr


def test_the_example_is_short():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("kind", ["v, guided", "epsilon, color"])
def test_the_images_are_those_of_the_pipeline(make_pipeline, bare, tmp_path, kind):
    guided = kind == "v, guided"
    scheduler = DDPMSchedulerCustom(**TINY_SCHEDULER | ({} if guided else {"prediction_type": "epsilon"}))
    pipe = make_pipeline(scheduler, **({"in_channels": 1, "out_channels": 1, "num_class_embeds": 4} if guided else {}))
    if guided:
        mark_null_class(pipe.unet)
    export_onnx(pipe, tmp_path)
    options = [
        "--steps",
        6,
        "--seed",
        5,
        "--number",
        3,
        "--label",
        2,
        "--guidance",
        1.5,
        "--output",
        tmp_path / "x.png",
    ]
    run(bare, tmp_path / "onnx" / "model.onnx", *options)
    row = np.atleast_3d(np.asarray(Image.open(tmp_path / "x.png")))
    pipe = DDPMPipelineCustom(
        pipe.unet, DDIMSchedulerCustom.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    )
    C = pipe.unet.config.in_channels
    latents = torch.from_numpy(np.random.default_rng(5).standard_normal((3, C, 8, 8))).float()
    condition = {"class_labels": 2, "guidance_scale": 1.5} if guided else {}
    expected = pipe(3, num_inference_steps=6, latents=latents, output_type="np", **condition).images
    assert np.abs(row / 255 - np.concatenate(list(expected), axis=1)).max() < 0.6 / 255


@pytest.fixture(scope="module")
def service(bare, exports, tmp_path_factory):
    """The address of the service of a class-conditional model, and the process's output."""
    folder = exports[1]
    command = [sys.executable, "-S", "-s", str(EXAMPLES / "serve_onnx.py"), str(folder), "--port", "0"]
    with open(log := tmp_path_factory.mktemp("served") / "log", "w") as output:
        server = subprocess.Popen(
            command, env={"PYTHONPATH": str(bare)}, stdout=subprocess.PIPE, stderr=output, text=True
        )
    try:
        address = server.stdout.readline().strip()  # the deadline is the process's own end
        assert address.startswith("http://127.0.0.1:"), log.read_text()
        yield address
    finally:
        server.kill()
        server.wait()


def test_the_service_answers_with_the_same_picture_every_time(service):
    assert urlopen(f"{service}health", timeout=30).read() == b"ok\n"
    pictures = [urlopen(f"{service}?label=2&guidance=2&steps=3&seed=3&number=4", timeout=30).read() for _ in range(2)]
    assert pictures[0] == pictures[1] and Image.open(io.BytesIO(pictures[0])).size == (32, 8)
    others = [urlopen(f"{service}?{query}&steps=3&number=4", timeout=30).read() for query in ("label=2", "seed=3")]
    assert len({*pictures, *others}) == 3


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("steps=0", "steps must be in 1..250, got 0"),
        ("number=17", "number must be in 1..16, got 17"),
        ("guidance=nan", "guidance must be in"),
        ("seed=first", "invalid literal"),
        ("size=8", r"unknown \['size'\]"),
        ("label=9", "refuses"),
    ],
)
def test_the_service_refuses_with_a_sentence(service, query, message):
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{service}?{query}", timeout=30)
    assert refused.value.code == 400 and re.search(message, refused.value.read().decode())


def test_the_container_installs_versions_that_are_tested():
    text, pinned = (EXAMPLES / "Dockerfile").read_text(), (EXAMPLES.parent / "constraints.txt").read_text().split()
    versions = re.findall(r"[\w-]+==[\d.]+", text)
    assert len(versions) == 4 and set(versions) <= set(pinned)
    assert all((EXAMPLES / name).is_file() for name in re.findall(r"\w+\.py", text))
