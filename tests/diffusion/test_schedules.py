"""β schedules against their definitions evaluated with 50 digits, and against diffusers."""

import math

import mpmath
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.schedules import (
    BETA_SCHEDULES,
    check_betas,
    make_betas,
    rescale_zero_terminal_snr,
    scale_betas_for_timesteps,
)
from tests.diffusion.exact import DEFINITIONS, exact_betas, relative_error


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


def test_every_schedule_has_an_exact_definition():
    assert set(DEFINITIONS) == set(BETA_SCHEDULES)


@pytest.mark.parametrize("T", [2, 3, 7, 99, 999])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_schedules_of_odd_and_short_chains_agree_with_50_digits(name, T):
    betas = make_betas(name, T).tolist()
    assert max(relative_error(b, e) for b, e in zip(betas, exact_betas(name, T), strict=True)) < 1e-12


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [10, 999, 1000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_schedules_equal_those_of_diffusers(name, T, zero_snr):
    ours = rescale_zero_terminal_snr(make_betas(name, T)) if zero_snr else make_betas(name, T)
    stock = DDPMScheduler(num_train_timesteps=T, beta_schedule=name, rescale_betas_zero_snr=zero_snr).betas
    # Stock's zero-SNR β are differences of float32 numbers near 1, which short chains scale up.
    torch.testing.assert_close(ours.float(), stock, rtol=1e-6, atol=5e-6 if zero_snr else 0)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_pure_noise():
    betas = rescale_zero_terminal_snr(make_betas("linear", 1000))
    assert betas[0] == make_betas("linear", 1000)[0]
    assert torch.cumprod(1 - betas, 0)[-1] == 0
    assert bool((betas[:-1] < 1).all())


def test_zero_terminal_snr_keeps_a_chain_that_has_it():
    betas = make_betas("jsd", 50)
    torch.testing.assert_close(rescale_zero_terminal_snr(betas), betas, rtol=1e-13, atol=0)


def test_jsd_has_alpha_bar_linear_in_t():
    T = 40
    bar = GaussianDiffusion(make_betas("jsd", T), "v_prediction").alphas_cumprod
    torch.testing.assert_close(bar, 1 - torch.arange(1, T + 1, dtype=torch.float64) / T)


@pytest.mark.parametrize("T", [50, 100, 250, 500, 1000, 2000, 4000])
def test_scaled_linear_range_keeps_the_noise_level_at_any_length(T):
    def log_alpha_bar(T, fraction, start, end):
        return torch.log1p(-make_betas("linear", T, start, end))[: round(T * fraction)].sum().item()

    start, end = scale_betas_for_timesteps(T)
    for fraction in (0.3, 0.5, 0.8, 1.0):
        scaled, published = log_alpha_bar(T, fraction, start, end), log_alpha_bar(1000, fraction, 1e-4, 0.02)
        # The sum of β over a part of the chain, and the second order of log(1 − β), depend on T as 1/T.
        assert scaled == pytest.approx(published, rel=15 / min(T, 1000))
    assert T * (start + end) == pytest.approx(1000 * (1e-4 + 0.02))


def test_unscaled_linear_range_leaves_signal_in_a_short_chain():
    assert torch.cumprod(1 - make_betas("linear", 100), 0)[-1].item() == pytest.approx(0.364, abs=1e-3)
    start, end = scale_betas_for_timesteps(100)
    assert torch.cumprod(1 - make_betas("linear", 100, start, end), 0)[-1] < 1e-4


def test_trained_betas_are_copied_unchanged():
    given = [0.1, 0.3, 0.2]
    betas = make_betas(num_train_timesteps=3, trained_betas=given)
    assert betas.tolist() == given and betas.dtype == torch.float64
    tensor = torch.tensor(given, dtype=torch.float64)
    make_betas(num_train_timesteps=3, trained_betas=tensor)[0] = 0.5
    assert tensor.tolist() == given


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"beta_schedule": "cubic"}, ValueError, "beta_schedule"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps"),
        ({"num_train_timesteps": 10.0}, TypeError, "num_train_timesteps"),
        ({"num_train_timesteps": True}, TypeError, "num_train_timesteps"),
        ({"beta_start": 0.0}, ValueError, "beta_start"),
        ({"beta_end": 1.0}, ValueError, "beta_end"),
        ({"beta_end": math.nan}, ValueError, "beta_end"),
        ({"beta_start": "1e-4"}, TypeError, "beta_start"),
        ({"trained_betas": [0.1] * 5}, ValueError, "trained_betas.*num_train_timesteps"),
        ({"trained_betas": ["a"] * 10}, TypeError, "trained_betas"),
        ({"trained_betas": [0.1] * 9 + [1.5]}, ValueError, "trained_betas"),
        ({"trained_betas": [1.0] + [0.1] * 9}, ValueError, "trained_betas"),
        ({"trained_betas": [0.1] * 9 + [math.nan]}, ValueError, "trained_betas"),
    ],
)
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        make_betas(**{"num_train_timesteps": 10, **arguments})


def test_zero_terminal_snr_needs_two_timesteps():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        rescale_zero_terminal_snr(make_betas("linear", 1))


def test_scaled_range_that_reaches_one_is_refused():
    with pytest.raises(ValueError, match="num_train_timesteps=20"):
        scale_betas_for_timesteps(20)
    assert scale_betas_for_timesteps(21)[1] < 1


def test_betas_must_have_one_dimension():
    with pytest.raises(ValueError, match="betas must have shape"):
        check_betas(torch.full((2, 2), 0.1))
