"""Tables of a chain against their definitions with 50 digits, and their lookup."""

import functools

import mpmath
import pytest
import torch
from mpmath import mpf

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.schedules import make_betas, rescale_zero_terminal_snr
from ddpm_hf.diffusion.tables import TableLookup, working_dtype
from tests.diffusion.exact import DEFINITIONS, ZERO_SNR, exact_betas, exact_cumprod, relative_error

LENGTHS = (10, 100, 1000, 4000, 10000)


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


@functools.cache
def chain(name, T):
    betas = make_betas(name.removesuffix("+zero_snr"), T)
    betas = rescale_zero_terminal_snr(betas) if name.endswith("+zero_snr") else betas
    # v-prediction is possible for every chain, including zero terminal SNR.
    return GaussianDiffusion(betas, "v_prediction")


def exact_tables(betas, indices):
    """The definitions (eqs. 1, 2, 8, 9 and 10) at `indices`, as written."""
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
    """Both ends, where precision is lost first, and some timesteps between them."""
    return sorted({*range(min(T, 12)), *range(max(T - 6, 0), T), *range(0, T, max(T // 60, 1))})


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", [*DEFINITIONS, *ZERO_SNR])
def test_tables_agree_with_50_digits(name, T):
    diffusion = chain(name, T)
    image = torch.zeros(1, 1, 1, 1)
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for key, exact in exact_tables(exact_betas(name, T), sampled_indices(T)).items():
        table, as_used = diffusion.tables[key], diffusion.lookup(key, torch.arange(T), image).flatten().tolist()
        for t, value in exact.items():
            assert relative_error(table[t].item(), value) < 1e-12, (key, t)
            # Other values are not representable in float32: the linear schedule with T = 10,000 ends at ᾱ = 1e-44.
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


def test_lookup_gives_numbers_for_an_int_and_a_column_for_a_batch():
    lookup = TableLookup({"a": torch.tensor([1.0, 2, 3]).double(), "rows": torch.arange(6.0).view(3, 2).double()})
    image = torch.zeros(2, 3, 4, 4)
    assert lookup("a", 1, image) == lookup("a", torch.tensor(1), image) == 2.0
    assert lookup("rows", 2, image) == [4.0, 5.0]
    column = lookup("a", torch.tensor([2, 0]), image)
    assert column.shape == (2, 1, 1, 1) and column.flatten().tolist() == [3, 1] and column.dtype == torch.float32
    rows = lookup("rows", torch.tensor([2, 0]), image)
    assert rows.shape == (2, 2, 1, 1, 1) and rows.flatten(1).tolist() == [[4, 0], [5, 1]]


def test_lookup_rounds_to_the_dtype_of_the_images_but_to_float32_at_least():
    third = torch.tensor([1 / 3], dtype=torch.float64)
    lookup, t = TableLookup({"a": third}), torch.tensor([0])
    for dtype, expected in ((torch.float64, third), (torch.float32, third.float()), (torch.bfloat16, third.float())):
        assert torch.equal(lookup("a", t, torch.zeros(1, dtype=dtype)), expected)


def test_working_dtype_is_the_widest_and_at_least_float32():
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.float16, torch.float32, torch.float64))
    assert working_dtype(half) == working_dtype(half, single) == torch.float32
    assert working_dtype(half, double) == torch.float64
