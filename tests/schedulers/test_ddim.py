"""DDIMSchedulerCustom against eq. 12 of the DDIM paper in closed form, diffusers, and DDPMSchedulerCustom."""

import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch._dynamo.testing import CompileCounter

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom
from ddpm_hf.schedulers.base import ANALYTIC_MARK, TIMESTEP_SPACINGS
from ddpm_hf.schedulers.samplers import as_ddpm

T = 1000
SHAPE = (2, 3, 4, 4)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log_alpha_bar(scheduler, t):
    return math.fsum(math.log1p(-b) for b in scheduler.diffusion.betas[: t + 1].tolist()) if t >= 0 else 0.0


def equation_12(scheduler, output, t, previous, x_t, eta, z, clip=None, recompute=False):
    """Eqs. 12 and 16 of the DDIM paper, term by term, from the logarithms of ᾱ alone."""
    log_bar, log_prev = log_alpha_bar(scheduler, t), log_alpha_bar(scheduler, previous)
    bar, prev = math.exp(log_bar), math.exp(log_prev)
    rest, rest_prev = -math.expm1(log_bar), -math.expm1(log_prev)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        x_0, epsilon = (x_t - math.sqrt(rest) * output) / math.sqrt(bar), output
    elif kind == "sample":
        x_0, epsilon = output, (x_t - math.sqrt(bar) * output) / math.sqrt(rest)
    else:
        x_0 = math.sqrt(bar) * x_t - math.sqrt(rest) * output
        epsilon = math.sqrt(bar) * output + math.sqrt(rest) * x_t
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    if recompute:
        epsilon = (x_t - math.sqrt(bar) * x_0) / math.sqrt(rest)
    variance = eta**2 * rest_prev / rest * -math.expm1(log_bar - log_prev)
    direction = math.sqrt(max(rest_prev - variance, 0.0)) * epsilon
    return math.sqrt(prev) * x_0 + direction + math.sqrt(variance) * z, x_0


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("timesteps", [[999, 998, 501, 30, 29, 1, 0], [900, 333, 7], [999], [5]])
def test_step_is_equation_12_at_any_timesteps(timesteps, prediction_type, eta, recompute, clip):
    clipping = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    scheduler = DDIMSchedulerCustom(prediction_type=prediction_type, **clipping)
    scheduler.set_timesteps(timesteps=timesteps)
    for i, (t, previous) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
        assert scheduler.previous_timestep(t) == previous
        output, x, z = (randn(seed=3 * i + k) for k in range(3))
        result = scheduler.step(output, t, x, eta, recompute, variance_noise=z)
        expected, x_0 = equation_12(scheduler, output, t, previous, x, eta, z, clip, recompute)
        torch.testing.assert_close(result.prev_sample, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.pred_original_sample, x_0, rtol=1e-12, atol=1e-12)
