"""What the schedulers of this package share: timesteps, training methods, thresholding, warnings, numbers of NumPy."""

import copy
import logging

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.schedules import BETA_SCHEDULES, scale_betas_for_timesteps
from ddpm_hf.schedulers.base import dynamic_threshold
from tests.schedulers.test_ddpm import randn, seeded, with_exact_tables

each_scheduler = pytest.mark.parametrize("cls", [DDPMSchedulerCustom, DDIMSchedulerCustom])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 5, 7), (3, 4, 1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
def test_dynamic_thresholding_equals_that_of_diffusers(shape, ratio):
    x = 2 * randn(*shape)
    stock = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=2.5)
    torch.testing.assert_close(dynamic_threshold(x, ratio, 2.5), stock._threshold_sample(x))


def test_dynamic_thresholding_accepts_images_of_any_size():
    scheduler = DDPMSchedulerCustom(thresholding=True, sample_max_value=10.0, prediction_type="sample")
    x = 2 * randn(1, 3, 2400, 2400)  # 17 million numbers; the limit of torch.quantile is 16 million
    x_0 = scheduler.step(x, 500, x, generator=seeded()).pred_original_sample
    s = np.quantile(x.abs().numpy(), 0.995)
    torch.testing.assert_close(x_0, (x / float(s)).clamp(-1, 1), rtol=1e-5, atol=1e-5)


def noise_warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("ddpm_hf") and r.levelno == logging.WARNING]


@each_scheduler
def test_warning_for_a_chain_that_does_not_end_in_noise(cls, caplog):
    cls(num_train_timesteps=100)
    (message,) = noise_warnings(caplog)
    assert "60 %" in message and "scale_betas_for_timesteps" in message and "squaredcos_cap_v2" in message


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_train_timesteps": 4000},
        {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 100, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        dict(zip(("beta_start", "beta_end"), scale_betas_for_timesteps(100)), num_train_timesteps=100),
    ],
)
def test_no_warning_for_chains_that_end_in_noise(arguments, caplog):
    scheduler = DDPMSchedulerCustom(**arguments)
    for steps in (scheduler.config.num_train_timesteps, 50):
        scheduler.set_timesteps(steps)
    assert not noise_warnings(caplog)


@each_scheduler
def test_warning_for_steps_that_do_not_start_at_noise(cls, caplog):
    scheduler = cls()
    scheduler.set_timesteps(600)
    (message,) = noise_warnings(caplog)
    assert "timestep 599" in message and "trailing" in message
    caplog.clear()
    cls(timestep_spacing="trailing").set_timesteps(600)
    # Custom timesteps may start from a partly noised image.
    scheduler.set_timesteps(timesteps=[400, 200])
    assert not noise_warnings(caplog)


@each_scheduler
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, ValueError),
        ({"num_inference_steps": 10, "timesteps": [5, 3]}, ValueError),
        ({"num_inference_steps": 0}, ValueError),
        ({"num_inference_steps": 1001}, ValueError),
        ({"num_inference_steps": 10.0}, TypeError),
        ({"num_inference_steps": True}, TypeError),
        ({"num_inference_steps": "10"}, TypeError),
        ({"timesteps": [5, -3]}, ValueError),
        ({"timesteps": [1000, 5]}, ValueError),
        ({"timesteps": [5, 5]}, ValueError),
        ({"timesteps": [3, 5]}, ValueError),
        ({"timesteps": [5.5, 3.2]}, ValueError),
        ({"timesteps": [True, False]}, ValueError),
        ({"timesteps": []}, ValueError),
        ({"timesteps": 5}, ValueError),
        ({"timesteps": "ab"}, ValueError),
    ],
)
def test_bad_timesteps_are_refused_and_keep_the_previous_chain(cls, arguments, error):
    scheduler = cls()
    scheduler.set_timesteps(10)
    before = scheduler.timesteps.clone()
    with pytest.raises(error, match="timesteps|num_inference_steps"):
        scheduler.set_timesteps(**arguments)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps == 10


@each_scheduler
def test_offset_beyond_the_chain_is_refused(cls):
    scheduler = cls(steps_offset=1)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 981
    with pytest.raises(ValueError, match="steps_offset=1"):
        scheduler.set_timesteps(1000)


@each_scheduler
@pytest.mark.parametrize("timesteps", [[9, 4, 0], (9, 4, 0), np.array([9, 4, 0]), np.arange(10)[::-1], range(9, 0, -2)])
def test_custom_timesteps_may_be_any_sequence_of_integers(cls, timesteps):
    scheduler = cls()
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == [int(t) for t in timesteps]
    scheduler.set_timesteps(np.int64(7))
    assert len(scheduler.timesteps) == 7


