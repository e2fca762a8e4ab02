"""DDIMSchedulerCustom against the equations of its paper, diffusers, and DDPMSchedulerCustom."""

import inspect
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom
from ddpm_hf.schedulers.base import ANALYTIC_MARK, TIMESTEP_SPACINGS
from ddpm_hf.schedulers.samplers import as_ddpm
from tests.schedulers.test_ddpm import (
    CLIPPING,
    FORMS,
    MEAN,
    PREDICTION_TYPES,
    VARIANCE,
    CopiesBetweenDevices,
    compiled_step,
    gaussian_moments,
    log_alpha_bar,
    optimal_prediction,
    public,
    randn,
    seeded,
    warnings_of_diffusers,
)

T = 1000

# ---------------------------------------------------------------------- the equations of the paper


def equation_12(kind, betas, output, t, previous, x_t, eta, z, clip=None, recompute=False):
    """x_{t−1} and x_0 by eqs. 12 and 16 of the DDIM paper, term by term, from the logarithms of ᾱ alone."""
    log_bar, log_prev = log_alpha_bar(betas, t), log_alpha_bar(betas, previous)
    bar, prev = math.exp(log_bar), math.exp(log_prev)
    rest, rest_prev = -math.expm1(log_bar), -math.expm1(log_prev)
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
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("timesteps", [[999, 998, 501, 30, 29, 1, 0], [900, 333, 7], [999], [5]])
def test_step_is_equation_12_at_any_timesteps(timesteps, prediction_type, eta, recompute, clip):
    clipping = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    scheduler = DDIMSchedulerCustom(prediction_type=prediction_type, **clipping)
    scheduler.set_timesteps(timesteps=timesteps)
    betas = scheduler.diffusion.betas.tolist()
    for i, (t, previous) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
        assert scheduler.previous_timestep(t) == previous
        output, x, z = (randn(2, 3, 4, 4, seed=3 * i + k, dtype=torch.float64) for k in range(3))
        result = scheduler.step(output, t, x, eta, recompute, variance_noise=z)
        expected, x_0 = equation_12(prediction_type, betas, output, t, previous, x, eta, z, clip, recompute)
        torch.testing.assert_close(result.prev_sample, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.pred_original_sample, x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("timesteps", [range(999, -1, -37), [999, 0]])
def test_eta_1_is_ancestral_sampling_with_the_small_variance(timesteps, clipping):
    ddim, ddpm = (cls(**CLIPPING[clipping]) for cls in (DDIMSchedulerCustom, DDPMSchedulerCustom))
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(timesteps=list(timesteps))
    for t in timesteps:
        output, x, z = (randn(2, 3, 4, 4, seed=k, dtype=torch.float64) for k in (1, 2, 3))
        expected = ddpm.step(output, t, x, variance_noise=z).prev_sample
        result = ddim.step(output, t, x, 1.0, True, variance_noise=z).prev_sample
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("timesteps", [[999, 600, 599, 40, 3], range(999, -1, -9)])
def test_analytic_variance_keeps_the_marginals_of_gaussian_data(timesteps, eta):
    """By theorem 1 of Analytic-DPM the steps then are those of the data's own reverse process, whatever η is."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).tolist()
    scheduler = DDIMSchedulerCustom(analytic_moments=gaussian_moments(betas), clip_sample=False)
    scheduler.set_timesteps(timesteps=list(timesteps))

    def marginal(t):
        bar = math.exp(log_alpha_bar(betas, t))
        return math.sqrt(bar) * MEAN, bar * VARIANCE + 1 - bar

    for t, previous in zip(timesteps, timesteps[1:]):
        mean, variance = marginal(t)
        x = torch.tensor([mean, mean + 1.0], dtype=torch.float64).reshape(1, 1, 1, 2)
        output = optimal_prediction("epsilon", x, math.exp(log_alpha_bar(betas, t)), MEAN, VARIANCE)
        at_mean, above = scheduler.step(output, t, x, eta, variance_noise=torch.zeros_like(x)).prev_sample.flatten()
        noisy = scheduler.step(output, t, x, eta, variance_noise=torch.ones_like(x)).prev_sample.flatten()[0]
        added = (noisy - at_mean).item() ** 2
        expected_mean, expected_variance = marginal(previous)
        assert at_mean.item() == pytest.approx(expected_mean, rel=1e-9)
        assert (above - at_mean).item() ** 2 * variance + added == pytest.approx(expected_variance, rel=1e-9)


# ---------------------------------------------------------------------- diffusers, where it is right


def trajectory(scheduler, steps, in_channels=3, **options):
    scheduler.set_timesteps(steps)
    x, generator = randn(2, in_channels, 4, 4), seeded(1)
    if options.get("eta"):
        options["generator"] = generator
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * x + 0.1, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("options", [{}, {"eta": 0.4}, {"eta": 1.0, "use_clipped_model_output": True}])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("steps", "spacing"), [(50, "leading"), (50, "trailing"), (150, "leading"), (1000, "linspace")]
)
def test_samples_equal_those_of_diffusers(steps, spacing, prediction_type, clipping, options):
    arguments = {"timestep_spacing": spacing, "prediction_type": prediction_type, **CLIPPING[clipping]}
    ours = trajectory(DDIMSchedulerCustom(**arguments), steps, **options)
    theirs = trajectory(DDIMScheduler(**arguments), steps, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)  # stock's tables are float32


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("clipping", ["none", "clip"])
def test_end_at_timestep_0_equals_that_of_diffusers(steps, steps_offset, clipping):
    arguments = {"set_alpha_to_one": False, "steps_offset": steps_offset, "prediction_type": "v_prediction"}
    arguments |= {"beta_start": 0.01, **CLIPPING[clipping]}
    ours, theirs = DDIMSchedulerCustom(**arguments), DDIMScheduler(**arguments)
    torch.testing.assert_close(trajectory(ours, steps), trajectory(theirs, steps), rtol=1e-3, atol=1e-3)
    assert ours.previous_timestep(int(ours.timesteps[-1])) == 0
    # It matters: the image itself is elsewhere.
    to_image = trajectory(DDIMSchedulerCustom(**{**arguments, "set_alpha_to_one": True}), steps)
    assert not torch.allclose(trajectory(ours, steps), to_image, atol=1e-2)


@pytest.mark.parametrize("cls", [DDIMSchedulerCustom, DDPMSchedulerCustom])
def test_samples_may_have_any_number_of_dimensions(cls):
    scheduler, stock = cls(), DDIMScheduler()
    stock.set_timesteps(1000)
    x, output = randn(5), randn(5, seed=1)
    expected = scheduler.step(output.reshape(1, 1, 1, 5), 500, x.reshape(1, 1, 1, 5), generator=seeded(2)).prev_sample
    result = scheduler.step(output, 500, x, generator=seeded(2)).prev_sample
    torch.testing.assert_close(result, expected.flatten())
    if cls is DDIMSchedulerCustom:  # diffusers' DDPM does not take them
        torch.testing.assert_close(result, stock.step(output, 500, x).prev_sample, rtol=1e-4, atol=1e-4)


def test_arguments_and_defaults_are_those_of_diffusers():
    own = ("analytic_moments", "analytic_trained_betas")
    for function in ("__init__", "step"):
        ours, theirs = (inspect.signature(getattr(c, function)) for c in (DDIMSchedulerCustom, DDIMScheduler))
        ours = {name: p.default for name, p in ours.parameters.items() if name not in own}
        assert ours == {name: p.default for name, p in theirs.parameters.items()}
        assert list(ours) == list(theirs.parameters)


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("beta_schedule", ["linear", "sigmoid", "jsd"])
def test_saved_scheduler_gives_the_same_samples_in_diffusers(beta_schedule, spacing, tmp_path, diffusers_log):
    arguments = {"beta_schedule": beta_schedule, "prediction_type": "v_prediction", "timestep_spacing": spacing}
    ours = DDIMSchedulerCustom(100, 1e-3, 0.2, **arguments)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDIMScheduler" and not [key for key in saved if key.startswith("analytic")]
    again, stock = DDIMSchedulerCustom.from_pretrained(tmp_path), DDIMScheduler.from_pretrained(tmp_path)
    assert public(again.config) == public(ours.config) and not warnings_of_diffusers(diffusers_log)
    results = [trajectory(scheduler, 100) for scheduler in (ours, again, stock)]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-3)


def test_analytic_scheduler_is_saved_and_refused_by_diffusers(tmp_path):
    ours = DDIMSchedulerCustom(20, analytic_moments=[0.5] * 20)
    ours.save_pretrained(tmp_path)
    again = DDIMSchedulerCustom.from_pretrained(tmp_path)
    assert again.diffusion.variance_type == "analytic" and again.config.beta_schedule == "linear" + ANALYTIC_MARK
    for stock in (DDIMScheduler, DPMSolverMultistepScheduler):
        with pytest.raises(NotImplementedError, match="analytic variance of ddpm_hf"):
            stock.from_pretrained(tmp_path)
    assert as_ddpm(again).config.variance_type == "analytic"


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_variance_of_the_model_survives_conversion_to_ddim_and_back(variance_type, tmp_path):
    ddim = DDIMSchedulerCustom.from_config(DDPMSchedulerCustom(variance_type=variance_type).config)
    ddim.save_pretrained(tmp_path)
    assert as_ddpm(DDIMSchedulerCustom.from_pretrained(tmp_path)).config.variance_type == variance_type


# ---------------------------------------------------------------------- a step


def test_channels_of_a_learned_variance_are_not_used():
    scheduler = DDIMSchedulerCustom()
    x, output = randn(2, 3, 4, 4), randn(2, 6, 4, 4, seed=1)
    expected = scheduler.step(output[:, :3], 500, x).prev_sample
    assert torch.equal(scheduler.step(output, 500, x).prev_sample, expected)


def test_no_noise_is_drawn_without_eta_or_in_the_last_step():
    scheduler, generator, x = DDIMSchedulerCustom(), seeded(4), randn(2, 3, 4, 4)
    state = generator.get_state()
    scheduler.step(x, 500, x, generator=generator)
    scheduler.step(x, 0, x, eta=1.0, generator=generator)
    assert torch.equal(generator.get_state(), state) and not scheduler.adds_noise()
    scheduler.step(x, 500, x, eta=0.1, generator=generator)
    assert not torch.equal(generator.get_state(), state) and scheduler.adds_noise(eta=0.1)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_per_sample_timesteps_step_each_sample_independently(eta):
    scheduler = DDIMSchedulerCustom()
    scheduler.set_timesteps(30)
    x, output, z = (randn(4, 3, 4, 4, seed=k, dtype=torch.float64) for k in range(3))
    t = scheduler.timesteps[[0, 3, 28, 29]]
    together = scheduler.step(output, t, x, eta, variance_noise=z).prev_sample
    for i in range(4):
        one = scheduler.step(output[i : i + 1], int(t[i]), x[i : i + 1], eta, variance_noise=z[i : i + 1]).prev_sample
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("form", FORMS)
def test_compiled_step_is_one_graph_for_every_t(form, clipping, eta):
    dynamic = True if form == "int" else None
    scheduler, compiled, graphs = compiled_step(dynamic, DDIMSchedulerCustom, **CLIPPING[clipping])
    scheduler.set_timesteps(40)
    x, output, noise = (randn(4, 3, 6, 6, seed=k) for k in range(3))
    for t in (975, 950, 500, 25, 2, 1, 0, 3, 999):
        arguments = (0.5 * output, FORMS[form](t, 4), x, eta)
        result = compiled(*arguments, variance_noise=noise, return_dict=False)
        expected = scheduler.step(*arguments, variance_noise=noise, return_dict=False)
        for a, b in zip(result, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("clipping", CLIPPING)
def test_step_on_a_device_copies_nothing_from_or_to_the_host(clipping, eta):
    scheduler = DDIMSchedulerCustom(**CLIPPING[clipping])
    scheduler.set_timesteps(50, device="meta")
    x = torch.empty(4, 3, 8, 8, device="meta")
    for t in (500, torch.empty((), dtype=torch.int64, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")):
        with CopiesBetweenDevices() as copies:
            scheduler.step(x, t, x, eta)
        assert copies.seen == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"eta": 1.5}, "eta.*1.5"),
        ({"eta": -0.1}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": True}, "eta"),
        ({"timestep": 1000}, "timesteps"),
        ({"model_output": torch.zeros(3, 4, 4, 4)}, r"\(3, 3, 4, 4\)"),
        ({"generator": [seeded()]}, "generator.*1 for a batch of 3"),
        ({"variance_noise": torch.zeros(1, 3, 4, 4)}, "variance_noise"),
    ],
)
def test_bad_steps_are_refused(changes, names):
    x = torch.zeros(3, 3, 4, 4)
    with pytest.raises(ValueError, match=names):
        DDIMSchedulerCustom().step(**{"model_output": x, "timestep": 5, "sample": x, "eta": 1.0, **changes})
