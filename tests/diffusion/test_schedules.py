"""β schedules and the tables that follow, against their definitions evaluated with 50 digits."""

import functools
import math

import mpmath
import pytest
import torch
from diffusers import DDPMScheduler
from mpmath import mpf

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.schedules import (
    BETA_SCHEDULES,
    check_betas,
    make_betas,
    rescale_zero_terminal_snr,
    scale_betas_for_timesteps,
)

LENGTHS = (10, 100, 1000, 4000, 10000)
START, END = 1e-4, 0.02
ZERO_SNR = ("linear+zero_snr", "squaredcos_cap_v2+zero_snr")


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


def exact_line(start, end, T):
    return [mpf(start) + (mpf(end) - mpf(start)) * i / max(T - 1, 1) for i in range(T)]


def exact_from_alpha_bar(alpha_bar, T):
    values = [alpha_bar(mpf(i) / T) for i in range(T + 1)]
    return [min(1 - b / a, mpf("0.999")) for a, b in zip(values[:-1], values[1:])]


def laplace_alpha_bar(u):
    sign = 1 if u <= 0.5 else -1
    log_snr = mpf(-0.5) * sign * mpmath.log(1 - 2 * abs(mpf(0.5) - u) + mpf("1e-6"))
    return mpmath.sqrt(mpmath.exp(log_snr) / (1 + mpmath.exp(log_snr)))


def exact_warmup(T, rising):
    return exact_line(START, END, rising) + [mpf(END)] * (T - rising)


def exact_quad(T):
    return [root**2 for root in exact_line(mpmath.sqrt(mpf(START)), mpmath.sqrt(mpf(END)), T)]


