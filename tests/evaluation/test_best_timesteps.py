"""The table of best timesteps, written and read again."""

import json

import pytest
import torch

from ddpm_hf.diffusion.timestep_search import best_timesteps, jump_costs, predicted_bound
from ddpm_hf.evaluation.best_timesteps import best_timesteps_table, read_best_timesteps, timesteps_in_table
from tests.diffusion.helpers import linear_chain, variational_bound
from tests.diffusion.test_likelihood import pictures


@pytest.fixture
def chain():
    return linear_chain(T=12)


def bounds(chain):
    """Of two sets of images, for which a network that predicts no noise has different errors."""
    return [variational_bound(chain, lambda x, t: 0 * x, [pictures(4, 1, 4, 4, seed=s)], noise()) for s in (1, 2)]


def noise():
    return torch.Generator().manual_seed(0)


def test_timesteps_are_chosen_by_training_and_predicted_by_validation(chain):
    training, validation = bounds(chain)
    table = best_timesteps_table(chain, training, validation, steps=7)
    assert table["variance_type"] == "fixed_small" and [row["steps"] for row in table["rows"]] == [5, 7, 10]
    for row in table["rows"]:
        assert row["timesteps"] == best_timesteps(jump_costs(chain, training), row["steps"])
        predicted = predicted_bound(jump_costs(chain, validation), row["timesteps"])
        assert row["predicted_bits_per_dim"] == predicted
        assert predicted != pytest.approx(predicted_bound(jump_costs(chain, training), row["timesteps"]))


@pytest.mark.parametrize("steps", [1, 12, 1000])
def test_steps_without_a_choice_have_no_row(chain, steps):
    table = best_timesteps_table(chain, *bounds(chain), steps)
    assert [row["steps"] for row in table["rows"]] == [5, 10] and timesteps_in_table(table, steps) is None


def test_learned_variance_has_no_table(chain):
    learned = linear_chain(T=12, variance_type="learned_range")
    assert best_timesteps_table(learned, *bounds(chain), 5) is None and timesteps_in_table(None, 5) is None


def test_timesteps_are_read_from_the_folder_that_has_them(chain, tmp_path):
    table = best_timesteps_table(chain, *bounds(chain), 7)
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"evaluation": {"best_timesteps": table}}))
    timesteps = read_best_timesteps(tmp_path, 7, "fixed_small")
    assert timesteps == timesteps_in_table(table, 7) and len(timesteps) == 7
    with pytest.raises(ValueError, match="steps must be one of 5, 7, 10, .* got 8: evaluate with --steps"):
        read_best_timesteps(tmp_path, 8, "fixed_small")
    with pytest.raises(ValueError, match="best timesteps for variance_type='fixed_small', not for .* 'fixed_large'"):
        read_best_timesteps(tmp_path, 7, "fixed_large")


@pytest.mark.parametrize("content", [None, {}, {"training": {}}, {"evaluation": {"best_timesteps": None}}])
def test_folder_without_a_table_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="model must be a folder whose metrics.json has a table of best timesteps, got"
    ):
        read_best_timesteps(tmp_path, 5, "fixed_small")
