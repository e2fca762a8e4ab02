"""The timesteps of fewer sampling steps that give the best likelihood (Watson et al. 2021).

The bound of a sub-chain T−1 = t_k > … > t_1 = 0 is a sum of one term for each jump from a timestep to the next lower one, and
a term depends on no other timestep. With a fixed variance it depends on the network only through its mean squared error
of x_0, which the bound of the full chain has measured at every timestep. Hence the terms of all jumps are known after
one measurement, and the best timesteps are the shortest path from T−1 to 0 in k − 1 jumps.

Measured errors are noisy, and a search prefers jumps whose error came out too low: the predicted bound of the chosen
timesteps is too optimistic on the images of the search. Predict it from the bound of other images, or measure it with
`GaussianDiffusion.respace` and `likelihood.BoundSums`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_hf.checks import check_int
from ddpm_hf.diffusion.gaussian import FIXED_VARIANCES, GaussianDiffusion
from ddpm_hf.diffusion.likelihood import VariationalBound, decoder_log_variances, gaussian_kl
from ddpm_hf.diffusion.timesteps import as_timesteps


def jump_costs(diffusion: GaussianDiffusion, bound: VariationalBound) -> Tensor:
    """The terms of the bounds of all sub-chains with both ends, in bits/dim: float64 (T, T) on the CPU.

    Entry (t, s) with t > s is KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)), in nats (β̃/σ² − 1 − ln(β̃/σ²) + c²·mse_t/σ²)/2, where
    β̃, σ² and the coefficient c of x_0 are those of a chain with the step t → s (DDPM, eqs. 5 to 7). All other entries are
    infinite. Row T−1 includes the prior L_T and column 0 the decoder L_0, so that a bound is the sum of its jumps.

    Args:
        diffusion: a chain with a fixed variance (`FIXED_VARIANCES`).
        bound: measured on this chain. L_0 depends on the last jump through its variance, and is interpolated between
            `bound.decoder_terms`, with an error below 1e-4 bits/dim.

    Raises ValueError for a learned variance, and for a bound of another chain.
    """
    if diffusion.variance_type not in FIXED_VARIANCES:
        raise ValueError(
            f"variance_type must be one of {list(FIXED_VARIANCES)}, got {diffusion.variance_type!r}: the network learned its "
            "variance for steps of the full chain, and the terms of longer jumps do not follow from the measured ones."
        )
    if bound.timesteps != diffusion.timesteps.tolist() or not bound.decoder_terms:
        raise ValueError(
            f"bound must be measured on diffusion, a chain of {len(diffusion)} steps, got one of {len(bound.timesteps)} "
            f"steps with {len(bound.decoder_terms)} decoder_terms."
        )
    betas, small, coefficient = _jumps(diffusion)
    variance = {"fixed_small": small, "fixed_large": betas}.get(diffusion.variance_type.removesuffix("_log"))
    if variance is None:  # analytic
        variance = small + coefficient.square() * diffusion.x_0_variance[:, None]
    error = torch.tensor(bound.x_0_mse, dtype=torch.float64).sqrt()[:, None]
    nats = gaussian_kl(coefficient * error, small.log(), torch.zeros_like(small), variance.log())
    is_jump = torch.ones_like(nats).tril(-1).bool()
    costs = torch.where(is_jump, nats / math.log(2), torch.inf)
    costs[-1] += bound.prior
    costs[:, 0] += _decoder_by_last_jump(diffusion, bound, small[:, 0].log())
    return costs


def _jumps(diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    """β, β̃ and the coefficient of x_0 in μ̃ of the step t → s, each (T, T); only entries with t > s have a meaning."""
    log_bar = diffusion.log_alphas.cumsum(0)
    one_minus = diffusion.one_minus_alphas_cumprod
    betas = -torch.expm1(log_bar[:, None] - log_bar)
    return betas, one_minus / one_minus[:, None] * betas, diffusion.sqrt_alphas_cumprod * betas / one_minus[:, None]


def _decoder_by_last_jump(diffusion: GaussianDiffusion, bound: VariationalBound, log_small: Tensor) -> Tensor:
    """L_0 in bits/dim of a chain whose last jump is t → 0, (T,). `log_small`: log β̃ of that jump, (T,)."""
    if diffusion.variance_type == "analytic" and diffusion.analytic_variance[0] > 0:
        return torch.full_like(log_small, bound.terms[0])  # β̃ is 0 at index 0: the variance is that of x_0 alone
    nodes = decoder_log_variances(diffusion)
    powers = len(nodes)
    low, span = nodes[0], (nodes[-1] - nodes[0]).clamp(min=torch.finfo(torch.float64).tiny)
    terms = torch.tensor(bound.decoder_terms, dtype=torch.float64)
    polynomial = torch.linalg.solve(torch.linalg.vander((nodes - low) / span), terms)
    return torch.linalg.vander((log_small - low) / span, N=powers) @ polynomial


def best_timesteps(costs: Tensor, steps: int) -> list[int]:
    """The `steps` timesteps with the least bound (Watson et al. 2021), descending, from T−1 to 0.

    This is the form that `pipe(timesteps=...)` takes. Computed by dynamic programming in O(steps·T²).

    Args:
        costs: of `jump_costs`, (T, T).
        steps: in 2..T.
    """
    T = len(costs)
    check_int("steps", steps, 2, T, "both ends are kept")
    rest, followers = costs[:, 0], []  # the least bound from each t down to x_0 in a given number of jumps
    for _ in range(steps - 2):
        rest, follower = (costs[:, 1:] + rest[1:]).min(1)
        followers.append((follower + 1).tolist())
    timesteps = [T - 1]
    for follower in reversed(followers):
        timesteps.append(follower[timesteps[-1]])
    return [*timesteps, 0]


def predicted_bound(costs: Tensor, timesteps: Sequence[int] | Tensor) -> float:
    """The bound of the sub-chain of these timesteps in bits/dim.

    Args:
        costs: of `jump_costs`, (T, T).
        timesteps: descending, from T−1 to 0. Raises ValueError for others.
    """
    chosen, T = as_timesteps(timesteps), len(costs)
    if chosen[0] != T - 1 or chosen[-1] != 0 or (chosen.diff() >= 0).any():
        raise ValueError(f"timesteps must descend from T - 1 = {T - 1} to 0, got {timesteps!r}.")
    return costs[chosen[:-1], chosen[1:]].sum().item()
