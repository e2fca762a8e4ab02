"""`GaussianDiffusion` against the equations of docs/derivation.md, with their numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from ddpm_hf.diffusion.gaussian import PREDICTION_TYPES, VARIANCE_TYPES, GaussianDiffusion
from ddpm_hf.diffusion.schedules import BETA_SCHEDULES, make_betas
from tests.diffusion.helpers import T, linear_chain, random_images

KINDS = (*PREDICTION_TYPES, "score")
SOME_TIMESTEPS = (0, 1, 2, 57, 500, 998, 999)


def definition(betas, t):
    """β_t, ᾱ_t and ᾱ_{t−1} from their definitions, with exactly rounded sums of logarithms."""
    logs = [math.log1p(-b) for b in betas.tolist()]
    return betas[t].item(), math.exp(math.fsum(logs[: t + 1])), math.exp(math.fsum(logs[:t]))


# ---------------------------------------------------------------------- eqs. 1 and 2


@pytest.mark.parametrize("t", SOME_TIMESTEPS)
def test_eq_1_one_noising_step(t):
    diffusion, images = linear_chain(), random_images()
    x, z = next(images), next(images)
    beta = diffusion.betas[t].item()
    torch.testing.assert_close(diffusion.q_step(x, t, z), math.sqrt(1 - beta) * x + math.sqrt(beta) * z)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "warmup10", "jsd"])
def test_eq_2_is_eq_1_composed(name):
    """Mean and variance carried through every step of eq. 1 equal those of eq. 2."""
    diffusion = GaussianDiffusion(make_betas(name, 200), "v_prediction")
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    mean, variance = one, zero
    for t in range(200):
        mean = diffusion.q_step(mean, t, zero)
        # Independent Gaussians add their variances.
        variance = diffusion.q_step(variance.sqrt(), t, zero).square() + diffusion.q_step(zero, t, one).square()
        at_once, variance_at_once = diffusion.q_mean_variance(one, t)
        torch.testing.assert_close(mean, at_once, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(variance.item(), variance_at_once, rtol=1e-12, atol=0)
        torch.testing.assert_close(diffusion.q_sample(one, t, zero), at_once, rtol=1e-14, atol=0)
        torch.testing.assert_close(diffusion.q_sample(zero, t, one).item() ** 2, variance_at_once, rtol=1e-12, atol=0)


def test_eq_2_ends_in_noise():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean, variance = linear_chain().q_mean_variance(one, T - 1)
    assert mean.item() < 0.01 and variance == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_unit_variance_of_the_data_is_kept_at_every_t(name):
    """(1 − β_t)·1 + β_t = 1: why eq. 1 scales the mean. ᾱ_t and 1 − ᾱ_t are accumulated separately."""
    diffusion = GaussianDiffusion(make_betas(name, T), "v_prediction")
    total = diffusion.sqrt_alphas_cumprod.square() + diffusion.sqrt_one_minus_alphas_cumprod.square()
    torch.testing.assert_close(total, torch.ones(T, dtype=torch.float64), rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.floats(1e-5, 0.1), st.floats(1e-5, 0.9), st.integers(0, 2**31))
def test_unit_variance_is_kept_by_any_range(T, start, end, seed):
    diffusion = GaussianDiffusion(make_betas("linear", T, start, end), "sample")
    t = seed % T
    variance = (
        diffusion.lookup("sqrt_alphas_cumprod", t, torch.zeros(1)) ** 2
        + diffusion.q_mean_variance(torch.zeros(1), t)[1]
    )
    assert variance == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------------- eqs. 4 to 8, the posterior


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("t", [1, 2, 57, 500, 998])
def test_eqs_4_to_6_bayes_gives_the_posterior(name, t):
    """log q(x_t|x_{t−1}) + log q(x_{t−1}|x_0) − log q(x_t|x_0) is the posterior's log density."""
    diffusion, images = GaussianDiffusion(make_betas(name, T)), random_images()
    x_0, x_prev, x_t = next(images), next(images), next(images)
    beta = diffusion.betas[t].item()

    def q(t, x):
        mean, variance = diffusion.q_mean_variance(x_0, t)
        return Normal(mean, math.sqrt(variance)).log_prob(x)

    by_bayes = Normal(math.sqrt(1 - beta) * x_prev, math.sqrt(beta)).log_prob(x_t) + q(t - 1, x_prev) - q(t, x_t)
    mean, variance = diffusion.q_posterior(x_0, x_t, t)
    posterior = Normal(mean, math.sqrt(variance)).log_prob(x_prev)
    # Log densities are as large as (x − μ)²/β̃, which determines the absolute error.
    torch.testing.assert_close(posterior, by_bayes, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("t", [1, 2, 57, 500, 998, 999])
def test_eq_7_precisions_and_linear_terms_add(t):
    diffusion, images = linear_chain(), random_images()
    x_0, x_t = next(images), next(images)
    mean, variance = diffusion.q_posterior(x_0, x_t, t)
    beta, _, bar_prev = definition(diffusion.betas, t)
    assert 1 / variance == pytest.approx((1 - beta) / beta + 1 / (1 - bar_prev), rel=1e-9)
    linear_term = 2 * math.sqrt(1 - beta) / beta * x_t + 2 * math.sqrt(bar_prev) / (1 - bar_prev) * x_0
    torch.testing.assert_close(2 * mean / variance, linear_term, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", SOME_TIMESTEPS)
def test_eq_8_posterior_mean_and_variance(t):
    diffusion, images = linear_chain(), random_images()
    x_0, x_t = next(images), next(images)
    mean, variance = diffusion.q_posterior(x_0, x_t, t)
    beta, bar, bar_prev = definition(diffusion.betas, t)
    expected = math.sqrt(1 - beta) * (1 - bar_prev) / (1 - bar) * x_t + math.sqrt(bar_prev) * beta / (1 - bar) * x_0
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-10)
    assert variance == pytest.approx((1 - bar_prev) / (1 - bar) * beta, rel=1e-9, abs=1e-18)


def test_eq_8_at_the_first_step_is_the_image_itself():
    diffusion, images = linear_chain(), random_images()
    x_0, x_t = next(images), next(images)
    mean, variance = diffusion.q_posterior(x_0, x_t, 0)
    torch.testing.assert_close(mean, x_0, rtol=1e-14, atol=0)
    assert variance == 0


# ---------------------------------------------------------------------- eqs. 9 to 11 and 3


@pytest.mark.parametrize("t", SOME_TIMESTEPS)
def test_eq_9_x_0_from_the_noise(t):
    diffusion, images = linear_chain(), random_images()
    x_0, z = next(images), next(images)
    x_t = diffusion.q_sample(x_0, t, z)
    torch.testing.assert_close(diffusion.predict_x_0_from_epsilon(z, x_t, t), x_0, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("t", SOME_TIMESTEPS)
def test_eq_10_is_eq_8_at_the_x_0_of_eq_9(t):
    diffusion, images = linear_chain(), random_images()
    x_t, z = next(images), next(images)
    mean, _ = diffusion.q_posterior(diffusion.predict_x_0_from_epsilon(z, x_t, t), x_t, t)
    torch.testing.assert_close(diffusion.posterior_mean_from_epsilon(z, x_t, t), mean, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("t", SOME_TIMESTEPS)
def test_eq_11_mean_from_predicted_noise(t):
    diffusion, images = linear_chain(), random_images()
    x_t, z_theta = next(images), next(images)
    beta, bar, _ = definition(diffusion.betas, t)
    expected = (x_t - beta / math.sqrt(1 - bar) * z_theta) / math.sqrt(1 - beta)
    torch.testing.assert_close(diffusion.posterior_mean_from_epsilon(z_theta, x_t, t), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(diffusion.p_mean_std(z_theta, x_t, t).mean, expected, rtol=1e-9, atol=1e-9)


def variances(diffusion, t, moments, output):
    """Σ_θ at t by its definition, with β̃ of index 1 at index 0."""
    beta, bar, bar_prev = definition(diffusion.betas, t)
    next_beta, next_bar, next_prev = definition(diffusion.betas, max(t, 1))
    tilde = (1 - next_prev) / (1 - next_bar) * next_beta
    return {
        "fixed_small": tilde,
        "fixed_small_log": tilde,
        "fixed_large": beta if t else tilde,
        "fixed_large_log": beta if t else tilde,
        "analytic": (1 - bar_prev) / (1 - bar) * beta + beta**2 / ((1 - bar) * (1 - beta)) * (1 - moments[t].item()),
        "learned": output,
        "learned_range": torch.exp((output + 1) / 2 * math.log(beta) + (1 - output) / 2 * math.log(tilde)),
    }


@pytest.mark.parametrize("t", SOME_TIMESTEPS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_eq_3_the_learned_reverse_step(variance_type, prediction_type, t):
    moments = torch.linspace(0.5, 0.99, T, dtype=torch.float64)
    diffusion = linear_chain(
        prediction_type=prediction_type,
        variance_type=variance_type,
        analytic_moments=moments if variance_type == "analytic" else None,
    )
    images = random_images()
    x_0, z, output = next(images), next(images), next(images).abs()
    x_t = diffusion.q_sample(x_0, t, z)
    prediction = {"epsilon": z, "sample": x_0, "v_prediction": diffusion.velocity(x_0, t, z)}[prediction_type]
    if variance_type.startswith("learned"):
        prediction = torch.cat([prediction, output], 1)
    expected_mean, _ = diffusion.q_posterior(x_0, x_t, t)
    step = diffusion.p_mean_std(prediction, x_t, t)
    density = diffusion.p_mean_variance(prediction, x_t, t)
    for result in (step, density):
        torch.testing.assert_close(result.x_0, x_0, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(result.mean, expected_mean, rtol=1e-9, atol=1e-10)
    variance = torch.as_tensor(variances(diffusion, t, moments, output)[variance_type], dtype=torch.float64)
    std = torch.as_tensor(step.std, dtype=torch.float64)
    torch.testing.assert_close(std, torch.zeros_like(std) if t == 0 else variance.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.as_tensor(density.log_variance, dtype=torch.float64), variance.log(), rtol=1e-9, atol=1e-9
    )


def test_nan_of_a_learned_variance_is_ignored_at_the_last_step():
    diffusion = linear_chain(variance_type="learned")
    output = torch.cat([torch.zeros(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)], 1)
    x = torch.zeros(1, 3, 4, 4)
    for t in (0, torch.tensor(0), torch.tensor([0])):
        std = torch.as_tensor(diffusion.p_mean_std(output, x, t).std)
        assert bool((std == 0).all())


def test_clip_acts_on_x_0_before_the_mean():
    diffusion, images = linear_chain(), random_images()
    x_t, z = next(images), next(images)
    step = diffusion.p_mean_std(z, x_t, 900, clip=lambda x: x.clamp(-1, 1))
    clipped = diffusion.predict_x_0_from_epsilon(z, x_t, 900).clamp(-1, 1)
    torch.testing.assert_close(step.x_0, clipped)
    torch.testing.assert_close(step.mean, diffusion.q_posterior(clipped, x_t, 900)[0])


# ---------------------------------------------------------------------- conversions


@pytest.mark.parametrize("t", SOME_TIMESTEPS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_predictions_convert_by_their_definitions(source, target, t):
    diffusion, images = linear_chain(), random_images()
    x_0, z = next(images), next(images)
    _, bar, _ = definition(diffusion.betas, t)
    x_t = math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * z
    terms = {
        "epsilon": z,
        "sample": x_0,
        "v_prediction": math.sqrt(bar) * z - math.sqrt(1 - bar) * x_0,
        "score": -(x_t - math.sqrt(bar) * x_0) / (1 - bar),
    }
    for timestep in (t, torch.tensor(t), torch.full((2,), t)):
        converted = diffusion.convert(terms[source], x_t, timestep, source, target)
        torch.testing.assert_close(converted, terms[target], rtol=1e-8, atol=1e-9)


def test_the_score_is_the_gradient_of_the_log_density():
    diffusion, images = linear_chain(), random_images()
    x_0, z = next(images), next(images)
    x_t = diffusion.q_sample(x_0, 300, z).requires_grad_()
    mean, variance = diffusion.q_mean_variance(x_0, 300)
    (gradient,) = torch.autograd.grad(Normal(mean, math.sqrt(variance)).log_prob(x_t).sum(), x_t)
    torch.testing.assert_close(diffusion.convert(z, x_t.detach(), 300, "epsilon", "score"), gradient)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]),
    st.lists(st.integers(0, 900), min_size=1, max_size=4),
    st.permutations(KINDS),
    st.integers(0, 2**31),
)
def test_conversions_in_any_order_return_to_the_start(name, t, order, seed):
    diffusion = GaussianDiffusion(make_betas(name, T))
    t = torch.tensor(t)
    images = random_images(len(t), 1, 3, 3, seed=seed)
    x_t, value = next(images), next(images)
    for source, target in zip(order, [*order[1:], order[0]]):
        previous, value = value, diffusion.convert(value, x_t, t, source, target)
        scale = max(1.0, previous.abs().max().item(), value.abs().max().item())
        back = diffusion.convert(value, x_t, t, target, source)
        torch.testing.assert_close(back, previous, rtol=1e-6, atol=1e-9 * scale)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.integers(0, 2**31))
def test_float32_round_trip_of_epsilon_x_0_and_v(t, seed):
    diffusion = linear_chain()
    images = random_images(seed=seed, dtype=torch.float32)
    x_0, z = next(images), next(images)
    x_t = diffusion.q_sample(x_0, t, z)
    v = diffusion.convert(z, x_t, t, "epsilon", "v_prediction")
    x_0_again = diffusion.convert(v, x_t, t, "v_prediction", "sample")
    # Eq. 9 divides the rounding of x_t by √ᾱ_t; the conversion from x_0 divides it by √(1−ᾱ_t).
    room = 3e-6 / min(diffusion.sqrt_alphas_cumprod[t].item(), diffusion.sqrt_one_minus_alphas_cumprod[t].item())
    torch.testing.assert_close(x_0_again, x_0, rtol=0, atol=room)
    torch.testing.assert_close(diffusion.convert(v, x_t, t, "v_prediction", "epsilon"), z, rtol=0, atol=room)


# ---------------------------------------------------------------------- sub-chains


def assert_same_chain(a, b, rtol=1e-11):
    assert torch.equal(a.timesteps, b.timesteps)
    for name, table in a.tables.items():
        torch.testing.assert_close(table, b.tables[name], rtol=rtol, atol=1e-15, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "laplace"])
def test_respacing_to_all_steps_is_the_identity(name):
    diffusion = GaussianDiffusion(make_betas(name, 300))
    assert_same_chain(diffusion.respace(range(300)), diffusion)
    assert_same_chain(diffusion.strided(range(300)), diffusion)
    assert diffusion.strided(range(300)) is not diffusion


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_respacing_twice_equals_respacing_once(data):
    diffusion = linear_chain(100)
    first = sorted(data.draw(st.sets(st.integers(0, 99), min_size=1)))
    second = data.draw(st.lists(st.sampled_from(range(len(first))), min_size=1, unique=True))
    assert_same_chain(diffusion.respace(first).respace(second), diffusion.respace([first[i] for i in second]))


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, 299), min_size=1))
def test_sub_chain_has_the_marginals_of_the_chain(kept):
    diffusion = GaussianDiffusion(make_betas("squaredcos_cap_v2", 300))
    kept = sorted(kept)
    sub = diffusion.respace(kept)
    torch.testing.assert_close(sub.alphas_cumprod, diffusion.alphas_cumprod[kept], rtol=1e-11, atol=0)
    torch.testing.assert_close(
        sub.one_minus_alphas_cumprod, diffusion.one_minus_alphas_cumprod[kept], rtol=1e-11, atol=0
    )
    assert sub.timesteps.tolist() == kept


