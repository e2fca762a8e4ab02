"""Objectives against the papers' formulas, written out in float64 and differentiated by autograd."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_hf import DDPMSchedulerCustom, GaussianDiffusion
from ddpm_hf.diffusion.gaussian import PREDICTION_TYPES
from ddpm_hf.diffusion.likelihood import bound_terms
from ddpm_hf.diffusion.losses import Objective, prediction_target
from tests.diffusion.helpers import variational_bound

each_target = pytest.mark.parametrize("target", PREDICTION_TYPES)


class Constant(torch.nn.Module):
    """A network that always gives the same image."""

    def __init__(self, output):
        super().__init__()
        self.output = torch.nn.Parameter(output)

    def forward(self, x_t, t, class_labels=None, return_dict=True):
        return (self.output.expand_as(x_t),)


class Small(torch.nn.Module):
    """A network of a few parameters that depends on both x_t and t."""

    def __init__(self, channels, out_channels, T):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, out_channels, 3, padding=1)
        self.at_t = torch.nn.Embedding(T, out_channels)

    def forward(self, x_t, t, class_labels=None, return_dict=True):
        return ((self.conv(x_t) + self.at_t(t)[:, :, None, None]).tanh(),)


@each_target
def test_loss_is_0_at_the_target_and_d_squared_at_distance_d(target):
    diffusion = DDPMSchedulerCustom(prediction_type=target).diffusion
    x_0, noise = torch.randn(2, 4, 3, 8, 8).unbind()
    t = torch.tensor([0, 10, 500, 999])
    goal = prediction_target(diffusion, x_0, t, noise)
    assert Objective()(Constant(goal), diffusion, x_0, t, noise).objective.abs().max() == 0
    loss = Objective()(Constant(goal + 0.5), diffusion, x_0, t, noise).objective
    torch.testing.assert_close(loss, torch.full((4,), 0.25))


@each_target
def test_target_converts_back_to_x_0(target):
    diffusion = DDPMSchedulerCustom(prediction_type=target).diffusion
    x_0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64).unbind()
    t = torch.tensor([1, 300, 999])
    x_t = diffusion.q_sample(x_0, t, noise)
    goal = prediction_target(diffusion, x_0, t, noise)
    torch.testing.assert_close(diffusion.predict_x_0(goal, x_t, t), x_0, rtol=1e-9, atol=1e-9)


def test_loss_of_a_bf16_network_is_float32():
    diffusion = DDPMSchedulerCustom().diffusion
    x_0, noise = torch.randn(2, 2, 1, 4, 4).unbind()
    network = Constant(torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16))
    loss = Objective()(network, diffusion, x_0, torch.tensor([5, 6]), noise).objective
    torch.testing.assert_close(loss, noise.square().flatten(1).mean(1))


# ------------------------------------------------------------------ the float64 reference

T = 12
BETAS = torch.linspace(0.02, 0.4, T, dtype=torch.float64)
OPTIONS = {"min_snr_gamma": 1.5, "p2_k": 0.7, "p2_gamma": 1.3, "hybrid_lambda": 0.02}


def reference(network, target, variance, weighting, x, t, z) -> torch.Tensor:
    """The objective of one example at one t, from the papers' formulas."""
    abar = torch.cumprod(1 - BETAS, 0)
    a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
    x_t = a * x + b * z
    output = network(x_t[None], torch.tensor([t]))[0][0]
    prediction, v_output = output[: len(x)], output[len(x) :]
    goal = {"epsilon": z, "sample": x, "v_prediction": a * z - b * x}[target]
    error = (goal - prediction).square().mean()
    snr = abar[t] / (1 - abar[t])
    if weighting == "vlb":
        loss = T * reference_bits(target, variance, x, t, x_t, prediction, v_output)
    elif weighting == "min_snr":  # stated for the error of x_0
        x_0_error = error * {"epsilon": b**2 / a**2, "sample": 1.0, "v_prediction": b**2}[target]
        loss = snr.clamp(max=OPTIONS["min_snr_gamma"]) * x_0_error
    elif weighting == "p2":  # stated for the error of ε
        epsilon_error = error * {"epsilon": 1.0, "sample": a**2 / b**2, "v_prediction": a**2}[target]
        loss = epsilon_error / (OPTIONS["p2_k"] + snr) ** OPTIONS["p2_gamma"]
    else:
        loss = error
    if variance == "learned_range" and weighting != "vlb":
        bits = reference_bits(target, variance, x, t, x_t, prediction.detach(), v_output)
        loss = loss + OPTIONS["hybrid_lambda"] * T * bits
    return loss


