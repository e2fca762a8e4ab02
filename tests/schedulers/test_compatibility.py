"""Schedulers of diffusers that cannot sample from a DDPM, at all or at some numbers of steps, are refused with a reason."""

import copy
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom
from ddpm_hf.interop import stock_config
from ddpm_hf.schedulers.base import logger
from ddpm_hf.schedulers.compatibility import (
    MEAN,
    STD,
    GaussianNetwork,
    _spread_of_ddim,
    check_scheduler,
    output_channels,
    sample_gaussian,
    set_timesteps,
)
from ddpm_hf.schedulers.samplers import SAMPLERS, make_sampler

OWN = DDPMSchedulerCustom()
COSINE = DDPMSchedulerCustom(beta_schedule="squaredcos_cap_v2")
ZERO_SNR = DDPMSchedulerCustom(prediction_type="v_prediction", rescale_betas_zero_snr=True)
LINSPACE = {"timestep_spacing": "linspace"}
JSD = DDPMSchedulerCustom(prediction_type="v_prediction", beta_schedule="jsd")


def converted(name, own=OWN, **options):
    return getattr(diffusers, name).from_config(stock_config(own), **options)


def refusal(scheduler, steps) -> str:
    with pytest.raises(ValueError) as error:
        set_timesteps(scheduler, "cpu", steps, None)
    message = str(error.value)
    assert message.startswith(f"num_inference_steps={steps} does not work with {type(scheduler).__name__} (")
    assert "'ddim' or 'ddpm' of make_sampler, which are right on any timesteps." in message
    return message


# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "name",
    [
        "IPNDMScheduler",
        "DDIMInverseScheduler",
        "DPMSolverMultistepInverseScheduler",
        "CogVideoXDDIMScheduler",
        "EDMEulerScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "UnCLIPScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "RePaintScheduler",
        "VQDiffusionScheduler",
    ],
)
def test_schedulers_of_other_processes_are_refused_by_name(name):
    scheduler = getattr(diffusers, name)(**({"num_vec_classes": 4} if name == "VQDiffusionScheduler" else {}))
    with pytest.raises(ValueError, match=f"{name} cannot sample from a DDPM.*DDIMSchedulerCustom"):
        check_scheduler(scheduler)
    with pytest.raises(ValueError, match=name):
        make_sampler("ddpm", scheduler)


