"""Samplers by name: class and options, and the chain of the scheduler they are created from."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.schedulers.samplers import SAMPLERS, as_ddpm, make_sampler


@pytest.mark.parametrize("beta_schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_has_the_chain_of_its_scheduler(name, beta_schedule):
    own = DDPMSchedulerCustom(
        200, beta_schedule=beta_schedule, prediction_type="v_prediction", timestep_spacing="linspace"
    )
    sampler = make_sampler(name, own)
    assert type(sampler).__name__ == SAMPLERS[name][0]
    assert sampler.config.num_train_timesteps == 200 and sampler.config.prediction_type == "v_prediction"
    assert sampler.config.timestep_spacing == ("linspace" if name == "ddpm" else "trailing")
    torch.testing.assert_close(torch.as_tensor(sampler.betas), own.betas)
    torch.testing.assert_close(as_ddpm(sampler).diffusion.betas, own.diffusion.betas, rtol=1e-12, atol=0)


def test_sampler_options_are_those_of_its_name():
    own = DDPMSchedulerCustom()
    assert make_sampler("dpmsolver++", own).config.algorithm_type == "dpmsolver++"
    assert make_sampler("dpmsolver++sde", own).config.algorithm_type == "sde-dpmsolver++"
    assert make_sampler("pndm", own).config.skip_prk_steps is True


def test_ddpm_sampler_is_the_scheduler_itself_or_its_counterpart():
    own = DDPMSchedulerCustom()
    assert make_sampler("ddpm", own) is own and as_ddpm(own) is own
    stock = DDPMScheduler(variance_type="fixed_large", clip_sample=False)
    custom = make_sampler("ddpm", stock)
    assert type(custom) is DDPMSchedulerCustom
    assert custom.config.variance_type == "fixed_large" and custom.config.clip_sample is False


@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_schedulers_without_a_variance_become_fixed_small(cls):
    assert as_ddpm(cls()).config.variance_type == "fixed_small"


def test_unknown_sampler_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="scheduler must be one of.*'dpmsolver.*got 'dpm'"):
        make_sampler("dpm", DDPMSchedulerCustom())
