"""The mathematics of the page, in Chromium, agrees with `GaussianDiffusion` and the schedulers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.demo.site import WEB
from ddpm_hf.diffusion.timesteps import spaced_timesteps
from ddpm_hf.pipelines.inversion import slerp
from ddpm_hf.schedulers.ddim import DDIMSchedulerCustom
from tests.demo.conftest import MILLISECONDS

SCHEDULES = ("linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
# sampler, variance type and η.
SAMPLERS = [("ddpm", "fixed_small", 0.0), ("ddpm", "fixed_large", 0.0)]
SAMPLERS += [("ddim", "fixed_small", eta) for eta in (0.0, 0.5, 1.0)]


@pytest.fixture(scope="module")
def js(browser, serve) -> Callable[..., Any]:
    """Evaluates an expression in which `d` is diffusion.js, and the names of the given values are theirs."""
    page = browser.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.goto(f"{serve(WEB)}/style.css")  # a page of this origin that does nothing

    def evaluate(expression: str, **values) -> Any:
        names = ", ".join(values)
        code = f"async ({{{names}}}) => {{ const d = await import('/diffusion.js'); return {expression}; }}"
        return page.evaluate(code, values)

    yield evaluate
    page.close()


def assert_close(actual, expected) -> None:
    np.testing.assert_allclose(np.asarray(actual, dtype=float).ravel(), np.ravel(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1000, 50, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_those_of_a_respaced_chain(js, schedule, steps):
    diffusion = DDPMSchedulerCustom(beta_schedule=schedule).diffusion
    chain = diffusion.respace(spaced_timesteps(1000, steps, "trailing"))
    bars = diffusion.alphas_cumprod.tolist()
    tables = js("d.makeChain(bars, d.spacedTimesteps(1000, steps))", bars=bars, steps=steps)
    assert tables.pop("timesteps") == chain.timesteps.tolist()
    assert {"betas", "snr", "one_minus_alphas_cumprod", "posterior_variance"} < tables.keys()
    for name, values in tables.items():
        assert_close(values, chain.tables[name])


@pytest.mark.parametrize("T", [8, 100])
def test_timesteps_are_those_of_trailing_spacing(js, T):
    found = js("Array.from({length: T}, (_, n) => d.spacedTimesteps(T, n + 1))", T=T)
    assert found == [spaced_timesteps(T, n + 1, "trailing").tolist() for n in range(T)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_is_that_of_the_forward_process(js, schedule):
    diffusion = DDPMSchedulerCustom(beta_schedule=schedule).diffusion
    x, noise = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    values = {"bars": diffusion.alphas_cumprod.tolist(), "x": x.flatten().tolist(), "noise": noise.flatten().tolist()}
    for t in (0, 500, 999):
        found = js("[...d.qSample(d.makeChain(bars, bars.keys()), t, x, noise)]", t=t, **values)
        assert_close(found, diffusion.q_sample(x, t, noise))


def scheduler_of(sampler: str, prediction_type: str, variance_type: str, clips: bool):
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type, "clip_sample": clips}
    if sampler == "ddim":
        return DDIMSchedulerCustom(**config)
    return DDPMSchedulerCustom(**config, variance_type=variance_type)


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize(("sampler", "variance_type", "eta"), SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_step_is_that_of_the_scheduler(js, prediction_type, sampler, variance_type, eta, clips):
    scheduler = scheduler_of(sampler, prediction_type, variance_type, clips)
    facts = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_sample_range": 1.0 if clips else None,
    }
    given = {"facts": facts, "options": {"sampler": sampler, "eta": eta}}
    given["bars"] = scheduler.diffusion.alphas_cumprod.tolist()
    x, output, noise = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64)
    given |= {"x": x.flatten().tolist(), "output": output.flatten().tolist(), "noise": noise.flatten().tolist()}
    for steps in (1000, 20):
        timesteps = spaced_timesteps(1000, steps, "trailing")
        scheduler.set_timesteps(timesteps=timesteps)
        for i in (0, 1, steps // 2, steps - 1):
            step = js(
                "(({x_0, x_prev}) => [[...x_0], [...x_prev]])"
                "(d.reverseStep(facts, d.makeChain(bars, timesteps), i, options, x, output, noise))",
                i=i,
                timesteps=timesteps.tolist(),
                **given,
            )
            options = {"eta": eta} if sampler == "ddim" else {}
            t = int(timesteps[steps - 1 - i])
            expected = scheduler.step(output, t, x, variance_noise=noise, return_dict=False, **options)
            assert_close(step[0], expected[1])
            assert_close(step[1], expected[0])


@pytest.mark.parametrize(("sampler", "variance_type", "eta"), SAMPLERS)
def test_a_chain_is_its_steps_one_after_another(js, sampler, variance_type, eta):
    """With a linear function as the network, and two images, each with noise of its own."""
    scheduler = scheduler_of(sampler, "v_prediction", variance_type, True)
    timesteps = spaced_timesteps(1000, 6, "trailing")
    scheduler.set_timesteps(timesteps=timesteps)
    facts = {"prediction_type": "v_prediction", "variance_type": variance_type, "clip_sample_range": 1}
    frames = js(
        """await (async () => {
            const streams = [d.gaussian(1, 0), d.gaussian(1, 1)], frames = [];
            const x = d.drawEach(streams, 4), predict = async (x, t) => x.map((value) => value / 2 + t / 1000);
            const chain = d.makeChain(bars, timesteps);
            for await (const step of d.denoise(facts, chain, options, x, streams, predict))
                frames.push([chain.timesteps[step.i], ...[step.x_t, step.noise ?? [], step.x_prev].map((a) => [...a])]);
            return frames;
        })()""",
        bars=scheduler.diffusion.alphas_cumprod.tolist(),
        timesteps=timesteps.tolist(),
        facts=facts,
        options={"sampler": sampler, "eta": eta},
    )
    assert [frame[0] for frame in frames] == timesteps.tolist()
    x = torch.tensor(frames[0][1], dtype=torch.float64)
    for t, x_t, noise, x_prev in frames:
        assert_close(x_t, x)
        z = torch.tensor(noise or [0.0] * 8, dtype=torch.float64)
        options = {"eta": eta} if sampler == "ddim" else {}
        (x, _) = scheduler.step(x / 2 + t / 1000, t, x, variance_noise=z, return_dict=False, **options)
        assert_close(x_prev, x)
    adds_noise = sampler == "ddpm" or eta > 0
    assert [bool(noise) for _, _, noise, _ in frames] == [adds_noise] * 5 + [False]


def test_interpolation_is_that_of_the_library(js):
    x, y = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    for other in (y, 2 * x):  # the circle through x and 2x is a line
        values = {"x": x.flatten().tolist(), "y": other.flatten().tolist()}
        for w in (0.0, 0.3, 1.0):
            assert_close(js("[...d.slerp(x, y, w)]", w=w, **values), slerp(x, other, w))


def test_noise_is_gaussian_and_streams_are_independent(js):
    n = 20_000
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (4294967295, 9)]
    streams = np.array(js("pairs.map(([seed, index]) => [...d.gaussian(seed, index)(n)])", pairs=pairs, n=n))
    again = js("(() => { const next = d.gaussian(1, 1); return [...next(10), ...next(n - 10)]; })()", n=n)
    assert again == streams[3].tolist()
    moments = [np.mean(streams**k, axis=1) for k in (1, 2, 3, 4)]
    for found, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert (np.abs(found - expected) < 5 * np.sqrt(variance / n)).all()
    between = np.corrcoef(streams) - np.eye(len(pairs))
    neighbors = [np.corrcoef(z[:-lag], z[lag:])[0, 1] for z in streams for lag in (1, 2)]
    assert max(np.abs(between).max(), np.abs(neighbors).max()) < 5 / np.sqrt(n)


def test_another_prediction_type_is_refused(js):
    with pytest.raises(Exception, match="prediction_type must be epsilon, sample or v_prediction, got score"):
        js("d.predictions(d.makeChain([0.9], [0]), 0, 'score', [0], [0])")