STOCK = sorted(
    {cls for cls, _ in SAMPLERS.values() if not cls.endswith("Custom")}
    | {"DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "SASolverScheduler"}
    | {"EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
    | {"DPMSolverSinglestepScheduler"}
)


@pytest.mark.parametrize("name", STOCK)
def test_schedulers_of_the_same_process_run_at_50_steps(name):
    scheduler = converted(name, timestep_spacing="trailing")
    check_scheduler(scheduler)
    set_timesteps(scheduler, "cpu", 50, None)
    reference = copy.deepcopy(converted(name, timestep_spacing="trailing"))
    reference.set_timesteps(50)
    assert torch.equal(torch.as_tensor(scheduler.timesteps), torch.as_tensor(reference.timesteps))


# ---------------------------------------------------------------------- steps that do not know their timesteps


@pytest.mark.parametrize("cls", [DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize(
    ("spacing", "steps", "near"),
    [
        ("trailing", 150, "125 or 200"),
        ("trailing", 501, "500 or 1000"),
        ("trailing", 600, "500 or 1000"),
        ("linspace", 400, "1 or 1000"),
    ],
)
def test_steps_of_a_fixed_stride_need_evenly_spaced_timesteps(cls, spacing, steps, near):
    scheduler = converted(cls.__name__, timestep_spacing=spacing)
    message = refusal(scheduler, steps)
    near = near.replace("1 or ", "") if cls is PNDMScheduler else near  # whose Runge-Kutta steps need 4 timesteps
    assert f"from t to t − {1000 // steps}" in message and f"Use {near} steps" in message
    for n in map(int, near.split(" or ")):
        set_timesteps(scheduler, "cpu", n, None)


@pytest.mark.parametrize("steps", [150, 400, 501, 600, 999])
def test_leading_timesteps_are_evenly_spaced_at_any_number(steps):
    for cls in (DDIMScheduler, PNDMScheduler):
        set_timesteps(converted(cls.__name__, timestep_spacing="leading"), "cpu", steps, None)


def test_number_of_steps_that_visits_timestep_minus_1_is_refused():
    """diffusers' trailing spacing of 61 steps gives 62, the last one −1."""
    message = refusal(DDPMScheduler(timestep_spacing="trailing"), 61)
    assert "timestep -1" in message and "60 or 62" in message


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_last_step_that_adds_noise_is_refused(variance_type):
    scheduler = DDPMScheduler(timestep_spacing="trailing", variance_type=variance_type)
    assert "its last step, from timestep 99, adds noise. Use 1000 steps" in refusal(scheduler, 10)
    set_timesteps(DDPMScheduler(variance_type=variance_type), "cpu", 10, None)
    with pytest.raises(ValueError, match="these timesteps do not work with DDPMScheduler.*adds noise"):
        set_timesteps(scheduler, "cpu", None, [900, 400])


# ---------------------------------------------------------------------- noise levels


@pytest.mark.parametrize("name", ["heun", "lms", "pndm", "deis"])
def test_infinite_noise_level_is_refused(name):
    for own in (JSD, DDPMSchedulerCustom(3, trained_betas=[0.1, 0.5, 1.0], prediction_type="sample")):
        if own is JSD or name != "pndm":  # it cannot predict x_0
            refusal(make_sampler(name, own), 3)


@pytest.mark.parametrize("name", ["dpmsolver++", "dpmsolver++sde", "unipc", "euler"])
def test_infinite_noise_level_is_replaced_where_diffusers_does(name):
    sampler = make_sampler(name, JSD)
    set_timesteps(sampler, "cpu", 20, None)
    assert torch.as_tensor(sampler.sigmas).isfinite().all()
    torch.testing.assert_close(torch.as_tensor(sampler.betas), JSD.betas, rtol=1e-3, atol=0)  # float32 of diffusers


@pytest.mark.parametrize("name", ["euler", "dpmsolver++", "dpmsolver++sde", "unipc"])
def test_noise_levels_that_do_not_fall_are_refused(name):
    """diffusers replaces the infinite level by 4096, and at 500 steps the next one is above it."""
    message = refusal(make_sampler(name, ZERO_SNR), 500)
    assert "its noise levels are not finite, or do not fall at every step" in message
    set_timesteps(make_sampler(name, ZERO_SNR), "cpu", 100, None)


def test_repeated_noise_level_is_refused():
    """At T steps the multistep solvers round two timesteps to one, and divide by zero there."""
    assert "Use 999 steps" in refusal(make_sampler("dpmsolver++", OWN, "linspace"), 1000)


KARRAS = ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]


@pytest.mark.parametrize("name", [*KARRAS, "DEISMultistepScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_karras_levels_on_a_cosine_schedule_are_refused(name, steps):
    """Their timesteps repeat (an IndexError in the last step), or are NaN."""
    options = {"use_karras_sigmas": True, "timestep_spacing": "trailing"}
    refusal(converted(name, COSINE, **options), steps)
    if name != "KDPM2DiscreteScheduler":
        refusal(converted(name, COSINE, use_exponential_sigmas=True), steps)
    set_timesteps(converted(name, OWN, **options), "cpu", steps, None)


@pytest.mark.parametrize(("name", "steps"), [("HeunDiscreteScheduler", 2), ("KDPM2DiscreteScheduler", 3)])
def test_steps_that_are_too_long_for_the_solver_are_refused(name, steps):
    assert "turns data with mean 0.6 and standard deviation 0.2 into" in refusal(converted(name), steps)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_given_timesteps_are_tried_as_well(name):
    scheduler = converted(name)
    set_timesteps(scheduler, "cpu", None, [999, 700, 300, 100, 0])
    assert torch.as_tensor(scheduler.timesteps).tolist() == [999, 700, 300, 100, 0]
    for wrong in ([100, 700, 0], [700, 700, 0]):
        with pytest.raises(ValueError, match=f"these timesteps do not work with {name}"):
            set_timesteps(converted(name), "cpu", None, wrong)
    with pytest.raises(ValueError, match="timesteps must be a non-empty list of integers"):
        set_timesteps(scheduler, "cpu", None, [0.5])


# ---------------------------------------------------------------------- the trial


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_trial_network_predicts_the_mean_of_gaussian_data(prediction_type):
    scheduler = DDPMSchedulerCustom(prediction_type=prediction_type)
    network, bars = GaussianNetwork(scheduler), scheduler.diffusion.alphas_cumprod
    for t in (0, 500, 999):
        bar = bars[t].item()
        mean, spread = math.sqrt(bar) * MEAN, math.sqrt(bar * STD**2 + 1 - bar)
        # At the mean of x_t the best guess of x_0 is MEAN; one deviation above, it is one deviation of it above.
        x = torch.tensor([mean, mean + spread], dtype=torch.float64).reshape(1, 1, 1, 2)
        x_0 = scheduler.diffusion.predict_x_0(network(x, t), x, t).flatten()
        assert x_0[0].item() == pytest.approx(MEAN, rel=1e-4)
        assert x_0[1].item() - MEAN == pytest.approx(math.sqrt(bar) * STD**2 / spread, rel=1e-3, abs=1e-5)
    between = network.alpha_bar(499.5).item()
    assert bars[500] < between < bars[499]


def test_trial_samples_have_the_moments_of_the_data():
    scheduler = DDIMSchedulerCustom(clip_sample=False)
    x = sample_gaussian(scheduler)
    assert x.mean().item() == pytest.approx(MEAN, abs=1e-3) and x.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("choice", [10, 150, (999, 500, 20)])
def test_spread_of_ddim_is_that_of_its_samples(choice):
    scheduler = DDIMSchedulerCustom(clip_sample=False, timestep_spacing="trailing")
    if isinstance(choice, int):
        scheduler.set_timesteps(choice)
    else:
        scheduler.set_timesteps(timesteps=choice)
    std = sample_gaussian(scheduler).std(correction=0).item()
    assert _spread_of_ddim(scheduler, choice) == pytest.approx(std, rel=1e-3)


@pytest.mark.parametrize("options", [{"use_beta_sigmas": True}, {"use_karras_sigmas": True}])
def test_samples_with_much_less_spread_than_ddims_are_refused(options):
    assert "into 0.6 and 0.0" in refusal(converted("EulerDiscreteScheduler", COSINE, **options, **LINSPACE), 7)


def test_random_state_is_not_used_by_the_trial():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name in STOCK:
        set_timesteps(converted(name, timestep_spacing="trailing"), "cpu", 20, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_output_channels_are_those_that_step_takes():
    learned = DDPMSchedulerCustom(variance_type="learned_range")
    assert output_channels(learned, 3) == ((6,), 6) and output_channels(OWN, 3) == ((3,), 3)
    assert output_channels(converted("DDPMScheduler", learned), 3) == ((6,), 6)
    for other in (DDIMSchedulerCustom.from_config(learned.config), EulerDiscreteScheduler.from_config(learned.config)):
        assert output_channels(other, 3) == ((3, 6), 3)


def test_early_start_is_warned_of_for_every_scheduler(caplog):
    with caplog.at_level("WARNING", logger=logger.name):
        set_timesteps(converted("EulerDiscreteScheduler"), "cpu", 600, None)
    (message,) = [r.getMessage() for r in caplog.records if r.name == logger.name]
    assert "at timestep 599" in message and "timestep_spacing='trailing'" in message


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_steps_that_leave_the_noisy_images_are_refused(name):
    """Their first step goes from a noise level of 20,000 to 13, and takes the mean of both ends' directions. The exact
    network for Gaussian data brings back what comes out; trained ones make noise of it (MNIST: FD 507, with DDIM 0.15)."""
    scheduler = converted(name, COSINE, timestep_spacing="trailing", skip_prk_steps=True)
    assert "its steps are too large: what they make of noise is 5." in refusal(scheduler, 20)
    set_timesteps(scheduler, "cpu", 100, None)
    unit = GaussianNetwork(scheduler, 0.0, 1.0)
    sample_gaussian(scheduler, unit)
    assert 1 <= unit.widest_input < 1.2
