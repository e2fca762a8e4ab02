"""Spacing of sub-chains against diffusers, and the forms of a timestep."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_hf.diffusion.timesteps import as_timesteps, check_timestep, parse_timesteps, spaced_timesteps, to_index_device

SPACINGS = ("linspace", "leading", "trailing")


@pytest.mark.parametrize("T", [10, 250, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_those_of_diffusers_if_it_gives_n_of_them(spacing, T):
    stock, agreed = DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing), 0
    for n in range(1, T + 1):
        ours = spaced_timesteps(T, n, spacing)
        assert len(ours) == n and ours[-1] >= 0 and ours[0] < T and not (ours.diff() >= 0).any()
        stock.set_timesteps(n)
        if len(stock.timesteps) == n:
            assert torch.equal(ours, stock.timesteps)
            agreed += 1
    assert agreed >= 0.9 * T


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.data())
def test_every_spacing_gives_exactly_n_timesteps(T, data):
    n = data.draw(st.integers(1, T))
    for spacing in SPACINGS:
        timesteps = spaced_timesteps(T, n, spacing)
        assert timesteps.dtype == torch.int64 and len(timesteps) == n
        assert timesteps[-1] >= 0 and timesteps[0] < T and not (timesteps.diff() >= 0).any()
    assert spaced_timesteps(T, n, "trailing")[0] == T - 1
    assert n == 1 or spaced_timesteps(T, n, "linspace")[[0, -1]].tolist() == [T - 1, 0]


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("linspace", [9, 6, 3, 0]), ("leading", [6, 4, 2, 0]), ("trailing", [9, 7, 4, 1])],
)
def test_spacing_of_4_of_10_steps(spacing, expected):
    """T = 10, n = 4: (T − 1)/(n − 1) = 3, T // n = 2, and T/n = 2.5 counted down from 10, rounded to even, minus 1."""
    assert spaced_timesteps(10, 4, spacing).tolist() == expected


def test_offset_shifts_leading_timesteps_and_must_stay_below_T():
    assert spaced_timesteps(10, 4, "leading", 3).tolist() == [9, 7, 5, 3]
    with pytest.raises(ValueError, match="steps_offset=4 with 4 leading steps reaches timestep 10"):
        spaced_timesteps(10, 4, "leading", 4)


@pytest.mark.parametrize("T", [20, 1000])
def test_ddim_n_is_n_multiples_of_the_smallest_stride(T):
    possible = {len(range(0, T, stride)) for stride in range(1, T + 1)}
    for n in range(1, T + 1):
        if n not in possible:
            with pytest.raises(ValueError, match=f"no stride gives {n} of T = {T} timesteps.*are possible"):
                parse_timesteps(f"ddim{n}", T)
            continue
        timesteps = parse_timesteps(f"ddim{n}", T)
        (stride,) = {a - b for a, b in zip(timesteps, timesteps[1:])} or {T}
        assert len(timesteps) == n and timesteps[-1] == 0 and len(range(0, T, stride - 1 or T)) != n
        if T % n == 0:
            assert timesteps == spaced_timesteps(T, n, "leading").tolist()


def test_list_of_timesteps_is_read_or_refused():
    assert parse_timesteps("900, 500,0", 1000) == [900, 500, 0]
    for text in ("", "5,7", "5,5", "1000,3", "-1", "5,x", "ddim", "ddimx", "2.5"):
        with pytest.raises(ValueError, match="timesteps must be a descending list in 0..T−1 = 999, or 'ddimN'"):
            parse_timesteps(text, 1000)


def test_single_timestep_on_the_host_becomes_an_int():
    image = torch.empty(2, 1, 2, 2, device="meta")
    assert to_index_device(torch.tensor(7), image) == 7 and to_index_device(7, image) == 7
    assert to_index_device(torch.tensor([7, 8]), image).device.type == "meta"
    on_device = torch.empty((), dtype=torch.int64, device="meta")
    assert to_index_device(on_device, image) is on_device


@pytest.mark.parametrize("given", [[5, 3], (5, 3), range(5, 2, -2), np.array([5, 3]), torch.tensor([5, 3]).int()])
def test_timesteps_of_any_form_become_int64_on_the_cpu(given):
    chosen = as_timesteps(given)
    assert chosen.tolist() == [5, 3] and chosen.dtype == torch.int64 and chosen.device.type == "cpu"


@pytest.mark.parametrize("given", [[], [0.5], [True], 5, "ab", torch.zeros(2, 2).long(), [[1], [2, 3]], None])
def test_timesteps_that_are_no_list_of_integers_are_refused(given):
    with pytest.raises(ValueError, match="timesteps must be a non-empty list of integers"):
        as_timesteps(given)


@pytest.mark.parametrize("t", [0, 9, torch.tensor(9), torch.tensor([9]), torch.tensor([0, 9]), torch.zeros(2).int()])
def test_timesteps_of_the_chain_pass_the_check(t):
    check_timestep(t, 10, torch.zeros(2, 1))


@pytest.mark.parametrize("t", [10, -1, torch.tensor(10), torch.tensor([0, 10]), torch.zeros(3).int(), True, 1.0, "1"])
def test_other_timesteps_fail_the_check(t):
    with pytest.raises(ValueError, match="timestep"):
        check_timestep(t, 10, torch.zeros(2, 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((20, 21, "leading"), "n must be an integer in 1..20, the chain's T, got 21"),
        ((20, 0, "linspace"), "n must be an integer in 1..20"),
        ((20, "5", "linspace"), "n must be .* got '5'"),
        ((20, 5, "even"), "spacing must be one of .* got 'even'"),
        ((20, 5, "leading", -1), "offset must be an integer of at least 0, got -1"),
        ((10**9, 5, "leading"), "T must be an integer in 1..100000, got 1000000000"),
    ],
)
def test_a_spacing_that_does_not_exist_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(*arguments)


@pytest.mark.parametrize("timesteps", [torch.tensor([1j]), {5: 1}, {5, 1}, [2**70], [None], "5,0", torch.tensor([])])
def test_what_is_no_list_of_integers_is_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must be a non-empty list of integers"):
        as_timesteps(timesteps)
