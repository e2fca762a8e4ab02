"""The search against all subsets, and predicted bounds against measured ones and closed forms."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from ddpm_hf.diffusion.gaussian import FIXED_VARIANCES, LEARNED_VARIANCES, GaussianDiffusion
from ddpm_hf.diffusion.likelihood import VariationalBound
from ddpm_hf.diffusion.schedules import make_betas, rescale_zero_terminal_snr
from ddpm_hf.diffusion.timestep_search import best_timesteps, jump_costs, predicted_bound
from ddpm_hf.diffusion.timesteps import spaced_timesteps
from tests.diffusion.helpers import gaussian_moments, linear_chain, variational_bound


def short_chain(variance_type="fixed_small", moments=None, betas=None) -> GaussianDiffusion:
    """T = 9, for a network that predicts x_0."""
    betas = make_betas("linear", 9, 0.001, 0.5) if betas is None else betas
    if variance_type == "analytic" and moments is None:
        moments = torch.linspace(0.5, 0.9, len(betas))
    return GaussianDiffusion(betas, "sample", variance_type, analytic_moments=moments)


def measured(chain, errors=None, level=51) -> VariationalBound:
    """The bound of a network whose prediction of x_0 is too large by `errors` (T of the full chain,) whatever the noise.

    All terms are then exact: none depends on a random number.
    """
    errors = 0.02 * 1.6 ** torch.arange(9, dtype=torch.float64) if errors is None else errors
    x_0 = torch.full((2, 1, 2, 2), level / 127.5 - 1, dtype=torch.float64)
    return variational_bound(chain, lambda x_t, t: x_0[: len(t)] + errors[t][:, None, None, None], [x_0])


def gaussian_bound(chain, variance) -> VariationalBound:
    """The bound of the exact denoiser of data N(0, variance) with L_T = 1 and L_0 = 2, in closed form."""
    one_minus, bar = chain.one_minus_alphas_cumprod, chain.alphas_cumprod
    spread = variance * one_minus / (bar * variance + one_minus)  # Var(x_0 | x_t)
    timesteps = chain.timesteps.tolist()
    return VariationalBound(100, 1, 0.0, 0.0, 1.0, timesteps, [2.0] * len(chain), [], spread.tolist(), [2.0] * 5)


@pytest.mark.parametrize("kept", [range(9), [0, 8], [0, 1, 8], [0, 4, 8], [0, 2, 3, 7, 8]])
@pytest.mark.parametrize("variance_type", FIXED_VARIANCES)
def test_predicted_bound_is_the_measured_bound_of_the_sub_chain(variance_type, kept):
    chain = short_chain(variance_type)
    costs = jump_costs(chain, measured(chain))
    predicted = predicted_bound(costs, list(kept)[::-1])
    assert predicted == pytest.approx(measured(chain.respace(kept)).bits_per_dim, abs=1e-4)


@pytest.mark.parametrize("level", [0, 51, 254])
@pytest.mark.parametrize("error", [0.0, 0.01, 0.1, 0.3])
def test_decoder_is_predicted_for_every_last_jump(level, error):
    """Also at the lowest level, whose probability includes the tail. The standard deviation is 0.02 to 0.03."""
    chain, errors = short_chain(), torch.full((9,), error, dtype=torch.float64)
    costs = jump_costs(chain, measured(chain, errors, level))
    for t in range(1, 8):
        expected = measured(chain.respace([0, t, 8]), errors, level).bits_per_dim
        assert predicted_bound(costs, [8, t, 0]) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_decoder_is_predicted_where_the_analytic_variance_is_clamped():
    """A moment of 1 or more at index 0 leaves no variance of its own there: β̃ of the last jump takes its place."""
    chain = short_chain("analytic", torch.tensor([1.1, *[0.8] * 8]))
    costs = jump_costs(chain, measured(chain))
    for kept in ([0, 1, 8], [0, 5, 8]):
        measured_bound = measured(chain.respace(kept)).bits_per_dim
        assert predicted_bound(costs, kept[::-1]) == pytest.approx(measured_bound, abs=1e-4)


def test_predicted_bound_holds_for_zero_terminal_snr():
    chain = short_chain(betas=rescale_zero_terminal_snr(make_betas("linear", 9, 0.001, 0.5)))
    costs = jump_costs(chain, measured(chain))
    for kept in ([0, 8], [0, 3, 6, 8]):
        assert predicted_bound(costs, kept[::-1]) == pytest.approx(measured(chain.respace(kept)).bits_per_dim, abs=1e-4)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
def test_costs_of_gaussian_data_are_the_closed_form_of_the_sub_chain(variance_type):
    variance, kept = 0.09, [0, 1, 3, 10, 40, 150, 400, 999]
    moments = gaussian_moments(linear_chain(), variance) if variance_type == "analytic" else None
    full = linear_chain(variance_type=variance_type, analytic_moments=moments)
    costs, chain = jump_costs(full, gaussian_bound(full, variance)), full.respace(kept)
    one_minus, bar = chain.one_minus_alphas_cumprod, chain.alphas_cumprod
    spread = variance * one_minus / (bar * variance + one_minus)
    table = {"fixed_small": "posterior_variance", "fixed_large": "betas", "analytic": "analytic_variance"}
    sigma2 = getattr(chain, table[variance_type])[1:]
    ratio = chain.posterior_variance[1:] / sigma2
    nats = (ratio - 1 - ratio.log() + chain.posterior_mean_coef_x_0[1:] ** 2 * spread[1:] / sigma2) / 2
    expected = nats / torch.tensor(2.0, dtype=torch.float64).log()
    expected[0] += 2  # L_0
    expected[-1] += 1  # L_T
    torch.testing.assert_close(costs[kept[1:], kept[:-1]], expected, rtol=1e-9, atol=1e-12)


def test_every_chain_is_equally_good_for_gaussian_data_and_true_variance():
    """The reverse process of Gaussian data is Gaussian: with its variance the bound is tight, however long the jumps."""
    full = linear_chain(variance_type="analytic", analytic_moments=gaussian_moments(linear_chain(), 0.09))
    costs = jump_costs(full, gaussian_bound(full, 0.09))
    whole = predicted_bound(costs, range(999, -1, -1))
    for timesteps in ([999, 0], [999, 500, 0], best_timesteps(costs, 20)):
        assert predicted_bound(costs, timesteps) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
def test_best_timesteps_are_the_best_of_all_subsets(variance_type):
    chain = short_chain(variance_type)
    errors = 0.02 * 1.6 ** torch.arange(9, dtype=torch.float64) * torch.tensor([1, 2, 1, 1, 3, 1, 2, 1, 1])
    costs = jump_costs(chain, measured(chain, errors))
    for steps in range(2, 10):
        subsets = ([8, *middle, 0] for middle in combinations(range(7, 0, -1), steps - 2))
        assert best_timesteps(costs, steps) == min(subsets, key=lambda timesteps: predicted_bound(costs, timesteps))


def test_all_timesteps_give_the_full_chains_bound():
    chain = short_chain()
    bound = measured(chain)
    costs = jump_costs(chain, bound)
    assert best_timesteps(costs, 9) == list(range(8, -1, -1))
    assert predicted_bound(costs, range(8, -1, -1)) == pytest.approx(bound.bits_per_dim, rel=1e-9)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_best_timesteps_beat_even_spacing_and_improve_with_their_number(variance_type):
    chain = linear_chain(variance_type=variance_type)
    costs, best = jump_costs(chain, gaussian_bound(chain, 0.09)), []
    for steps in (2, 5, 10, 50, 200):
        timesteps = best_timesteps(costs, steps)
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] == 0
        assert chain.respace(timesteps).timesteps.flip(0).tolist() == timesteps  # a strictly descending list
        best.append(predicted_bound(costs, timesteps))
        even = predicted_bound(costs, spaced_timesteps(1000, steps, "linspace"))
        assert best[-1] < even if steps > 2 else best[-1] == even
    assert best == sorted(best, reverse=True)


@pytest.mark.parametrize("variance_type", LEARNED_VARIANCES)
def test_learned_variance_is_refused_with_the_reason(variance_type):
    chain = linear_chain(T=9, variance_type=variance_type)
    with pytest.raises(ValueError, match=f"variance_type must be one of .*got '{variance_type}': the network learned"):
        jump_costs(chain, measured(short_chain()))


def test_bound_of_another_chain_is_refused():
    chain = short_chain()
    for other in (measured(chain.respace([0, 3, 8])), replace(measured(chain), decoder_terms=[])):
        with pytest.raises(ValueError, match="bound must be measured on diffusion, a chain of 9 steps, got"):
            jump_costs(chain, other)


@pytest.mark.parametrize("steps", [1, 10, 2.0])
def test_number_of_steps_outside_the_chain_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be an integer in 2..9, both ends are kept, got {steps}"):
        best_timesteps(jump_costs(short_chain(), measured(short_chain())), steps)


@pytest.mark.parametrize("timesteps", [[8, 3], [7, 0], [8, 3, 3, 0], [0, 8], [8]])
def test_timesteps_without_both_ends_in_order_are_refused(timesteps):
    costs = jump_costs(short_chain(), measured(short_chain()))
    with pytest.raises(ValueError, match="timesteps must descend from T - 1 = 8 to 0, got "):
        predicted_bound(costs, timesteps)
