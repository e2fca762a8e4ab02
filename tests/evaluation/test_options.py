"""Options of an evaluation: every wrong one is named before any work."""

from typing import get_args

import pytest

from ddpm_hf.evaluation.options import EvaluationOptions, Sampler, SamplerName, samplers_of
from ddpm_hf.schedulers.samplers import SAMPLERS


def options(**changes):
    return EvaluationOptions(**{"model": ".", "dataset": "digits", **changes})


def test_samplers_are_all_combinations_with_variances_of_ddpm_alone():
    found = samplers_of(options(schedulers=["ddpm", "ddim"], variance_type=["fixed_small", "analytic"], steps=[10, 20]))
    assert found == [
        Sampler("ddpm", "fixed_small", 10),
        Sampler("ddpm", "fixed_small", 20),
        Sampler("ddpm", "analytic", 10),
        Sampler("ddpm", "analytic", 20),
        Sampler("ddim", None, 10),
        Sampler("ddim", None, 20),
    ]
    assert samplers_of(options()) == [Sampler(None, None, 100)]
    assert [s.is_ancestral for s in found] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [10, 10]}, r"steps must be different values, got \[10, 10\]"),
        ({"steps": []}, "steps must be a list with at least one item"),
        ({"steps": [10, 0]}, "steps must be an integer of at least 1, got 0"),
        ({"schedulers": ["ddpm", "dppm"]}, "schedulers must be one of .*, got 'dppm'"),
        (
            {"schedulers": ["ddim"], "variance_type": ["analytic"]},
            r"variance_type is of the scheduler ddpm.*\['ddim'\]",
        ),
        ({"samples": "x.npz", "steps": [5, 10]}, "samples are those of one sampler"),
        ({"dataset": None}, "dataset must be given, or a reference"),
        (
            {"dataset": None, "reference": "r.npz", "save_reference": "s.npz"},
            "dataset must be given for save_reference",
        ),
        ({"dataset": None, "reference": "r.npz", "variance_type": ["analytic"]}, "dataset must be given for variance"),
        ({"features": "none", "reference": "r.npz"}, "features='none' measures no distance"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"bound_images": 1}, "bound_images must be an integer of at least 2, got 1"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


def test_bound_images_may_be_fewer_than_the_stride_needs():
    assert options(bound_images=5, bound_stride=20).bound_images == 5


def test_names_of_samplers_are_those_there_are():
    assert get_args(SamplerName) == tuple(SAMPLERS)