@each_scheduler
def test_set_timesteps_does_not_change_training_methods(cls):
    fresh, used = cls(), cls()
    used.set_timesteps(timesteps=[999, 600, 200])
    x, z, t = randn(4, 3, 4, 4), randn(4, 3, 4, 4, seed=1), torch.tensor([0, 200, 601, 999])
    assert torch.equal(used.add_noise(x, z, t), fresh.add_noise(x, z, t))
    assert torch.equal(used.get_velocity(x, z, t), fresh.get_velocity(x, z, t))
    for t in (0, 199, 601, 998):  # not among the chosen timesteps
        assert used.previous_timestep(t) == t - 1
        ours, theirs = (s.step(z, t, x, generator=seeded()).prev_sample for s in (used, fresh))
        assert torch.equal(ours, theirs)
    used.set_timesteps(1000)
    for t in (999, 500, 1, 0):
        ours, theirs = (s.step(z, t, x, generator=seeded()).prev_sample for s in (used, fresh))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@each_scheduler
def test_previous_timestep_follows_the_chain(cls):
    scheduler = cls()
    assert scheduler.previous_timestep(5) == 4 and scheduler.previous_timestep(0) == -1
    scheduler.set_timesteps(timesteps=[900, 300, 7])
    assert [scheduler.previous_timestep(t) for t in (900, 300, 7)] == [300, 7, -1]
    assert scheduler.previous_timestep(torch.tensor([900, 7])).tolist() == [300, -1]


@each_scheduler
def test_scale_model_input_is_the_identity(cls):
    x = randn(1, 1, 2, 2)
    assert cls().scale_model_input(x, 5) is x and cls().init_noise_sigma == 1.0


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_bad_arguments_of_add_noise_and_get_velocity_are_refused(method):
    call = getattr(DDPMSchedulerCustom(), method)
    x = torch.zeros(2, 3, 4, 4)
    for t, error in ((-1, ValueError), (torch.tensor([5, 1000]), ValueError), (torch.tensor([0.5, 1]), TypeError)):
        with pytest.raises(error, match="timesteps"):
            call(x, x, t)
    with pytest.raises(ValueError, match="shape"):
        call(x, x[:1], 5)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_add_noise_and_get_velocity_equal_those_of_diffusers(beta_schedule):
    ours, stock = DDPMSchedulerCustom(beta_schedule=beta_schedule), DDPMScheduler(beta_schedule=beta_schedule)
    x, z = randn(8, 3, 4, 4), randn(8, 3, 4, 4, seed=1)
    t = torch.tensor([0, 1, 9, 100, 400, 700, 998, 999])
    for name in ("add_noise", "get_velocity"):
        # Stock's 1 − ᾱ_0 has a relative error of 1.7e-4, hence √(1 − ᾱ_0) = 0.01 an error of 1e-6.
        torch.testing.assert_close(getattr(ours, name)(x, z, t), getattr(stock, name)(x, z, t), rtol=1e-5, atol=2e-5)
        exact = getattr(with_exact_tables(copy.deepcopy(stock), ours), name)(x.double(), z.double(), t)
        torch.testing.assert_close(getattr(ours, name)(x.double(), z.double(), t), exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta_schedule", sorted(BETA_SCHEDULES))
@pytest.mark.parametrize("rescale", [False, True])
def test_tables_are_on_the_cpu_whatever_the_default_device(beta_schedule, rescale):
    """Large networks are created under `torch.device("meta")`; a scheduler created there must have values."""

    def tables(device):
        with torch.device(device):
            scheduler = DDPMSchedulerCustom(
                beta_schedule=beta_schedule, rescale_betas_zero_snr=rescale, prediction_type="v_prediction"
            )
            scheduler.set_timesteps(timesteps=[999, 500, 3])
            chosen = scheduler.timesteps
            scheduler.set_timesteps(10)
        chain = scheduler.diffusion.respace(scheduler.timesteps.flip(0))
        return chosen, scheduler.timesteps, scheduler.diffusion.alphas_cumprod, chain.betas, chain.posterior_variance

    for expected, got in zip(tables("cpu"), tables("meta"), strict=True):
        assert torch.equal(expected, got)


@each_scheduler
def test_numbers_of_numpy_are_numbers(cls, tmp_path):
    scheduler = cls(np.int64(20), np.float64(0.01), np.float32(0.25), clip_sample_range=np.float32(1.5))
    scheduler.set_timesteps(np.int32(5))
    x = randn(2, 3, 4, 4)
    t = scheduler.timesteps.numpy()[1]
    a, b = (scheduler.step(x, number, x, generator=seeded()).prev_sample for number in (t, int(t)))
    assert torch.equal(a, b) and scheduler.previous_timestep(t) == int(scheduler.timesteps[2])
    assert torch.equal(scheduler.add_noise(x, x, np.int16(3)), scheduler.add_noise(x, x, 3))
    scheduler.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(again.diffusion.betas, scheduler.diffusion.betas) and again.config.num_train_timesteps == 20
    with pytest.raises(TypeError, match="timestep"):
        scheduler.step(x, np.float64(3.0), x)
