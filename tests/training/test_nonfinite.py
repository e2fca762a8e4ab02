"""Steps with a nonfinite loss or gradient are skipped, counted and reported."""

import copy
import logging
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from ddpm_hf.data.batches import GlobalBatches
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.training.build import build
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.nonfinite import SkippedSteps, nan_if_nonfinite, step_if_finite
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import load_images
from ddpm_hf.training.step import training_step
from tests.conftest import TINY_TRAINING, flags

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(("losses", "finite"), [([0.5, 2.0], True), ([0.5, NAN], False), ([-INF, INF], False)])
def test_the_factor_is_one_or_nan(losses, finite):
    factor = nan_if_nonfinite(torch.tensor(losses, requires_grad=True))
    assert not factor.requires_grad
    assert factor == 1 if finite else factor.isnan()


@pytest.mark.parametrize("fused", [False, True])
def test_a_nonfinite_gradient_norm_skips_the_optimizer_step(fused):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)

    def step(grad_norm):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, grad_norm)
        return step_if_finite(optimizer, torch.tensor(grad_norm))

    assert step(1.0) == 0
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for grad_norm in (NAN, INF):
        assert step(grad_norm) == 1
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for i, entries in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, state[i][name]) for name, value in entries.items())
    assert step(1.0) == 0
    assert not any(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class NamedImages:
    """Stands for 100 training images, every second one with a path."""

    def __len__(self):
        return 100

    def describe(self, index):
        return f"number {index} of the data set" if index % 2 else f"photos/{index}.jpg"


def make_skipped_steps(images=None, batch_size=4, max_nonfinite_steps=3):
    config = SimpleNamespace(batch_size=batch_size, seed=7, max_nonfinite_steps=max_nonfinite_steps)
    return SkippedSteps(
        Accelerator(cpu=True), images or NamedImages(), config.batch_size, config.seed, config.max_nonfinite_steps
    )


def add(skipped_steps, step, losses, skipped=True):
    losses = torch.tensor(losses)
    skipped_steps.add(step, torch.arange(len(losses)) * 10, losses, torch.tensor(float(skipped)))


def test_the_report_names_the_images_with_a_nonfinite_loss(caplog):
    skipped_steps, batch = make_skipped_steps(), GlobalBatches(100, 4, 7).indices(5).tolist()
    add(skipped_steps, 5, [1.0, NAN, 0.5, INF])
    assert not skipped_steps.too_many_skipped()
    lines = caplog.text.splitlines()
    assert lines[0].endswith("Step 6 was skipped: the loss of 2 of 4 images is not finite.")
    names = [f"image {i}" + ("" if i % 2 else f" (photos/{i}.jpg)") for i in (batch[1], batch[3])]
    assert lines[1:] == [f"  {names[0]}, t = 10, loss nan", f"  {names[1]}, t = 30, loss inf"]


def test_the_report_lists_the_largest_losses_for_a_nonfinite_gradient(caplog):
    skipped_steps = make_skipped_steps(Mock(spec=StreamedImages), batch_size=12)
    add(skipped_steps, 0, [float(i) for i in range(12)])
    assert not skipped_steps.too_many_skipped()
    lines = caplog.text.splitlines()
    assert lines[0].endswith("Step 1 was skipped: the gradient is not finite.")
    assert lines[1] == "  image 11 of the batch, t = 110, loss 11" and len(lines) == 12
    assert lines[-1] == "  and 2 more"


def test_skipped_steps_in_a_row_end_training_and_others_do_not(caplog):
    caplog.set_level(logging.ERROR)
    skipped_steps = make_skipped_steps(max_nonfinite_steps=3)
    for step, skipped in enumerate([True, True, False, True]):
        add(skipped_steps, step, [NAN] * 4, skipped)
    assert not skipped_steps.too_many_skipped()
    assert (skipped_steps.total, skipped_steps.in_a_row) == (3, 1)
    add(skipped_steps, 4, [NAN] * 4)
    assert not skipped_steps.too_many_skipped()
    add(skipped_steps, 5, [NAN] * 4)
    assert skipped_steps.too_many_skipped()
    assert (skipped_steps.total, skipped_steps.in_a_row) == (5, 3)


def test_an_overflowing_loss_scale_is_lowered_without_other_changes():
    """fp16 as on a GPU, with torch's scaler for the CPU, starting at a scale at which every gradient overflows."""
    config = parse_config(flags(**TINY_TRAINING, total_images=192, log_every_steps=1, seed=3))
    unet, scheduler = build(config)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, growth_interval=1000)
    model, optimizer = accelerator.prepare(unet, torch.optim.Adam(unet.parameters(), lr=1e-3, fused=True))
    # As Accelerator does with mixed_precision="fp16", which it does not accept on the CPU.
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(optimizer.optimizer)
    images, _ = load_images(config, torch.device("cpu"))
    batches = GlobalBatches(len(images), config.batch_size, config.seed)
    sampler = make_timestep_sampler(config.timestep_sampler, 1000)
    skipped = SkippedSteps(accelerator, images, config.batch_size, config.seed, config.max_nonfinite_steps)
    ema, started = EMA(unet, 1000), [p.detach().clone() for p in unet.parameters()]
    was_skipped = []
    for step in range(40):
        batch = images[batches.indices(step)]
        with torch.autocast("cpu", torch.float16):
            report = training_step(accelerator, model, optimizer, scheduler.diffusion, config, step, [batch], sampler)
        ema.update(unet, 16 * (step + 1), 16, report.skipped)
        skipped.add(step, report.t, report.objective, report.skipped)
        was_skipped.append(bool(report.skipped))
        if was_skipped[-1]:
            assert all(torch.equal(p, before) for p, before in zip(unet.parameters(), started))
            assert all(torch.equal(a, before) for a, before in zip(ema.state_dict().values(), started))
    assert was_skipped[0] and not was_skipped[-1] and was_skipped == sorted(was_skipped, reverse=True)
    assert not torch.equal(list(unet.parameters())[-1], started[-1])
    assert not skipped.too_many_skipped() and skipped.total == 0