@pytest.mark.parametrize("kept", [[9999], [4000, 9999], [0, 3000, 6000, 9999]])
def test_strides_whose_beta_rounds_to_one_keep_their_digits(kept):
    diffusion = GaussianDiffusion(make_betas("linear", 10000))
    sub = diffusion.respace(kept)
    assert sub.betas[-1] == 1
    torch.testing.assert_close(sub.alphas_cumprod, diffusion.alphas_cumprod[kept], rtol=1e-11, atol=0)
    assert_same_chain(sub.respace([len(kept) - 1]), diffusion.respace([9999]))
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    assert bool(sub.p_mean_std(x, x, len(kept) - 1).mean.isfinite().all())


def test_last_step_of_any_sub_chain_adds_no_noise():
    for variance_type in VARIANCE_TYPES:
        moments = torch.full((T,), 0.9) if variance_type == "analytic" else None
        diffusion = linear_chain(variance_type=variance_type, analytic_moments=moments)
        channels = 6 if variance_type.startswith("learned") else 3
        output, x = torch.rand(1, channels, 4, 4), torch.randn(1, 3, 4, 4)
        for chain, last in ((diffusion, 0), (diffusion.respace([400, 700]), 0), (diffusion.strided([400, 700]), 400)):
            step = chain.p_mean_std(output, x, last)
            assert step.std == 0.0
            torch.testing.assert_close(step.mean, step.x_0, rtol=1e-6, atol=1e-6)