def reference_bits(target, variance, x, t, x_t, prediction, v_output) -> torch.Tensor:
    """The variational bound's term at t."""
    abar, beta = torch.cumprod(1 - BETAS, 0), BETAS[t]
    a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
    if target == "epsilon":
        epsilon = prediction
    else:
        epsilon = (x_t - a * prediction) / b if target == "sample" else a * prediction + b * x_t
    mean = (x_t - beta / b * epsilon) / (1 - beta).sqrt()  # DDPM, eq. 11
    s = max(t, 1)  # β̃ of index 0 is 0: index 1 is used
    small = (1 - abar[s - 1]) / (1 - abar[s]) * BETAS[s]
    large = beta if t or variance == "learned_range" else small
    share = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": (v_output + 1) / 2}[variance]
    std = torch.exp((share * large.log() + (1 - share) * small.log()) / 2)  # Improved DDPM, eq. 15
    if t:
        true_mean = (abar[t - 1].sqrt() * beta * x + (1 - beta).sqrt() * (1 - abar[t - 1]) * x_t) / (1 - abar[t])
        nats = kl_divergence(Normal(true_mean, small.sqrt()), Normal(mean, std))
    else:
        centered, half = x - mean, 1 / 255
        inside = phi((half - centered.abs()) / std) - phi((-half - centered.abs()) / std)
        at_ends = torch.where(x > 0, phi((half - centered) / std), phi((half + centered) / std))
        nats = -torch.where(x.abs() > 0.999, at_ends, inside).log()
    return nats.mean() / math.log(2)


def phi(z):
    """The normal distribution function, exact far below the mean."""
    return torch.erfc(-z / 2**0.5) / 2


def batch(dtype=torch.float64):
    """8-bit images that contain both outer levels, timesteps of which some are 0, and noise."""
    levels = torch.randint(256, (8, 2, 6, 6))
    levels[:, :, 0], levels[:, :, 1] = 0, 255
    return (levels / 127.5 - 1).to(dtype), torch.tensor([0, 1, 0, 5, 11, 8, 2, 0]), torch.randn(8, 2, 6, 6, dtype=dtype)


def gradients(network, losses):
    return torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses), list(network.parameters()))])


@each_target
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr", "p2", "vlb"])
def test_objectives_and_gradients_equal_the_papers_formulas(target, variance, weighting):
    diffusion = GaussianDiffusion(BETAS, target, variance)
    network = Small(2, 4 if variance == "learned_range" else 2, T).double()
    x_0, t, noise = batch()
    expected = [reference(network, target, variance, weighting, *row) for row in zip(x_0, t.tolist(), noise)]
    objective = Objective(weighting, **OPTIONS)
    losses = objective(network, diffusion, x_0, t, noise).objective
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-9)
    expected = gradients(network, expected)
    torch.testing.assert_close(gradients(network, losses), expected, rtol=1e-8, atol=1e-8)

    network.float()
    losses = objective(network, diffusion, x_0.float(), t, noise.float()).objective
    assert losses.dtype == torch.float32
    assert (gradients(network, losses) - expected).norm() < 1e-4 * expected.norm()


