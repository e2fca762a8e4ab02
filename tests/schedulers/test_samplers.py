"""Samplers by name: class and options, and the chain of the scheduler they are created from."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom
from ddpm_hf.schedulers.samplers import (
    SAMPLERS,
    as_ddpm,
    default_steps,
    distilled_sampler,
    make_sampler,
    recommended_sampler,
)


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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("unipc", 20)),
        ({"num_train_timesteps": 8}, ("unipc", 8)),
        ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, ("unipc", 20)),
        ({"beta_schedule": "squaredcos_cap_v2"}, ("ddpm", 100)),
    ],
)
def test_the_recommended_sampler_depends_on_what_x_T_says(config, expected):
    scheduler = DDPMSchedulerCustom(**config)
    assert recommended_sampler(scheduler) == expected
    assert recommended_sampler(distilled_sampler(DDPMSchedulerCustom(**config), 4)) == ("ddim", 4)


def test_only_ancestral_sampling_forgets_an_error_of_epsilon_at_T():
    """Data are N(0, 1), of which the exact ε is √(1−ᾱ)·x. The network adds 1e-3 to it at the first timestep alone."""
    own = DDPMSchedulerCustom(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    means = {}
    for name in ("ddpm", "ddim", "dpmsolver++"):
        scheduler = make_sampler(name, own, "trailing")
        scheduler.set_timesteps(20)
        x = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(scheduler.timesteps):
            eps = (1 - own.alphas_cumprod[t]).sqrt() * x + (1e-3 if i == 0 else 0)
            x = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(int(t))).prev_sample
        means[name] = abs(x.mean().item())
    assert means["ddpm"] < 0.2 and min(means["ddim"], means["dpmsolver++"]) > 1.4


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
