"""Analytic-DPM against closed forms for Gaussian data."""

import pytest
import torch

from ddpm_hf.diffusion.analytic import estimate_analytic_moments
from ddpm_hf.diffusion.gaussian import PREDICTION_TYPES, GaussianDiffusion
from ddpm_hf.diffusion.schedules import make_betas
from tests.diffusion.helpers import T, gaussian_denoiser, gaussian_moments, linear_chain


def test_analytic_variance_is_the_true_reverse_variance_of_gaussian_data():
    """For data N(m, s²) the reverse step is Gaussian, with Var(x_{t−1}|x_t) = 1/(α_t/β_t + 1/Var(x_{t−1}))."""
    s2 = 0.3
    diffusion = linear_chain()
    chain = linear_chain(variance_type="analytic", analytic_moments=gaussian_moments(diffusion, s2))
    for sub in (chain, chain.respace([0, 100, 350, 999]), chain.respace(range(10, 1000, 90))):
        marginal = torch.cat([torch.tensor([s2]).double(), sub.alphas_cumprod * s2 + sub.one_minus_alphas_cumprod])
        exact = 1 / (sub.alphas / sub.betas + 1 / marginal[:-1])
        torch.testing.assert_close(sub.analytic_variance, exact, rtol=1e-9, atol=0)


def test_analytic_variance_lies_between_its_two_bounds():
    """Analytic-DPM, theorem 2: Γ = 1 (x_0 is known) gives β̃_t, data of unit variance give β_t."""
    diffusion = linear_chain()
    certain = linear_chain(variance_type="analytic", analytic_moments=torch.ones(T))
    torch.testing.assert_close(certain.analytic_variance, diffusion.posterior_variance)
    unit = linear_chain(variance_type="analytic", analytic_moments=gaussian_moments(diffusion, 1.0))
    torch.testing.assert_close(unit.analytic_variance, diffusion.betas, rtol=1e-9, atol=0)
    above = linear_chain(variance_type="analytic", analytic_moments=torch.full((T,), 1.02))
    torch.testing.assert_close(above.analytic_variance, diffusion.posterior_variance)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("doubled_channels", [False, True])
def test_estimated_moments_are_those_of_the_closed_form(prediction_type, doubled_channels):
    T, mean, variance = 20, 0.3, 0.25
    diffusion = GaussianDiffusion(make_betas("squaredcos_cap_v2", T), prediction_type)
    noise_model = gaussian_denoiser(diffusion, mean, variance)
    told = []

    def model(x_t, t):
        assert t.shape == (x_t.shape[0],) and t.dtype == torch.int64
        told.append(int(t[0]))
        output = diffusion.convert(noise_model(x_t, t), x_t, t, "epsilon", prediction_type)
        return torch.cat([output, 7 * output], 1) if doubled_channels else output

    generator = torch.Generator().manual_seed(0)
    # Batches of different sizes: each image counts once.
    batches = [mean + variance**0.5 * torch.randn(b, 3, 32, 32, generator=generator) for b in (10, 2)]
    moments = estimate_analytic_moments(diffusion, model, batches, generator)
    assert moments.dtype == torch.float64 and told == [*range(T)] * 2
    # A mean of ε² over 36,864 pixels has a relative standard error of √(2/36864) = 0.7 %.
    torch.testing.assert_close(moments, gaussian_moments(diffusion, variance), rtol=0.035, atol=0)


def test_moments_are_estimated_at_the_timesteps_of_a_sub_chain():
    diffusion = linear_chain().respace([10, 500, 990])
    told = []
    estimate_analytic_moments(diffusion, lambda x, t: told.append(int(t[0])) or x, [torch.zeros(1, 1, 4, 4)])
    assert told == [10, 500, 990]


def test_moments_without_images_are_refused():
    with pytest.raises(ValueError, match="batches"):
        estimate_analytic_moments(linear_chain(10), lambda x, t: x, [])


def test_analytic_variance_is_refused_at_zero_terminal_snr():
    with pytest.raises(ValueError, match="variance_type='analytic'.*zero terminal SNR"):
        GaussianDiffusion(make_betas("jsd", 10), "v_prediction", "analytic", analytic_moments=[0.5] * 10)
