"""Averages rebuilt after training against averages computed directly from the weights of every step."""

import pytest
import torch

from ddpm_hf.training.posthoc_ema import (
    MAX_SIGMA,
    PowerEMA,
    drop_snapshots_after,
    gamma_from_sigma,
    inner_products,
    list_snapshots,
    plan_rebuild,
    profile_weights,
    read_snapshot,
    rebuild,
    save_snapshot,
)

BATCH, STEPS = 8, 400


class ScriptedModel(torch.nn.Module):
    """A model with 6 parameters whose values are set from a row of `path`."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))

    def set_weights(self, row):
        self.weight.data.copy_(row[:4].reshape(2, 2))
        self.bias.data.copy_(row[4:])


def path():
    """Weights of each step, (steps, 6), float64: a drift that settles, with oscillations."""
    k = torch.arange(1, STEPS + 1, dtype=torch.float64)[:, None]
    rates = torch.tensor([0.01, 0.03, 0.1, 0.2, 0.5, 1.0], dtype=torch.float64)
    return 3 + 2 * torch.exp(-k * rates / 4) + 0.3 * torch.sin(k * rates)


def direct(sigma, steps=STEPS):
    """Σ_k θ(k) ∫ p over step k, by the integral of the power function."""
    k, power = torch.arange(steps + 1, dtype=torch.float64) / steps, gamma_from_sigma(sigma) + 1
    return (k**power).diff() @ path()[:steps]


def flat(state):
    return torch.cat([state["weight"].flatten(), state["bias"].flatten()]).double()


def train(folder, every=25, steps=STEPS):
    model = ScriptedModel()
    averages = PowerEMA(model)
    for step, row in enumerate(path()[:steps], start=1):
        model.set_weights(row.float())
        averages.update(model, step * BATCH, BATCH)
        if step % every == 0:
            save_snapshot(folder, step * BATCH, averages.state_dict())
    return list_snapshots(folder)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    return train(tmp_path_factory.mktemp("snapshots"))


def sigma_from_gamma(gamma):
    """EDM2, eq. 15."""
    return (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5


def test_the_exponent_of_a_length_inverts_equation_15():
    for sigma in (1e-3, 0.02, 0.05, 0.1, 0.2, 0.28):
        assert sigma_from_gamma(gamma_from_sigma(sigma)) == pytest.approx(sigma, rel=1e-9)
    # The exponents that EDM2 gives.
    assert gamma_from_sigma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_from_sigma(0.10) == pytest.approx(6.94, abs=5e-3)
    assert gamma_from_sigma(MAX_SIGMA) == pytest.approx(0, abs=1e-9)


def test_a_length_is_the_standard_deviation_of_the_profile():
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = (gamma_from_sigma(0.1) + 1) * tau ** gamma_from_sigma(0.1)
    mean = (p * tau).mean()
    assert (p * (tau - mean) ** 2).mean().sqrt().item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("sigma", [0, -0.1, 0.3, float("nan")])
def test_a_length_outside_the_range_is_rejected(sigma):
    with pytest.raises(ValueError, match=r"length σ_rel must be a finite number in \(1e-06, 0.28867\d*\]"):
        gamma_from_sigma(sigma)


def test_inner_products_match_numerical_integrals():
    gammas, times = torch.tensor([[16.97, 6.94, 2.0], [1.0, 0.7, 0.3]], dtype=torch.float64)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    profiles = torch.stack([(g + 1) * tau**g / t ** (g + 1) * (tau <= t) for g, t in zip(gammas, times)])
    numeric = profiles @ profiles.T / len(tau)
    torch.testing.assert_close(
        inner_products(gammas[:, None], times[:, None], gammas, times), numeric, rtol=1e-4, atol=1e-9
    )


def test_each_tracked_average_is_the_exact_average_over_all_steps(snapshots):
    for snapshot in snapshots[3::4]:
        tensors = read_snapshot(snapshot)
        for sigma in (0.05, 0.1):
            got = flat({name: tensors[f"{sigma}/{name}"] for name in ("weight", "bias")})
            torch.testing.assert_close(got, direct(sigma, snapshot.images_seen // BATCH), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.06, 0.075, 0.1, 0.12, 0.15, 0.2])
def test_a_rebuilt_average_is_exact_up_to_its_profile_error(snapshots, sigma):
    plan = plan_rebuild(snapshots, sigma)
    difference = (flat(rebuild(plan)) - direct(sigma)).abs()
    # Cauchy-Schwarz: |∫(p̂ − p)(θ − c)| ≤ ‖p̂ − p‖ · ‖θ − c‖ for any c, since both profiles have integral 1.
    p = torch.tensor([gamma_from_sigma(sigma), 1.0], dtype=torch.float64)
    p_norm = inner_products(*p, *p).sqrt().item()
    deviation = (path() - path().mean(0)).square().mean(0).sqrt()
    assert (difference <= plan.profile_error * p_norm * deviation + 1e-5).all()
    assert difference.max() < 0.02 and plan.profile_error < 0.05
    # Averages of other lengths differ by more than this, so that the comparison is meaningful.
    assert (direct(sigma) - direct(sigma * 1.3)).abs().max() > difference.max()


def test_a_tracked_average_is_rebuilt_exactly(snapshots):
    for sigma in (0.05, 0.1):
        tensors, plan = read_snapshot(snapshots[7]), plan_rebuild(snapshots, sigma, snapshots[7].images_seen)
        rebuilt = rebuild(plan)
        for name in ("weight", "bias"):
            torch.testing.assert_close(rebuilt[name], tensors[f"{sigma}/{name}"], rtol=1e-6, atol=1e-6)
        assert plan.profile_error < 1e-6 and plan.images_seen == snapshots[7].images_seen


def test_the_weights_sum_to_one_and_minimize_the_profile_error():
    profiles = [(gamma, t / 6) for t in range(1, 7) for gamma in (16.97, 6.94)]
    gammas, times = torch.tensor(profiles, dtype=torch.float64).T
    p = torch.tensor([gamma_from_sigma(0.15), 1.0], dtype=torch.float64)
    x, error = profile_weights(gammas, times, *p.tolist())
    assert x.sum().item() == pytest.approx(1, abs=1e-12)
    gram = inner_products(gammas[:, None], times[:, None], gammas, times)
    b = inner_products(gammas, times, *p)
    # Lagrange condition: all components of the gradient are equal.
    gradient = gram @ x - b
    torch.testing.assert_close(gradient, gradient.mean().expand_as(gradient), rtol=0, atol=1e-8)
    assert 0 < error < 0.1


def test_more_snapshots_give_a_smaller_profile_error(tmp_path, snapshots):
    few = train(tmp_path, every=100)
    for sigma in (0.03, 0.15):
        assert plan_rebuild(snapshots, sigma).profile_error < 0.3 * plan_rebuild(few, sigma).profile_error


def test_a_length_out_of_range_of_the_snapshots_is_rejected(tmp_path):
    few = train(tmp_path, every=200)
    with pytest.raises(ValueError, match="σ_rel = 0.25 .*out of the range of these 2 snapshots"):
        plan_rebuild(few, 0.25)
    with pytest.raises(ValueError, match="no snapshots"):
        plan_rebuild([], 0.1)
    with pytest.raises(ValueError, match="images_seen must be at least 1600"):
        plan_rebuild(few, 0.1, 100)


def test_a_damaged_snapshot_is_named(tmp_path):
    (snapshot,) = train(tmp_path, every=50, steps=50)
    content = bytearray(snapshot.file.read_bytes())
    content[-2] ^= 4
    snapshot.file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{snapshot.file.name} is damaged"):
        rebuild(plan_rebuild([snapshot], 0.1))
    snapshot.file.write_bytes(content[:40])
    with pytest.raises(ValueError, match=f"{snapshot.file.name} is not a snapshot"):
        list_snapshots(tmp_path)


def test_snapshots_after_the_resumed_step_are_deleted(tmp_path):
    kept = [s.images_seen for s in train(tmp_path, every=100)]
    drop_snapshots_after(tmp_path, kept[1])
    assert [s.images_seen for s in list_snapshots(tmp_path)] == kept[:2]


def test_loaded_averages_continue_bit_identically():
    model = ScriptedModel()
    straight, stopped = PowerEMA(model), PowerEMA(model)
    for step, row in enumerate(path()[:20].float(), start=1):
        model.set_weights(row)
        straight.update(model, step * BATCH, BATCH)
        stopped.update(model, step * BATCH, BATCH)
        if step == 9:
            saved = {name: value.clone() for name, value in stopped.state_dict().items()}
            stopped = PowerEMA(model)
            stopped.load_state_dict(saved)
    assert all(torch.equal(value, stopped.state_dict()[name]) for name, value in straight.state_dict().items())
    with pytest.raises(ValueError, match="other parameters"):
        PowerEMA(model, [0.07]).load_state_dict(saved)