@each_target
def test_min_snr_loss_does_not_depend_on_the_prediction_type(target):
    """Predictions that convert to the same x_0 have the same loss."""
    x_0, t, noise = batch()
    guess = torch.randn_like(x_0)
    losses = []
    for kind in (target, "sample"):
        diffusion = GaussianDiffusion(BETAS, kind)
        x_t = diffusion.q_sample(x_0, t, noise)
        output = Constant(diffusion.convert(guess, x_t, t, "sample", kind))
        losses.append(Objective("min_snr")(output, diffusion, x_0, t, noise).objective)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_hybrid_loss_trains_the_variance_by_the_bound_only():
    diffusion = GaussianDiffusion(BETAS, variance_type="learned_range")
    x_0, t, noise = batch()
    network = Constant(torch.randn(8, 4, 6, 6, dtype=torch.float64))
    network.forward = lambda x_t, t, class_labels=None, return_dict=True: (network.output,)
    loss = Objective(hybrid_lambda=0.5)(network, diffusion, x_0, t, noise)
    (hybrid,) = torch.autograd.grad(loss.objective.sum(), network.output, retain_graph=True)
    (simple,) = torch.autograd.grad(loss.simple.sum(), network.output)
    assert torch.equal(hybrid[:, :2], simple[:, :2])
    assert simple[:, 2:].abs().max() == 0 and (hybrid[:, 2:] != 0).all()


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_bound_terms_equal_those_of_the_evaluation(variance):
    """`BoundSums` evaluates timestep by timestep, training a batch of them."""
    diffusion = GaussianDiffusion(BETAS, variance_type=variance)
    network = Small(2, 4 if variance == "learned_range" else 2, T).double().requires_grad_(False)
    x_0, _, _ = batch()
    bound = variational_bound(
        diffusion, lambda x, t: network(x, t)[0], [x_0], torch.Generator().manual_seed(7), clip=None
    )
    generator = torch.Generator().manual_seed(7)
    for index in range(T):
        t = torch.full((8,), index)
        x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator, dtype=torch.float64))
        terms, _ = bound_terms(diffusion, network(x_t, t)[0], x_0, x_t, t)
        assert terms.mean().item() == pytest.approx(bound.terms[index], rel=1e-9)


def test_gradients_of_the_bound_are_finite_far_from_the_image():
    """A difference of float32 probabilities would be 0 there, its logarithm −∞ and the gradient NaN."""
    for scheduler in (
        DDPMSchedulerCustom(variance_type="learned_range", prediction_type="sample"),
        DDPMSchedulerCustom(4000, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
    ):
        x_0, _, noise = batch(torch.float32)
        T = len(scheduler)
        t = torch.tensor([0, 1, 2, T // 4, T // 2, T - 3, T - 2, T - 1])
        output = torch.zeros(8, 4, 6, 6, requires_grad=True)
        losses, _ = bound_terms(scheduler.diffusion, output, x_0, scheduler.diffusion.q_sample(x_0, t, noise), t)
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        assert losses.isfinite().all() and gradient.isfinite().all()
        assert (gradient[0] != 0).all()


def test_p2_weight_is_1_for_gamma_0_and_falls_with_the_snr():
    diffusion = DDPMSchedulerCustom().diffusion
    t, like = torch.arange(1000), torch.ones(1000)
    assert torch.equal(Objective("p2", p2_gamma=0.0).weight(diffusion, t, like), torch.ones(1000))
    weights = Objective("p2").weight(diffusion, t, like)
    assert (weights.diff() > 0).all() and weights[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weighting": "snr"}, "loss_weighting must be one of.*'snr'"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma must be a finite number in \(0, inf\), got 0"),
        ({"p2_k": float("nan")}, "p2_k.*nan"),
        ({"p2_gamma": -1.0}, "p2_gamma.*-1"),
        ({"hybrid_lambda": 0.0}, "hybrid_lambda.*0"),
    ],
)
def test_bad_objective_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_learned_variance_that_may_be_negative_is_refused():
    x_0, t, noise = batch()
    with pytest.raises(ValueError, match="use 'learned_range'"):
        Objective()(Small(2, 4, T).double(), GaussianDiffusion(BETAS, variance_type="learned"), x_0, t, noise)
