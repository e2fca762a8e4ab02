"""A dry run measures the speed in bounded time."""

import contextlib
import io
import re
import time

import pytest
import torch
from accelerate import Accelerator

from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.training.build import build
from ddpm_hf.training.dry_run import time_training
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import load_images
from tests.conftest import TINY_TRAINING, flags


def timed(seconds_per_image, seconds, **options):
    """The summary's line for a network that takes so long for an image."""
    config = parse_config(flags(**TINY_TRAINING | options))
    unet, scheduler = build(config)
    unet.register_forward_hook(lambda _, inputs, __: time.sleep(seconds_per_image * len(inputs[0])))
    images, _ = load_images(config)
    batches = MicroBatches(images, config.batch_size, 0, 0, config.total_steps, micro_batches=config.micro_batches(1))
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps, "cpu")
    optimizer = torch.optim.AdamW(unet.parameters())
    parts = (unet, optimizer, scheduler.diffusion, sampler)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        time_training(config, Accelerator(cpu=True), *parts, batches, 0, seconds)
    return output.getvalue()


def test_a_slow_network_is_timed_on_few_images_in_bounded_time():
    started = time.monotonic()
    line = timed(0.05, 1.0, batch_size=512)  # a step of the run takes 26 s
    assert time.monotonic() - started < 15  # with what the checks of the configuration and the data take
    images, rate = int(re.search(r"of (\d+) image", line)[1]), float(re.search(r"Speed +([\d.]+)", line)[1])
    assert images < 100 and 1 < rate <= 20


@pytest.mark.parametrize(("micro_batch_size", "images"), [(None, 16), (4, 4)])
def test_a_quick_network_is_timed_on_micro_batches_of_the_run(micro_batch_size, images):
    options = {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
    assert f"images/s over 5 steps of {images} images" in timed(0.0, 60.0, **options)


def test_a_network_too_slow_for_one_image_is_timed_once():
    assert "over 1 step of 1 image;" in timed(0.2, 0.0)


def test_a_dry_run_of_two_processes_agrees_and_writes_nothing(trainer, tmp_path):
    codes, output = trainer.run(tmp_path / "run", "--dry_run", processes=2)
    assert codes == [0, 0] and output.count("Speed  ") == 1 and "Training:" not in output, output
    assert "nothing was written" in output and not (tmp_path / "run").exists()