def test_strided_chain_keeps_the_other_steps():
    diffusion = linear_chain()
    strided, sub = diffusion.strided([900, 400, 100]), diffusion.respace([900, 400, 100])
    others = [t for t in range(T) if t not in (100, 400, 900)]
    for name, table in strided.tables.items():
        assert torch.equal(table[others], diffusion.tables[name][others])
        assert torch.equal(table[[100, 400, 900]], sub.tables[name])


# ---------------------------------------------------------------------- timesteps, dtypes, devices


METHODS = {
    "q_step": lambda d, t, x, y: d.q_step(x, t, y),
    "q_sample": lambda d, t, x, y: d.q_sample(x, t, y),
    "velocity": lambda d, t, x, y: d.velocity(x, t, y),
    "q_mean_variance": lambda d, t, x, y: d.q_mean_variance(x, t)[0],
    "q_posterior": lambda d, t, x, y: d.q_posterior(x, y, t)[0],
    "predict_x_0": lambda d, t, x, y: d.predict_x_0(y, x, t),
    "predict_epsilon": lambda d, t, x, y: d.predict_epsilon(y, x, t),
    "score": lambda d, t, x, y: d.convert(y, x, t, "epsilon", "score"),
    "from_score": lambda d, t, x, y: d.convert(y, x, t, "score", "v_prediction"),
    "posterior_mean_from_epsilon": lambda d, t, x, y: d.posterior_mean_from_epsilon(y, x, t),
    "p_mean_std": lambda d, t, x, y: d.p_mean_std(y, x, t).mean,
    "p_mean_variance": lambda d, t, x, y: d.p_mean_variance(y, x, t).mean,
    "clipped": lambda d, t, x, y: d.p_mean_std(y, x, t, clip=lambda x_0: x_0.clamp_(-0.1, 0.1)).x_0,
}


