"""Random numbers depend on (seed, purpose, index) alone."""

import itertools

import numpy as np
import pytest
import torch

from ddpm_hf.seeds import image_generators, make_generator, seed_dropout, seed_generators


def draw(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(8, generator=generator)


def test_generators_are_equal_for_equal_keys_and_different_for_others():
    keys = [(0, "sample", 0), (1, "sample", 0), (0, "sample", 1), (0, "noise", 0), (0, "sample", 0, 0)]
    draws = [draw(make_generator("cpu", *key)) for key in keys]
    torch.randn(5)  # what was drawn before does not matter
    assert all(torch.equal(draw(make_generator("cpu", *key)), x) for key, x in zip(keys[:4], draws[:4]))
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(draws[:4], 2))


def test_dropout_masks_depend_on_seed_step_and_position():
    def mask(*key: int) -> torch.Tensor:
        seed_dropout(*key)
        return torch.nn.functional.dropout(torch.ones(64))

    first = mask(0, 5, 16)
    torch.randn(3)
    assert torch.equal(mask(0, 5, 16), first)
    assert not any(torch.equal(mask(*key), first) for key in [(1, 5, 16), (0, 6, 16), (0, 5, 32)])


def test_image_generators_depend_on_the_index_alone():
    by_range, by_list = image_generators(3, range(4)), image_generators(np.int64(3), [3, 1])
    assert all(generator.device.type == "cpu" for generator in by_range)
    draws = [draw(generator) for generator in by_range]
    assert torch.equal(draw(by_list[0]), draws[3]) and torch.equal(draw(by_list[1]), draws[1])


def test_seed_generators_are_those_of_image_0():
    generators = seed_generators(np.array([4, 9]))
    expected = [image_generators(seed, [0])[0] for seed in (4, 9)]
    assert [draw(g).tolist() for g in generators] == [draw(g).tolist() for g in expected]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: image_generators(-1, [0]), "seed must be .* at least 0, got -1"),
        (lambda: image_generators(True, [0]), "seed must be .*, got True"),
        (lambda: image_generators(0, [0, 1.5]), "index must be .*, got 1.5"),
        (lambda: seed_generators([]), "seeds must be a list of at least one integer"),
        (lambda: seed_generators("12"), "seeds must be a list.*'12'"),
        (lambda: seed_generators(7), "seeds must be a list.*7"),
        (lambda: seed_generators([1, -2]), r"seeds\[1\] must be .* at least 0, got -2"),
    ],
)
def test_wrong_seeds_and_indices_are_refused_by_name(call, named):
    with pytest.raises(ValueError, match=named):
        call()
