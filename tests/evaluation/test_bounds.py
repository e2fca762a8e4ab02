"""The bound of a model on images: its stride, and the chains that it is measured of."""

from functools import partial

import pytest

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.data.builtin import digits
from ddpm_hf.diffusion.timesteps import spaced_timesteps
from ddpm_hf.evaluation import bounds
from ddpm_hf.evaluation.measures import model_images
from tests.conftest import TINY_SCHEDULER


@pytest.fixture
def pipe(make_pipeline):
    return make_pipeline(in_channels=1, out_channels=1)


def images(pipe, count):
    return model_images(digits()["train"].select(range(count)), pipe.unet.config, {}, None, None)


@pytest.mark.parametrize(("count", "stride"), [(12, 3), (12, 6), (5, 2), (3, 1)])
def test_stride_is_at_most_half_the_number_of_images(pipe, count, stride):
    bound = bounds.measure_bound(
        pipe, pipe.scheduler.diffusion, images(pipe, count), 100, 6 if count > 6 else 20, 0, "b", 8
    )
    assert bound.num_images == count and bound.stride == min(stride if count < 12 else 6, count // 2)


def test_bounds_are_of_the_full_chain_and_of_each_number_of_steps(pipe):
    measure = partial(_measure, pipe)
    found, table = bounds.measure_bounds(measure, pipe.scheduler, images(pipe, 12), images(pipe, 10), [4, 20, 8])
    names = ["training, 20 steps", *(f"validation, {name} steps" for name in ("20", "4", "8", "best 4"))]
    assert list(found) == names and [row["steps"] for row in table["rows"]] == [4, 5, 10]
    assert found["validation, 8 steps"].timesteps == spaced_timesteps(20, 8, "leading").tolist()[::-1]
    assert bounds.measure_bounds(measure, pipe.scheduler, images(pipe, 12), None, [4])[1] is None


def _measure(pipe, chain, part, purpose):
    return bounds.measure_bound(pipe, chain, part, 100, 2, 0, purpose, 8)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "analytic"])
def test_scheduler_with_another_variance_keeps_the_rest(pipe, variance):
    ddpm = DDPMSchedulerCustom(**TINY_SCHEDULER, timestep_spacing="trailing")
    changed = bounds.with_variance(pipe, ddpm, variance, images(pipe, 6), 4, 0)
    assert changed.config.variance_type == variance and changed.config.timestep_spacing == "trailing"
    assert (changed.config.analytic_moments is not None) == (variance == "analytic")
    assert (changed is ddpm) == (variance == "fixed_small")