@pytest.mark.parametrize("t", [321, torch.tensor([0, 5, 321, 999])], ids=["int", "per sample"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_never_modified(method, prediction_type, t):
    images = random_images(4, 3, 5, 5, dtype=torch.float32)
    x, y = next(images), next(images)
    copies = x.clone(), y.clone()
    METHODS[method](linear_chain(prediction_type=prediction_type), t, x, y)
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


@pytest.mark.parametrize("method", METHODS)
def test_every_form_of_a_timestep_means_the_same(method):
    diffusion, images = linear_chain(), random_images(4, 3, 5, 5, dtype=torch.float32)
    x, y = next(images), next(images)
    call = METHODS[method]
    expected = call(diffusion, 321, x, y)
    for t in (torch.tensor(321), torch.tensor([321]), torch.full((4,), 321), torch.full((4,), 321, dtype=torch.int32)):
        torch.testing.assert_close(call(diffusion, t, x, y), expected, rtol=1e-6, atol=1e-6)
    mixed = torch.tensor([0, 5, 321, 999])
    rows = [call(diffusion, int(t), x[i : i + 1], y[i : i + 1]) for i, t in enumerate(mixed)]
    torch.testing.assert_close(call(diffusion, mixed, x, y), torch.cat(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32(method):
    diffusion, images = linear_chain(), random_images(4, 3, 5, 5, dtype=torch.bfloat16)
    x, y = next(images), next(images)
    result = METHODS[method](diffusion, torch.tensor([0, 5, 321, 999]), x, y)
    assert result.dtype == torch.float32
    exact = METHODS[method](diffusion, torch.tensor([0, 5, 321, 999]), x.double(), y.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
@pytest.mark.parametrize("method", METHODS)
def test_timesteps_on_a_device_are_never_read_back(method, shape):
    """A tensor of the meta device has no values: reading one, or branching on one, raises."""
    x = torch.empty(4, 3, 5, 5, device="meta")
    t = torch.empty(shape, dtype=torch.int64, device="meta")
    assert METHODS[method](linear_chain(), t, x, x).shape == x.shape


def test_gradients_flow_through_every_prediction():
    images = random_images(2, 1, 3, 3)
    for prediction_type in PREDICTION_TYPES:
        diffusion = linear_chain(prediction_type=prediction_type)
        x_t, output = next(images), next(images).requires_grad_()
        for t in (5, torch.tensor([5, 900])):
            assert torch.autograd.gradcheck(lambda o, t=t, x=x_t, d=diffusion: d.p_mean_std(o, x, t).mean, output)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"variance_type": "fixed_smal"}, "variance_type"),
        ({"variance_type": "analytic"}, "analytic_moments"),
        ({"analytic_moments": [0.5] * 10}, "analytic_moments"),
        ({"variance_type": "analytic", "analytic_moments": [0.5] * 9}, "analytic_moments must be 10"),
        ({"variance_type": "analytic", "analytic_moments": [-0.5] * 10}, "analytic_moments"),
        ({"variance_type": "analytic", "analytic_moments": [math.nan] * 10}, "analytic_moments"),
        ({"betas": torch.zeros(10)}, "betas"),
        ({"betas": torch.zeros(0)}, "betas"),
        ({"betas": torch.full((10,), 1.0)}, "betas"),
        ({"timesteps": torch.arange(9)}, "timesteps"),
    ],
)
def test_bad_arguments_are_named(arguments, names):
    with pytest.raises(ValueError, match=names):
        GaussianDiffusion(**{"betas": make_betas("linear", 10), **arguments})


@pytest.mark.parametrize("betas", [make_betas("jsd", 100), make_betas("const", 10000)])
def test_epsilon_prediction_is_refused_at_zero_terminal_snr(betas):
    """1/√ᾱ_T is infinite in float32: sampling would give NaN."""
    with pytest.raises(ValueError, match="prediction_type='epsilon'.*zero terminal SNR"):
        GaussianDiffusion(betas)
    diffusion = GaussianDiffusion(betas, "v_prediction")
    x = torch.randn(1, 1, 4, 4)
    assert bool(diffusion.p_mean_std(x, x, len(diffusion) - 1).mean.isfinite().all())


@pytest.mark.parametrize(
    ("t", "error"),
    [
        (-1, ValueError),
        (T, ValueError),
        (torch.tensor(-1), ValueError),
        (torch.tensor([5, T]), ValueError),
        (torch.tensor([5, 6, 7]), ValueError),
        (torch.tensor([[5, 6]]), ValueError),
        (torch.tensor([0.5, 1.0]), TypeError),
        (torch.tensor([True, False]), TypeError),
        (5.0, TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_timesteps_are_refused_everywhere(method, t, error):
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(error, match="timestep"):
        METHODS[method](linear_chain(), t, x, x)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "q_mean_variance"])
def test_different_shapes_are_refused(method):
    with pytest.raises(ValueError, match="shape"):
        METHODS[method](linear_chain(), 5, torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 3))


def test_uint8_images_are_refused():
    pixels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8"):
        linear_chain().q_sample(pixels, 5, torch.randn(2, 1, 2, 2))


def test_unknown_prediction_types_of_convert_are_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="'noise'"):
        linear_chain().convert(x, x, 5, "noise", "sample")


@pytest.mark.parametrize(
    "timesteps", [[], [5, 5], [-1, 5], [5, T], [0.5], [True], "abc", 5, ["a"], torch.zeros(2, 2).long(), [[1], [2, 3]]]
)
def test_bad_sub_chains_are_refused(timesteps):
    for make in (linear_chain().respace, linear_chain().strided):
        with pytest.raises(ValueError, match="timesteps must be"):
            make(timesteps)


def test_unknown_table_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'alpha_bar'"):
        linear_chain().alpha_bar  # noqa: B018
