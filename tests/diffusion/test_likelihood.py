"""The bound against closed forms, against an independent float64 reference, and for a diffusers network."""

import math

import mpmath
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.diffusion.gaussian import LEARNED_VARIANCES, PREDICTION_TYPES, VARIANCE_TYPES, GaussianDiffusion
from ddpm_hf.diffusion.likelihood import (
    DECODER_VARIANCES,
    BoundSums,
    bound_terms,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    prior_bits,
)
from ddpm_hf.diffusion.schedules import make_betas, rescale_zero_terminal_snr
from tests.diffusion.helpers import gaussian_denoiser, gaussian_moments, random_images, variational_bound

LOG_2 = math.log(2)


def pictures(*shape, mean=0.0, std=0.3, seed=0, dtype=torch.float64):
    """Normal pixels rounded to 8 bits, in [-1, 1]. The seed differs from that of the tests' noise, so that the numbers do."""
    x = mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return (((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1).to(dtype)


def gaussian_chain(variance_type, variance, T=1000):
    diffusion = GaussianDiffusion(make_betas("linear", T))
    moments = gaussian_moments(diffusion, variance) if variance_type == "analytic" else None
    return GaussianDiffusion(make_betas("linear", T), "epsilon", variance_type, analytic_moments=moments)


# ---------------------------------------------------------------------- KL and decoder


@pytest.mark.parametrize("variance", ["tensors", "numbers"])
def test_kl_is_that_of_torch_distributions(variance):
    images = random_images()
    mean_1, mean_2, log_1, log_2 = (next(images) for _ in range(4))
    if variance == "numbers":
        log_1, log_2 = -1.3, 0.4
    std_1, std_2 = torch.as_tensor(log_1 / 2).exp(), torch.as_tensor(log_2 / 2).exp()
    expected = kl_divergence(Normal(mean_1, std_1), Normal(mean_2, std_2))
    torch.testing.assert_close(gaussian_kl(mean_1, log_1, mean_2, log_2), expected)
    assert bool((gaussian_kl(mean_1, log_1, mean_1, log_1) == 0).all())


def test_kl_of_nearly_equal_variances_keeps_its_digits_in_float32():
    mean = torch.zeros(1)
    for difference in (1e-2, 1e-3):
        kl = gaussian_kl(mean, torch.tensor([difference]), mean, torch.zeros(1)).item()
        assert kl == pytest.approx((math.expm1(difference) - difference) / 2, rel=1e-3)


def exact_log_probability(x, mean, std):
    with mpmath.workdps(60):
        low = mpmath.inf if x == -1 else (mpmath.mpf(mean) - x + mpmath.mpf(1) / 255) / std
        high = -mpmath.inf if x == 1 else (mpmath.mpf(mean) - x - mpmath.mpf(1) / 255) / std
        # Q(−low) − Q(−high), or by symmetry the other tail if both are near 1.
        ends = (high, low) if high > 0 else (-low, -high)
        tails = [mpmath.erfc(z / mpmath.sqrt(2)) / 2 for z in ends]
        return float(mpmath.log(tails[0] - tails[1]))


@pytest.mark.parametrize("std", [0.003, 0.01, 0.2, 3.0])
@pytest.mark.parametrize("mean", [-1.0, -0.98, 0.1, 1.0])
def test_decoder_is_exact_in_the_tails_and_at_both_ends(mean, std):
    levels = [0, 1, 2, 100, 127, 128, 200, 253, 254, 255]
    x = torch.tensor([level / 127.5 - 1 for level in levels], dtype=torch.float64)
    expected = torch.tensor([exact_log_probability(v, mean, std) for v in x.tolist()], dtype=torch.float64)
    actual = discretized_gaussian_log_likelihood(
        x, torch.full_like(x, mean), torch.tensor(2 * math.log(std), dtype=torch.float64)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("std", [1e-3, 0.05, 10.0])
def test_decoder_probabilities_sum_to_one(std):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    logs = discretized_gaussian_log_likelihood(
        x, torch.full_like(x, 0.3), torch.tensor(2 * math.log(std), dtype=torch.float64)
    )
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("ratio", "low", "high"), [(0.5, 2e-4, 1e-3), (1.0, 0, 2e-4), (1.4, 3e-3, 2e-2)])
def test_tanh_decoder_of_published_code_is_near_the_exact_one(ratio, low, high):
    """In bits per pixel, for prediction errors of `ratio` times the standard deviation of the decoder."""
    generator, std, half = torch.Generator().manual_seed(0), 0.01, 1 / 255
    x = torch.randint(1, 255, (100_000,), generator=generator).double() / 127.5 - 1  # without both ends
    mean = x + ratio * std * torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def cdf(z):  # improved-diffusion's approx_standard_normal_cdf
        return (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2

    published = (cdf((x - mean + half) / std) - cdf((x - mean - half) / std)).clamp(min=1e-12).log()
    exact = discretized_gaussian_log_likelihood(x, mean, torch.tensor(2 * math.log(std), dtype=torch.float64))
    assert low <= abs((published - exact).mean().item()) / LOG_2 <= high


# ---------------------------------------------------------------------- Gaussian data, exact denoiser


@pytest.mark.parametrize("kept", [range(1000), range(9, 1000, 10)])
def test_bound_of_gaussian_data_is_its_entropy_with_the_exact_denoiser(kept):
    """The reverse process of Gaussian data is Gaussian, so that the bound with the true variance is tight."""
    mean, std = 0.1, 0.2
    x_0 = pictures(48, 1, 16, 16, mean=mean, std=std)
    chain = gaussian_chain("analytic", std**2).respace(kept)
    bound = variational_bound(chain, gaussian_denoiser(chain, mean, std**2), [x_0[:20], x_0[20:]])
    edges = (np.arange(257) - 128) / 127.5 + 1 / 255
    p = np.diff(norm.cdf(np.r_[-np.inf, edges[1:-1], np.inf], mean, std))
    entropy = -(p * np.log2(p)).sum()
    assert entropy == pytest.approx(math.log2(std * math.sqrt(2 * math.pi * math.e) * 127.5), abs=1e-4)
    assert bound.standard_error < 0.03  # of 6.6
    assert bound.bits_per_dim == pytest.approx(entropy, abs=4 * bound.standard_error)
    assert bound.bits_per_dim == pytest.approx(bound.prior + sum(bound.terms), abs=1e-12)


@pytest.mark.parametrize("kept", [range(1000), range(99, 1000, 100)])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
def test_terms_and_errors_of_gaussian_data_equal_their_closed_form(variance_type, kept):
    """L_t = (β̃/σ² − 1 − ln(β̃/σ²) + (coefficient of x_0)²·Var(x_0 | x_t)/σ²)/2 for exact predictions."""
    mean, variance = -0.2, 0.09
    chain = gaussian_chain(variance_type, variance).respace(kept)
    x_0 = pictures(24, 1, 24, 24, mean=mean, std=variance**0.5)
    bound = variational_bound(chain, gaussian_denoiser(chain, mean, variance), [x_0])
    one_minus, bar = chain.one_minus_alphas_cumprod, chain.alphas_cumprod
    spread = variance * one_minus / (bar * variance + one_minus)  # Var(x_0 | x_t)
    table = {"fixed_small": "posterior_variance", "fixed_large": "betas", "analytic": "analytic_variance"}
    sigma2 = getattr(chain, table[variance_type])[1:]
    ratio = chain.posterior_variance[1:] / sigma2
    expected = (ratio - 1 - ratio.log() + chain.posterior_mean_coef_x_0[1:] ** 2 * spread[1:] / sigma2) / 2 / LOG_2
    terms = torch.tensor(bound.terms, dtype=torch.float64)[1:]
    # 13,824 squared normal deviates have a relative standard error of √(2/13824) = 1.2 %.
    torch.testing.assert_close(terms, expected, rtol=0.08, atol=1e-7)
    assert terms.sum().item() == pytest.approx(expected.sum().item(), rel=0.01)
    x_0_mse = torch.tensor(bound.x_0_mse, dtype=torch.float64)
    torch.testing.assert_close(x_0_mse, spread, rtol=0.08, atol=1e-7)
    epsilon_mse = torch.tensor(bound.epsilon_mse, dtype=torch.float64)
    torch.testing.assert_close(epsilon_mse, spread * bar / one_minus, rtol=0.08, atol=1e-7)
    signal = bar[-1].item()
    second_moment = x_0.square().mean().item()
    assert bound.prior == pytest.approx((-math.log1p(-signal) - signal + signal * second_moment) / 2 / LOG_2, rel=1e-6)


def test_analytic_variance_has_the_lowest_bound():
    x_0 = pictures(16, 1, 16, 16, std=0.3)
    for kept in (range(1000), range(19, 1000, 20)):
        bounds = {}
        for variance_type in ("fixed_small", "fixed_large", "analytic"):
            chain = gaussian_chain(variance_type, 0.09).respace(kept)
            generator = torch.Generator().manual_seed(0)
            bounds[variance_type] = variational_bound(chain, gaussian_denoiser(chain, 0, 0.09), [x_0], generator)
        assert bounds["analytic"].bits_per_dim < min(bounds[n].bits_per_dim for n in ("fixed_small", "fixed_large"))


# ---------------------------------------------------------------------- an independent reference


class Recorder:
    """A fixed random network that records its calls."""

    def __init__(self, channels, doubled, positive):
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(channels * (1 + doubled), channels, generator=generator, dtype=torch.float64)
        self.channels, self.positive, self.seen = channels, positive, []

    def __call__(self, x_t, t):
        output = torch.einsum("oc,bchw->bohw", self.weight.to(x_t.dtype), x_t).tanh()
        if self.positive:
            output = torch.cat([output[:, : self.channels], output[:, self.channels :].exp() * 1e-3], 1)
        self.seen += [(x_t[i].double(), int(t[i]), output[i].double()) for i in range(len(t))]
        return output


def reference_terms(alpha_bars, t_index, prediction_type, variance_type, moment, x_0, x_t, output):
    """L_t of an image in bits/dim, and both squared errors, from the definitions, one number at a time."""
    bar, previous = alpha_bars[t_index], alpha_bars[t_index - 1] if t_index else 1.0
    beta = 1 - bar / previous
    # Eq. 7: precisions add.
    small = 1 / ((1 - beta) / beta + 1 / (1 - previous)) if t_index else None
    if t_index == 0:
        b = 1 - alpha_bars[1] / bar
        small = 1 / ((1 - b) / b + 1 / (1 - bar))
    prediction, extra = output[: len(x_0)], output[len(x_0) :]
    if prediction_type == "epsilon":
        predicted = (x_t - math.sqrt(1 - bar) * prediction) / math.sqrt(bar)
    elif prediction_type == "sample":
        predicted = prediction
    else:
        predicted = math.sqrt(bar) * x_t - math.sqrt(1 - bar) * prediction
    epsilon = (x_t - math.sqrt(bar) * predicted) / math.sqrt(1 - bar)
    noise = (x_t - math.sqrt(bar) * x_0) / math.sqrt(1 - bar)

    def posterior_mean(x):
        return (math.sqrt(previous) * beta * x + math.sqrt(1 - beta) * (1 - previous) * x_t) / (1 - bar)

    if variance_type.startswith("fixed_small"):
        sigma2 = torch.full_like(x_0, small)
    elif variance_type.startswith("fixed_large"):
        sigma2 = torch.full_like(x_0, beta if t_index else small)
    elif variance_type == "analytic":
        own = small if t_index else 0.0
        spread = (1 - bar) / bar * max(0.0, 1 - moment)
        sigma2 = torch.full_like(x_0, own + (math.sqrt(previous) * beta / (1 - bar)) ** 2 * spread)
    elif variance_type == "learned":
        sigma2 = extra
    else:
        v = (extra + 1) / 2
        sigma2 = torch.exp(v * math.log(beta) + (1 - v) * math.log(small))
    p = Normal(posterior_mean(predicted), sigma2.sqrt())
    if t_index:
        nats = kl_divergence(Normal(posterior_mean(x_0), torch.full_like(x_0, math.sqrt(small))), p).mean().item()
    else:
        entries = zip(*(v.flatten().tolist() for v in (x_0, p.mean, p.stddev)))
        nats = -float(np.mean([exact_log_probability(*entry) for entry in entries]))
    errors = (epsilon - noise).square().mean().item(), (predicted - x_0).square().mean().item()
    return nats / LOG_2, *errors


@pytest.mark.parametrize("kept", [range(10), [1, 4, 9]])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_bound_equals_an_independent_float64_reference(variance_type, prediction_type, kept):
    moments = torch.linspace(0.3, 1.05, 10) if variance_type == "analytic" else None
    betas = make_betas("linear", 10, 0.01, 0.3)
    chain = GaussianDiffusion(betas, prediction_type, variance_type, analytic_moments=moments).respace(kept)
    x_0 = pictures(3, 2, 2, 2)
    model = Recorder(2, variance_type in LEARNED_VARIANCES, variance_type == "learned")
    bound = variational_bound(chain, model, [x_0])

    bars = [math.exp(math.fsum(math.log1p(-b) for b in betas.tolist()[: t + 1])) for t in kept]
    totals, by_t = np.zeros(3), np.zeros((3, len(bars)))
    for call, (x_t, told, output) in enumerate(model.seen):
        image, t = call % 3, list(kept).index(told)
        moment = None if moments is None else moments[told].item()
        measured = reference_terms(bars, t, prediction_type, variance_type, moment, x_0[image], x_t, output)
        totals[image] += measured[0]
        by_t[:, t] += np.array(measured) / 3
    end = Normal(math.sqrt(bars[-1]) * x_0, math.sqrt(1 - bars[-1]))
    prior = kl_divergence(end, Normal(torch.zeros_like(x_0), 1.0)).mean((1, 2, 3)).numpy() / LOG_2
    np.testing.assert_allclose([bound.terms, bound.epsilon_mse, bound.x_0_mse], by_t, rtol=1e-8, atol=1e-12)
    assert bound.prior == pytest.approx(prior.mean(), rel=1e-9)
    assert bound.num_images == 3 and bound.timesteps == list(kept)
    assert bound.bits_per_dim == pytest.approx((totals + prior).mean(), rel=1e-9)
    assert bound.standard_error == pytest.approx((totals + prior).std(ddof=1) / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
def test_bound_in_float32_equals_the_bound_in_float64(variance_type):
    chain = gaussian_chain(variance_type, 0.09)
    model = gaussian_denoiser(chain, 0.0, 0.09)
    bounds = []
    for dtype in (torch.float32, torch.float64):
        noise = torch.Generator().manual_seed(0)
        x_0 = pictures(4, 1, 8, 8, dtype=dtype)
        sums = BoundSums(1000)
        generators = [torch.Generator().manual_seed(int(s)) for s in torch.randint(2**31, (4,), generator=noise)]
        sums.add(chain, model, x_0, generators)
        bounds.append(sums.result(chain))
    # The noise differs, because float64 is drawn differently: compare within the standard errors.
    assert abs(bounds[0].bits_per_dim - bounds[1].bits_per_dim) < 4 * math.hypot(*(b.standard_error for b in bounds))
    torch.testing.assert_close(bounds[0].prior, bounds[1].prior, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_eq_15_a_term_is_a_weighted_error_of_the_noise(variance_type):
    chain = GaussianDiffusion(make_betas("linear", 1000), variance_type=variance_type)
    x_0, t = pictures(4, 3, 8, 8), torch.tensor([1, 10, 500, 999])
    noise, predicted = torch.randn(2, *x_0.shape, dtype=x_0.dtype, generator=torch.Generator().manual_seed(0))
    terms, _ = bound_terms(chain, predicted, x_0, chain.q_sample(x_0, t, noise), t)
    small, beta = chain.posterior_variance[t], chain.betas[t]
    variance = small if variance_type == "fixed_small" else beta
    weight = beta.square() / (2 * variance * (1 - beta) * (1 - chain.alphas_cumprod[t]))
    constant = (small / variance - 1 - (small / variance).log()) / 2
    expected = weight * (noise - predicted).square().mean((1, 2, 3)) + constant
    torch.testing.assert_close(terms * LOG_2, expected, rtol=1e-9, atol=0)


def test_eq_15_a_term_is_half_the_loss_of_snr_times_the_error_of_x_0():
    chain = GaussianDiffusion(make_betas("linear", 1000))
    x_0, t = pictures(4, 3, 8, 8), torch.tensor([1, 10, 500, 999])
    noise, output = torch.randn(2, *x_0.shape, dtype=x_0.dtype, generator=torch.Generator().manual_seed(0))
    terms, predicted = bound_terms(chain, output, x_0, chain.q_sample(x_0, t, noise), t)
    snr = chain.alphas_cumprod / (1 - chain.alphas_cumprod)
    expected = (snr[t - 1] - snr[t]) / 2 * (x_0 - predicted).square().mean((1, 2, 3))
    torch.testing.assert_close(terms * LOG_2, expected, rtol=1e-9, atol=0)


def test_eq_17_the_weights_that_l_simple_leaves_out():
    """The numbers of docs/derivation.md."""
    beta, abar = make_betas("linear", 1000), GaussianDiffusion(make_betas("linear", 1000)).alphas_cumprod
    weight = beta / (2 * (1 - beta) * (1 - abar))
    assert weight[0].item() == pytest.approx(0.50, abs=0.005) and weight[9].item() == pytest.approx(0.07, abs=0.005)
    assert weight[99:].max() < 0.011


def test_bound_of_a_shifted_prediction_is_the_kl_and_0_after_clipping():
    """For x_0 = 1 and a prediction of 4, clipping to [-1, 1] makes the prediction perfect."""
    chain = GaussianDiffusion(make_betas("linear", 50, 0.002, 0.4), "sample")
    x_0 = torch.ones(2, 1, 4, 4)
    off = variational_bound(chain, lambda x, t: torch.full_like(x, 4.0), [x_0])
    expected = chain.posterior_mean_coef_x_0[1:].square() * 9 / chain.posterior_variance[1:] / 2 / LOG_2
    torch.testing.assert_close(torch.tensor(off.terms[1:]), expected.float(), rtol=1e-5, atol=0)
    clipped = variational_bound(chain, lambda x, t: torch.full_like(x, 4.0), [x_0], clip=lambda x: x.clamp(-1, 1))
    assert max(clipped.terms[1:]) == 0 and max(clipped.x_0_mse) == 0
    assert clipped.epsilon_mse == pytest.approx(off.epsilon_mse, rel=1e-3)  # of the raw prediction, with other noise


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_decoder_terms_go_from_the_chains_l_0_to_that_of_both_ends(variance_type):
    moments = torch.linspace(0.3, 0.9, 10) if variance_type == "analytic" else None
    betas = make_betas("linear", 10, 0.01, 0.3)
    chain = GaussianDiffusion(betas, variance_type=variance_type, analytic_moments=moments)
    is_learned = variance_type in LEARNED_VARIANCES

    def bound(chain):
        # Noise is drawn at t = 0 first: it is the same for both chains.
        model = Recorder(1, is_learned, positive=is_learned)
        return variational_bound(chain, model, [pictures(3, 1, 4, 4)], torch.Generator().manual_seed(0))

    full, ends = bound(chain), bound(chain.respace([0, 9]))
    if is_learned:
        assert full.decoder_terms == []
    else:
        assert len(full.decoder_terms) == DECODER_VARIANCES and full.decoder_terms[0] == pytest.approx(full.terms[0])
        assert full.decoder_terms[-1] == pytest.approx(ends.terms[0])
        assert (ends.terms[0] == full.terms[0]) == (variance_type == "analytic")


# ---------------------------------------------------------------------- strides and processes


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_bound_with_stride_has_the_expectation_of_the_full_sum(stride):
    """With a perfect prediction no term depends on the noise, so that the two agree exactly."""
    chain = GaussianDiffusion(make_betas("linear", 30, 0.001, 0.5), "sample", "fixed_large")
    x_0 = torch.full((2 * stride, 1, 2, 2), 51 / 127.5 - 1, dtype=torch.float64)
    calls = []

    def model(x_t, t):
        calls.append(len(t))
        return torch.full_like(x_t, 51 / 127.5 - 1)

    whole = variational_bound(chain, model, [x_0])
    whole_calls = sum(calls)
    calls.clear()
    part = variational_bound(chain, model, [x_0], stride=stride)
    assert part.bits_per_dim == pytest.approx(whole.bits_per_dim, rel=1e-12)
    assert part.terms == pytest.approx(whole.terms, rel=1e-12) and part.standard_error == pytest.approx(0, abs=1e-7)
    assert whole_calls == 30 * 2 * stride and sum(calls) == 29 * 2 + 2 * stride


def test_standard_error_is_the_spread_of_repetitions():
    chain = gaussian_chain("fixed_small", 0.09).respace(range(99, 1000, 100))
    model = gaussian_denoiser(chain, 0, 0.09)
    for stride in (1, 3):
        bounds = [variational_bound(chain, model, [pictures(24, 1, 4, 4, seed=s)], stride=stride) for s in range(150)]
        spread = np.std([b.bits_per_dim for b in bounds], ddof=1)
        assert np.mean([b.standard_error for b in bounds]) == pytest.approx(spread, rel=0.25)


def test_sums_of_several_processes_add_up_to_those_of_one():
    chain = GaussianDiffusion(make_betas("linear", 12, 0.01, 0.4))
    x_0 = pictures(7, 1, 4, 4, dtype=torch.float32)
    offsets = torch.arange(7) % 3

    def add(sums, indices):
        generators = [torch.Generator().manual_seed(i) for i in indices]
        sums.add(chain, lambda x, t: 0.3 * x, x_0[indices], generators, offsets[indices])

    alone, shares = BoundSums(12, 3), [BoundSums(12, 3), BoundSums(12, 3)]
    add(alone, [0, 1, 2, 3, 4, 5, 6])
    add(shares[0], [0, 2, 4, 6])
    add(shares[1], [1, 3])
    add(shares[1], [5])
    torch.testing.assert_close(shares[0].values + shares[1].values, alone.values, rtol=1e-6, atol=1e-9)
    assert alone.result(chain).num_images == 7


def test_bound_of_a_diffusers_network_on_scheduler_chains(unet_config, scheduler_config):
    unet = UNet2DModel(**unet_config).eval()
    for parameter in unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    diffusion = DDPMSchedulerCustom(**scheduler_config).diffusion
    x_0 = pictures(2, 3, 8, 8, dtype=torch.float32)
    for chain in (diffusion, diffusion.respace([4, 9, 14, 19])):
        bound = variational_bound(chain, lambda x, t: unet(x, t).sample, [x_0])
        assert len(bound.terms) == len(chain) and 0 < bound.bits_per_dim < 100
        # v = 0 means x_0 = √ᾱ·x_t, which is nearly 0 at the end.
        assert bound.x_0_mse[-1] == pytest.approx(x_0.square().mean().item(), rel=0.05)


def test_prior_term_is_0_for_zero_terminal_snr():
    betas = rescale_zero_terminal_snr(make_betas("linear", 20))
    chain = GaussianDiffusion(betas, "v_prediction")
    assert prior_bits(chain, pictures(3, 1, 4, 4)).abs().max() == 0
    assert variational_bound(chain, lambda x, t: x, [pictures(2, 1, 4, 4)]).bits_per_dim > 0


# ---------------------------------------------------------------------- errors


CHAIN = GaussianDiffusion(make_betas("linear", 10))


@pytest.mark.parametrize(
    ("x_0", "options", "message"),
    [
        (torch.rand(4, 1, 2, 2), {}, "x_0 must be 8-bit images"),
        (torch.full((4, 1, 2, 2), 1 + 2 / 127.5), {}, "x_0 must be 8-bit images"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), {}, "float32 or float64, got .* torch.uint8"),
        (torch.ones(2, 2), {}, r"images \(B, C, H, W\)"),
        (torch.ones(4, 1, 2, 2), {"stride": 0}, r"stride must be an integer in 1..9, .*got 0"),
        (torch.ones(4, 1, 2, 2), {"stride": 10}, "stride must be an integer in 1..9, .*got 10"),
        (torch.ones(5, 1, 2, 2), {"stride": 3}, "at least 6 in all; got 5"),
        (torch.ones(1, 1, 2, 2), {}, "at least 2 in all; got 1"),
    ],
)
def test_images_and_strides_without_a_bound_are_refused(x_0, options, message):
    with pytest.raises(ValueError, match=message):
        variational_bound(CHAIN, lambda x, t: 0 * x, [x_0], **options)


def test_arguments_that_do_not_match_are_refused():
    x_0 = torch.ones(3, 1, 2, 2)
    with pytest.raises(ValueError, match="must have 10 steps, the T of these sums, got 3"):
        BoundSums(10).add(CHAIN.respace([1, 2, 3]), lambda x, t: x, x_0)
    with pytest.raises(ValueError, match=r"generator must be one, or 3 \(one per image\), got 1"):
        BoundSums(10).add(CHAIN, lambda x, t: x, x_0, [torch.Generator()])
    with pytest.raises(ValueError, match=r"offsets must be 3 integers in 0..1, got \[0, 1, 2\]"):
        BoundSums(10, 2).add(CHAIN, lambda x, t: x, x_0, offsets=torch.arange(3))


def test_output_that_is_not_finite_is_refused_with_its_timestep():
    def model(x_t, t):
        return torch.where((t >= 7)[:, None, None, None], torch.nan, x_t)

    with pytest.raises(ValueError, match="at 3 of 10 timesteps, the first of them 7"):
        variational_bound(CHAIN, model, [torch.ones(2, 1, 2, 2)])


def test_labels_stay_with_their_images_at_every_timestep():
    chain, x_0 = gaussian_chain("fixed_small", 0.09, T=20), pictures(6, 1, 4, 4)
    offsets, labels = torch.tensor([0, 1, 2, 2, 1, 0]), torch.arange(6)

    def sums(model, *rows, **told):
        whole = BoundSums(len(chain), 3)
        for r in rows:
            noise = [torch.Generator().manual_seed(i) for i in r]
            whole.add(chain, model, x_0[r], noise, offsets[r], **{k: v[r] for k, v in told.items()})
        return whole.values

    # One image at a time, with its label as a constant.
    apart = sum(sums(lambda x, t, i=i: x * i, [i]) for i in range(6))
    together = sums(lambda x, t, told: x * told[:, None, None, None], [0, 1, 2, 3], [4, 5], labels=labels)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
