"""Shared by the tests: a quiet, offline environment, and networks small enough to run in milliseconds."""

import os

# Before torch: threads that wait by spinning crawl on cores that other programs use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before the Hugging Face libraries, which read these when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom

# Networks this small are slower with a second thread.
torch.set_num_threads(1)

# A chain whose end is noise though it is short, and a prediction that keeps an untrained network's images off the
# ends of their range, where clamping would hide differences.
TINY_SCHEDULER = {
    "num_train_timesteps": 20,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
TINY_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

# With the objective and the rate of the paper's kind: the loss of a network that returns 0 is 1, and Adam magnifies rounding less.
TINY_TRAINING = {
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "learning_rate": 1e-3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "batch_size": 16,
    "quality_samples": 0,
    "report_to": "none",
    "cpu_threads": 1,
}


def flags(**options) -> list[str]:
    """Options of a script as its command line has them."""
    words = ([f"--{name}", *(value if isinstance(value, tuple) else (value,))] for name, value in options.items())
    return [str(word) for option in words for word in option]


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """Every test starts from the same random state, and without compiled graphs, whichever tests ran before it."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """Starts runs of train.py, for all files of tests: a process takes seconds to import what it needs."""
    from tests.training.helpers import Trainer

    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    yield trainer
    trainer.close()


@pytest.fixture
def unet_config() -> dict:
    """Constructor arguments of a U-Net of two levels, with attention; stock's and this package's alike."""
    return dict(TINY_UNET)


@pytest.fixture
def scheduler_config() -> dict:
    """Constructor arguments of a scheduler of 20 steps; stock's and this package's alike."""
    return dict(TINY_SCHEDULER)


@pytest.fixture
def make_unet() -> Callable[..., UNet2DModelCustom]:
    """A tiny U-Net with random weights; keyword arguments replace those of `unet_config`."""
    return lambda **changes: UNet2DModelCustom(**{**TINY_UNET, **changes}).eval()


@pytest.fixture
def tiny_unet(make_unet) -> UNet2DModelCustom:
    return make_unet()


@pytest.fixture
def make_pipeline(make_unet) -> Callable[..., DDPMPipelineCustom]:
    """A tiny pipeline of 20 steps; keyword arguments are the U-Net's, `scheduler` replaces the scheduler."""

    def make(scheduler=None, **changes) -> DDPMPipelineCustom:
        pipe = DDPMPipelineCustom(make_unet(**changes), scheduler or DDPMSchedulerCustom(**TINY_SCHEDULER))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def tiny_pipeline(make_pipeline) -> DDPMPipelineCustom:
    return make_pipeline()


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """A pipeline of 3 classes with a null class, its folder with all its ONNX files, and what the export returned: one export
    for all tests of a process, because it takes seconds. Tests that change the folder take a copy."""
    from ddpm_hf.export.onnx_files import export_onnx
    from ddpm_hf.pipelines.guidance import mark_class_names, mark_null_class

    torch.manual_seed(0)
    unet = UNet2DModelCustom(**{**TINY_UNET, "num_class_embeds": 4}).eval()
    mark_null_class(unet)
    mark_class_names(unet, ["a", "b", "c"])
    pipe = DDPMPipelineCustom(unet, DDPMSchedulerCustom(**TINY_SCHEDULER))
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    pipe.save_pretrained(folder)
    return pipe, folder, export_onnx(pipe, folder, ["fp16", "int8"], num_images=16)


@pytest.fixture
def diffusers_log(caplog) -> pytest.LogCaptureFixture:
    """`caplog` for diffusers' own logger, which does not hand its records on; warnings and worse."""
    logger = logging.getLogger("diffusers")
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_warning()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    diffusers.logging.set_verbosity(verbosity)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 20 small color photos."""
    from sklearn.datasets import load_sample_image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        photo = load_sample_image("china.jpg" if i % 2 else "flower.jpg")
        Image.fromarray(photo[i * 10 : i * 10 + 200, i * 20 : i * 20 + 200]).save(folder / f"{i:02d}.jpg")
    return folder


@pytest.fixture
def other_disk(tmp_path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    if folder.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts a new file system on a folder of `tmp_path`, which is created: (name, options of `mount`)."""
    mounted = []

    def make(name: str, options: str = "size=4m") -> Path:
        (folder := tmp_path / name).mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def model(make_pipeline, tmp_path):
    """The output folder of a digits run, with the files that the scripts read."""
    from ddpm_hf.training.artifacts import write_metrics_and_card
    from ddpm_hf.training.config import TrainingConfig
    from ddpm_hf.training.presets import load_preset
    from tests.hub.test_model_card import TRAINING

    folder = tmp_path / "model"
    folder.mkdir()
    make_pipeline(in_channels=1, out_channels=1).save_pretrained(folder)
    config = TrainingConfig(**load_preset("digits")).to_yaml()
    (folder / "config.yaml").write_text(config)
    write_metrics_and_card(folder, config, {"training": TRAINING})
    return folder
