"""Options of sampling: those that exclude or need each other are named before any work."""

import pytest

from ddpm_hf.evaluation.sample_options import CONFLICTS, NEEDS, SampleArguments

VALUES = {
    "interpolate": ["a.png", "b.png"], "init_image": "a.png", "mask": "m.png", "scheduler": "ddim", "timesteps": "9,0",
    "eta": 0.5, "spacing": "leading", "strength": 0.5, "gif": "a.gif",
}  # fmt: skip


@pytest.mark.parametrize(("one", "other"), [(name, other) for name, others, _ in CONFLICTS for other in others])
def test_options_that_exclude_each_other_are_named(one, other):
    given = {one: VALUES[one], other: VALUES[other]} | ({"init_image": "a.png"} if one == "mask" else {})
    with pytest.raises(ValueError, match=f"{one}=.* and {other}=.* exclude each other"):
        SampleArguments(model=".", **given)


@pytest.mark.parametrize("name", NEEDS)
def test_options_that_need_another_say_which(name):
    with pytest.raises(ValueError, match=f"{name}=.* needs --init_image"):
        SampleArguments(model=".", **{name: VALUES[name]})
    assert SampleArguments(model=".", **{name: VALUES[name], "init_image": "a.png"}).is_editing


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"interpolate": ["a.png"]}, "interpolate must be the files of two pictures"),
        ({"interpolate": []}, "interpolate must be a list with at least one item"),
        ({"gif": "a.png"}, "gif must be a file named .gif or .webp or .mp4, got 'a.png'"),
        ({"grid": "grid"}, "grid must be a file named .png"),
        ({"init_image": "a.png", "strength": 0.0}, r"strength must be a finite number in \(0, 1\]"),
        ({"eta": 2.0}, "eta must be"),
        ({"spacing": "even"}, "spacing must be one of"),
    ],
)
def test_wrong_values_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        SampleArguments(model=".", **options)
