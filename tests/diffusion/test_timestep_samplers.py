"""Timestep samplers against their documented distributions."""

import collections

import pytest
import torch

from ddpm_hf.diffusion.timestep_samplers import TIMESTEP_SAMPLERS, LossSecondMomentTimesteps, make_timestep_sampler

HISTORY = LossSecondMomentTimesteps.HISTORY


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
@pytest.mark.parametrize("T", [1, 7, 1000])
def test_timesteps_are_uniform_at_first_and_within_the_chain(name, T):
    sampler, random = make_timestep_sampler(name, T), generator()
    draws = [sampler(64, random) for _ in range(2000)]
    t = torch.cat([d[0] for d in draws])
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < T
    torch.testing.assert_close(torch.cat([d[1] for d in draws]), torch.ones(len(t)), rtol=1e-6, atol=0)
    share = torch.bincount(t, minlength=T) / len(t)
    deviation = (T * (1 - 1 / T) / len(t)) ** 0.5  # of a share, relative to 1/T
    assert ((share * T - 1).abs() <= 5 * deviation + 1e-6).all()


def test_stratified_timesteps_are_evenly_spread():
    sampler, random = make_timestep_sampler("stratified", 1000), generator()
    for _ in range(20):
        t = sampler(50, random)[0].sort().values
        assert ((t // 20).unique().numel()) >= 49  # one in each fiftieth of the range, except at borders
        assert t.diff().max() <= 21


def loss_at(t):
    """A loss that is large for small t."""
    return 2.0 / (1 + t) ** 1.5 + 0.01


def trained(T=40, steps=300, batch=16):
    sampler, random = LossSecondMomentTimesteps(T), generator(3)
    for _ in range(steps):
        t, _ = sampler(batch, random)
        sampler.update(t, loss_at(t.double()))
    return sampler


def test_history_holds_the_last_losses_of_each_timestep():
    T, sampler, random = 5, LossSecondMomentTimesteps(5), generator(1)
    history = [collections.deque(maxlen=HISTORY) for _ in range(T)]
    for step in range(30):
        t = torch.randint(T - 1, (40,), generator=random) if step % 2 else torch.full((3,), T - 1)
        losses = torch.rand(len(t), generator=random)
        sampler.update(t, losses)
        for i, loss in zip(t.tolist(), losses.tolist()):
            history[i].append(loss)
        if all(len(h) == HISTORY for h in history):
            root = torch.tensor([sum(x**2 for x in h) / HISTORY for h in history], dtype=torch.float64).sqrt()
            torch.testing.assert_close(sampler.probabilities(), 0.999 * root / root.sum() + 0.001 / T)
        else:
            assert torch.equal(sampler.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64))
    assert all(len(h) == HISTORY for h in history)


def test_timestep_probability_follows_the_second_moment_of_the_loss():
    sampler = trained()
    loss = loss_at(torch.arange(40, dtype=torch.float64))
    torch.testing.assert_close(sampler.probabilities(), 0.999 * loss / loss.sum() + 0.001 / 40)
    t, weight = sampler(200_000, generator(5))
    p = sampler.probabilities()
    share = torch.bincount(t, minlength=40) / len(t)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(t)).sqrt()).all()
    torch.testing.assert_close(weight, (1 / (40 * p[t])).float())


def test_weighted_loss_is_unbiased_with_less_variance_than_uniform():
    """The loss at a t varies, as it does between images."""
    sampler, n, T = trained(), 200_000, 40
    expected = loss_at(torch.arange(T, dtype=torch.float64)).mean().item()
    estimates = {}
    for name, s in (("importance", sampler), ("uniform", make_timestep_sampler("uniform", T))):
        t, weight = s(n, generator(9))
        estimates[name] = weight * loss_at(t.double()) * (0.5 + torch.rand(n, generator=generator(11)))
        error = (estimates[name].var() / n).sqrt().item()
        assert estimates[name].mean().item() == pytest.approx(expected, abs=5 * error)
    assert estimates["importance"].var() < 0.1 * estimates["uniform"].var()


def test_restored_state_draws_the_same_timesteps():
    sampler, restored = trained(), LossSecondMomentTimesteps(40)
    saved = sampler.state_dict()
    restored.load_state_dict(saved)
    for step in range(5):
        t, weight = sampler(16, generator(step))
        again, weight_again = restored(16, generator(step))
        assert torch.equal(t, again) and torch.equal(weight, weight_again)
        for s in (sampler, restored):
            s.update(t, 3 * loss_at(t.double()))
    assert not torch.equal(saved["losses"], sampler.state_dict()["losses"])  # a copy


def test_losses_that_are_not_finite_are_ignored():
    sampler = trained()
    before = sampler.state_dict()
    sampler.update(torch.tensor([0, 1, 0]), torch.tensor([float("nan"), float("inf"), float("nan")]))
    assert all(torch.equal(before[name], value) for name, value in sampler.state_dict().items())


def test_state_of_another_sampler_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"must hold \{'losses': \(40, 10\)"):
        LossSecondMomentTimesteps(40).load_state_dict(LossSecondMomentTimesteps(41).state_dict())
    with pytest.raises(ValueError, match="must hold {}"):
        make_timestep_sampler("uniform", 40).load_state_dict(trained().state_dict())
    with pytest.raises(ValueError, match="timestep_sampler must be one of.*'importance'"):
        make_timestep_sampler("importance", 40)
    with pytest.raises(ValueError, match="T must be an integer in 1..100000, got 0"):
        make_timestep_sampler("uniform", 0)