DEFINITIONS = {
    "linear": lambda T: exact_line(START, END, T),
    "scaled_linear": exact_quad,
    "quad": exact_quad,
    "quadratic": exact_quad,
    "squaredcos_cap_v2": lambda T: exact_from_alpha_bar(
        lambda u: mpmath.cos((u + mpf("0.008")) / mpf("1.008") * mpmath.pi / 2) ** 2, T
    ),
    "sigmoid": lambda T: [mpf(START) + (mpf(END) - mpf(START)) / (1 + mpmath.exp(-x)) for x in exact_line(-6, 6, T)],
    "laplace": lambda T: exact_from_alpha_bar(laplace_alpha_bar, T),
    "const": lambda T: [mpf(END)] * T,
    "constant": lambda T: [mpf(END)] * T,
    "jsd": lambda T: [1 / mpf(T - i) for i in range(T)],
    "warmup10": lambda T: exact_warmup(T, T // 10),
    "warmup50": lambda T: exact_warmup(T, T // 2),
}


def exact_zero_snr(betas):
    """Lin et al. 2023, algorithm 1, line by line."""
    root = [mpmath.sqrt(a) for a in exact_cumprod([1 - b for b in betas])]
    shifted = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]
    alphas_cumprod = [r * r for r in shifted]
    alphas = [alphas_cumprod[0]] + [b / a for a, b in zip(alphas_cumprod[:-1], alphas_cumprod[1:])]
    return [1 - a for a in alphas]


def exact_cumprod(values):
    product, products = mpf(1), []
    for value in values:
        product *= value
        products.append(product)
    return products


@functools.cache
def exact_betas(name, T):
    with mpmath.workdps(50):
        base = DEFINITIONS[name.removesuffix("+zero_snr")](T)
        return exact_zero_snr(base) if name.endswith("+zero_snr") else base


@functools.cache
def chain(name, T):
    betas = make_betas(name.removesuffix("+zero_snr"), T, rescale_betas_zero_snr=name.endswith("+zero_snr"))
    # Prediction of v is possible on every chain, one that ends in pure noise included.
    return GaussianDiffusion(betas, "v_prediction")


def exact_tables(betas, indices):
    """The definitions (eqs. 1, 2, 8, 9 and 10) at `indices`, nothing rearranged."""
    alphas_cumprod = exact_cumprod([1 - b for b in betas])
    tables = {}
    for t in indices:
        beta, bar = betas[t], alphas_cumprod[t]
        prev = alphas_cumprod[t - 1] if t else mpf(1)
        row = {
            "betas": beta,
            "alphas": 1 - beta,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": prev,
            "one_minus_alphas_cumprod": 1 - bar,
            "snr": bar / (1 - bar),
            "sqrt_snr": mpmath.sqrt(bar / (1 - bar)),
            "sqrt_betas": mpmath.sqrt(beta),
            "sqrt_alphas": mpmath.sqrt(1 - beta),
            "sqrt_alphas_cumprod": mpmath.sqrt(bar),
            "sqrt_one_minus_alphas_cumprod": mpmath.sqrt(1 - bar),
            "sqrt_recip_one_minus_alphas_cumprod": 1 / mpmath.sqrt(1 - bar),
            "posterior_variance": (1 - prev) / (1 - bar) * beta,
            "sampling_std_posterior_variance": mpmath.sqrt((1 - prev) / (1 - bar) * beta),
            "sampling_std_betas": mpmath.sqrt(beta) if t else mpf(0),
            "posterior_mean_coef_x_0": mpmath.sqrt(prev) * beta / (1 - bar),
            "posterior_mean_coef_x_t": mpmath.sqrt(1 - beta) * (1 - prev) / (1 - bar),
        }
        if bar > 0:
            row["sqrt_recip_alphas_cumprod"] = 1 / mpmath.sqrt(bar)
            row["sqrt_recipm1_alphas_cumprod"] = mpmath.sqrt((1 - bar) / bar)
            row["minus_sqrt_recipm1_alphas_cumprod"] = -mpmath.sqrt((1 - bar) / bar)
            row["epsilon_mean_coef_x_t"] = 1 / mpmath.sqrt(1 - beta)
            row["epsilon_mean_coef_epsilon"] = beta / mpmath.sqrt((1 - bar) * (1 - beta))
        for key, value in row.items():
            tables.setdefault(key, {})[t] = value
    return tables


def sampled_indices(T):
    """The ends, where precision is lost first, and a spread between them."""
    return sorted({*range(min(T, 12)), *range(max(T - 6, 0), T), *range(0, T, max(T // 60, 1))})


def relative_error(value, exact):
    return float(abs(mpf(value) - exact) / abs(exact)) if exact else abs(value)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", [*DEFINITIONS, *ZERO_SNR])
def test_tables_agree_with_50_digits(name, T):
    diffusion = chain(name, T)
    image = torch.zeros(1, 1, 1, 1)
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for key, exact in exact_tables(exact_betas(name, T), sampled_indices(T)).items():
        table, as_used = diffusion.tables[key], diffusion.at(key, torch.arange(T), image).flatten().tolist()
        for t, value in exact.items():
            assert relative_error(table[t].item(), value) < 1e-12, (key, t)
            # Outside of these float32 has no such number: T = 10,000 at the linear range ends at ᾱ = 1e-44.
            if value == 0 or smallest <= abs(value) <= largest:
                assert relative_error(as_used[t], value) < 2e-7, (key, t)


@pytest.mark.parametrize("name", [*DEFINITIONS, *ZERO_SNR])
def test_logarithms_agree_with_50_digits(name):
    T = 1000
    diffusion, betas = chain(name, T), exact_betas(name, T)
    bar = exact_cumprod([1 - b for b in betas])
    tilde = [(1 - bar[t - 1]) / (1 - bar[t]) * betas[t] if t else mpf(0) for t in range(T)]
    tilde[0] = tilde[1]
    for t in sampled_indices(T):
        large = tilde[0] if t == 0 else betas[t]
        # Absolute: an error of δ in a logarithm is a relative error of δ in the variance.
        assert abs(diffusion.posterior_log_variance_clipped[t].item() - mpmath.log(tilde[t])) < 1e-12
        assert abs(diffusion.log_betas[t].item() - mpmath.log(betas[t])) < 1e-12
        assert abs(diffusion.log_variance_betas[t].item() - mpmath.log(large)) < 1e-12


def test_every_schedule_has_a_definition_here():
    assert set(DEFINITIONS) == set(BETA_SCHEDULES)


@pytest.mark.parametrize("T", [2, 3, 7, 99, 999])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_odd_and_short_chains_agree_with_their_definition(name, T):
    betas = make_betas(name, T).tolist()
    assert max(relative_error(b, e) for b, e in zip(betas, exact_betas(name, T), strict=True)) < 1e-12


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [10, 999, 1000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_schedules_are_those_of_diffusers(name, T, zero_snr):
    ours = make_betas(name, T, rescale_betas_zero_snr=zero_snr)
    stock = DDPMScheduler(num_train_timesteps=T, beta_schedule=name, rescale_betas_zero_snr=zero_snr).betas
    # Stock's zero-SNR β are differences of float32 numbers near 1, scaled up where the chain is short.
    torch.testing.assert_close(ours.float(), stock, rtol=1e-6, atol=5e-6 if zero_snr else 0)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_pure_noise():
    betas = make_betas("linear", 1000, rescale_betas_zero_snr=True)
    assert betas[0] == make_betas("linear", 1000)[0]
    assert torch.cumprod(1 - betas, 0)[-1] == 0
    assert bool((betas[:-1] < 1).all())


def test_zero_terminal_snr_of_a_chain_that_has_it_is_that_chain():
    betas = make_betas("jsd", 50)
    torch.testing.assert_close(rescale_zero_terminal_snr(betas), betas, rtol=1e-13, atol=0)


def test_jsd_has_alpha_bar_linear_in_t():
    T = 40
    bar = GaussianDiffusion(make_betas("jsd", T), "v_prediction").alphas_cumprod
    torch.testing.assert_close(bar, 1 - torch.arange(1, T + 1, dtype=torch.float64) / T)


@pytest.mark.parametrize("T", [50, 100, 250, 500, 1000, 2000, 4000])
def test_a_scaled_linear_range_keeps_the_noise_level_at_any_length(T):
    def log_alpha_bar(T, fraction, start, end):
        return torch.log1p(-make_betas("linear", T, start, end))[: round(T * fraction)].sum().item()

    start, end = scale_betas_for_timesteps(T)
    for fraction in (0.3, 0.5, 0.8, 1.0):
        scaled, published = log_alpha_bar(T, fraction, start, end), log_alpha_bar(1000, fraction, 1e-4, 0.02)
        # The sum of β over a part of the chain, and the second order of log(1 − β), depend on T as 1/T.
        assert scaled == pytest.approx(published, rel=15 / min(T, 1000))
    assert T * (start + end) == pytest.approx(1000 * (1e-4 + 0.02))


def test_a_range_that_is_not_scaled_does_not():
    assert torch.cumprod(1 - make_betas("linear", 100), 0)[-1].item() == pytest.approx(0.364, abs=1e-3)
    start, end = scale_betas_for_timesteps(100)
    assert torch.cumprod(1 - make_betas("linear", 100, start, end), 0)[-1] < 1e-4


def test_trained_betas_are_taken_as_they_are():
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
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, ValueError, "rescale_betas_zero_snr"),
    ],
)
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        make_betas(**{"num_train_timesteps": 10, **arguments})


def test_a_range_that_would_reach_one_is_refused():
    with pytest.raises(ValueError, match="num_train_timesteps=20"):
        scale_betas_for_timesteps(20)
    assert scale_betas_for_timesteps(21)[1] < 1


def test_a_table_of_betas_has_one_dimension():
    with pytest.raises(ValueError, match="betas must have shape"):
        check_betas(torch.full((2, 2), 0.1))
