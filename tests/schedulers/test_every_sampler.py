"""Every sampler, spacing and number of steps on Gaussian data: the right mean and spread, or a refusal that says why.

The network is optimal for N(0.6, 0.2²), and every step is linear in x, so that the result is known in closed form.
"""

import functools
import inspect
import math

import numpy as np
import pytest
import torch

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.schedulers.base import MAX_TERMINAL_ALPHA_CUMPROD, TIMESTEP_SPACINGS
from ddpm_hf.schedulers.compatibility import set_timesteps
from ddpm_hf.schedulers.samplers import SAMPLERS, make_sampler
from tests.schedulers.test_base import noise_warnings
from tests.schedulers.test_ddpm import MEAN, chain_in_closed_form, log_alpha_bar, optimal_prediction

STD = 0.2
COUNTS = (1, 2, 3, 7, 10, 20, 50, 150, 300, 501, 999, 1000)
V = {"prediction_type": "v_prediction"}
SCHEDULES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, **V},
    "jsd": {"beta_schedule": "jsd", **V},
}
SOLVERS = [name for name in SAMPLERS if name not in ("ddpm", "ddim")]
FIRST_ORDER, STOCHASTIC = ("euler",), ("dpmsolver++sde",)
PIXELS = 4000


@functools.cache
def chain(schedule) -> tuple[DDPMSchedulerCustom, list[float], np.ndarray]:
    own = DDPMSchedulerCustom(clip_sample=False, **SCHEDULES[schedule])
    log_snr = torch.logit(own.diffusion.alphas_cumprod).clamp(min=-1e300).numpy()
    return own, own.diffusion.betas.tolist(), log_snr


def alpha_bar(schedule, t) -> float:
    """ᾱ at a timestep; between timesteps log SNR is interpolated, for schedulers with fractional ones."""
    log_snr = np.interp(float(t), range(1000), chain(schedule)[2])
    return 1 / (1 + math.exp(-log_snr)) if log_snr > -700 else 0.0


def sample(scheduler, schedule, pixels) -> tuple[float, float]:
    """Mean and standard deviation of samples from exact quantiles of x_T."""
    parameters = inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(0)} if "generator" in parameters else {}
    x = torch.special.ndtri((torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels)
    x = (x / x.std(correction=0)).reshape(1, 1, 1, -1) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        bar, kind = alpha_bar(schedule, t), scheduler.config.prediction_type
        output = optimal_prediction(kind, scheduler.scale_model_input(x, t), bar, MEAN, STD**2)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x.mean().item(), x.std(correction=0).item()


def ddim_in_closed_form(betas, timesteps) -> tuple[float, float]:
    """Mean and standard deviation after the steps of DDIM's eq. 12 with σ = 0, from N(0, 1)."""
    m, s = 0.0, 1.0
    for t, previous in zip(timesteps, [*timesteps[1:], -1]):
        bar = math.exp(log_alpha_bar(betas, t)) if betas[t] < 1 else 0.0
        to = math.exp(log_alpha_bar(betas, previous))
        variance = bar * STD**2 + 1 - bar
        gain = (math.sqrt(to * bar) * STD**2 + math.sqrt((1 - to) * (1 - bar))) / variance
        m, s = math.sqrt(to) * MEAN + gain * (m - math.sqrt(bar) * MEAN), gain * s
    return m, s


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_own_samplers_give_their_closed_form_at_every_number(name, spacing, schedule):
    own, betas, _ = chain(schedule)
    for steps in COUNTS:
        scheduler = make_sampler(name, own, spacing)
        set_timesteps(scheduler, "cpu", steps, None)
        assert len(scheduler.timesteps) == steps
        mean, std = sample(scheduler, schedule, PIXELS if name == "ddpm" else 2)
        timesteps = scheduler.timesteps.tolist()
        if name == "ddim":
            assert (mean, std) == pytest.approx(ddim_in_closed_form(betas, timesteps), rel=1e-6, abs=1e-9), steps
        elif betas[timesteps[0]] < 1:  # else the closed form of the test divides by ᾱ = 0
            expected, variance = chain_in_closed_form(betas, timesteps, "fixed_small")
            error = math.sqrt(variance / PIXELS)
            assert abs(mean - expected) < 5 * error and abs(std - math.sqrt(variance)) < 4 * error, steps


def bound(name, schedule, steps) -> float:
    """The error of a solver of order 1 or 2, plus that of its last step, and of the finite number of pixels."""
    # The noise levels of "jsd" have a gap, from 32 to infinity, over which no solver has its order.
    is_first = name in FIRST_ORDER or schedule == "jsd"
    error = 6 / steps if is_first else min(STD, 30 / steps**2) + 0.005
    return error + (4 * STD / math.sqrt(2 * PIXELS) if name in STOCHASTIC else 0)


def is_refused(scheduler, steps) -> bool:
    try:
        set_timesteps(scheduler, "cpu", steps, None)
    except ValueError as error:
        assert f"num_inference_steps={steps} does not work" in str(error) and "'ddim' or 'ddpm' of make_sampler" in str(
            error
        )
        return True
    return False


def counts(name, spacing, schedule) -> tuple[int, ...]:
    """All numbers for one chain and spacing, fewer for the others: this file would take minutes."""
    is_whole = (spacing, schedule) == ("trailing", "linear")
    if name == "lms":  # integrates its coefficients numerically
        return COUNTS[:8] if is_whole else COUNTS[:6]
    return COUNTS if is_whole else (*COUNTS[:8], 501)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_right_to_their_order_or_say_why_not(name, spacing, schedule, caplog):
    own, refused = chain(schedule)[0], []
    for steps in counts(name, spacing, schedule):
        scheduler = make_sampler(name, own, spacing)
        caplog.clear()
        if is_refused(scheduler, steps):
            refused.append(steps)
            continue
        if alpha_bar(schedule, scheduler.timesteps[0]) > MAX_TERMINAL_ALPHA_CUMPROD:
            assert f"Use timestep_spacing='trailing' for {steps} steps" in noise_warnings(caplog)[-1]
            continue
        mean, std = sample(scheduler, schedule, PIXELS if name in STOCHASTIC else 2)
        limit = bound(name, schedule, steps)
        assert abs(std - STD) < limit and abs(mean - MEAN) < min(limit, STD / 4) + 0.02, (steps, mean, std)
    if (spacing, schedule) == ("trailing", "linear"):
        assert refused == {"pndm": [2, 3, 7, 150, 300, 501, 999], "heun": [2, 3]}.get(name, [])
