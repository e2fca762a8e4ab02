"""Samplers by name: class and options, and the chain of the scheduler they are created from."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom
from ddpm_hf.schedulers.samplers import SAMPLERS, as_ddpm, default_steps, distilled_sampler, make_sampler


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


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "sigmoid"])
def test_the_sampler_of_a_distilled_model_keeps_its_steps_through_files(tmp_path, beta_schedule):
    own = DDPMSchedulerCustom(200, beta_schedule=beta_schedule, prediction_type="sample", variance_type="fixed_large")
    sampler = distilled_sampler(own, 4)
    assert default_steps(own) is None and default_steps(sampler) == 4
    torch.testing.assert_close(sampler.diffusion.betas, own.diffusion.betas, rtol=0, atol=0)
    sampler.save_pretrained(tmp_path / "own")
    stock = DDIMScheduler.from_pretrained(tmp_path / "own")
    stock.save_pretrained(tmp_path / "stock")
    for folder in ("own", "stock"):
        found = DDIMSchedulerCustom.from_pretrained(tmp_path / folder)
        assert default_steps(found) == 4 and found.config.timestep_spacing == "trailing"
    assert default_steps(make_sampler("dpmsolver++", sampler)) == 4


@pytest.mark.parametrize("steps", [0, 201, 2.5, "4", True])
def test_a_file_with_other_steps_than_a_number_is_refused(steps):
    sampler = distilled_sampler(DDPMSchedulerCustom(200), 4)
    sampler.register_to_config(_num_inference_steps=steps)
    with pytest.raises(
        (ValueError, TypeError), match="_num_inference_steps of the scheduler must be an integer in 1..200"
    ):
        default_steps(sampler)
