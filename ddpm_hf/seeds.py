"""Random numbers that have an address: what is drawn depends on (seed, purpose, index), on nothing that ran before."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import numpy as np
import torch


def make_generator(device: torch.device | str, seed: int, purpose: str, *index: int) -> torch.Generator:
    """A random generator whose numbers depend on (seed, purpose, index) and the kind of device alone."""
    return torch.Generator(device=device).manual_seed(_seed_at(seed, purpose, *index))


def seed_dropout(seed: int, step: int, position: int) -> None:
    """Make what torch draws unasked from now on, which is dropout's masks, depend on (seed, step, position) alone.

    `position`: of the first example, in the global batch, of those that go through the network together. Masks are
    drawn for all of them at once, so that they depend on their number as well.
    """
    torch.manual_seed(_seed_at(seed, "dropout", step, position))


def _seed_at(seed: int, purpose: str, *index: int) -> int:
    entropy = [seed, int.from_bytes(purpose.encode(), "big"), *index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator for each image of a seed, by the image's index: on the CPU, so that every device draws the same.

    Raises ValueError for a seed or an index that is no integer of at least 0.
    """
    check_seed("seed", seed)
    indices = list(indices)
    for index in indices:
        check_seed("index", index)
    return [make_generator("cpu", int(seed), "sample", int(i)) for i in indices]


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each seed: that of its image 0. Raises ValueError for an empty list and for wrong seeds."""
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable) or not len(seeds := list(seeds)):
        raise ValueError(f"seeds must be a list of at least one integer, got {seeds!r}.")
    for seed in seeds:
        check_seed("seeds", seed)
    return [make_generator("cpu", int(seed), "sample", 0) for seed in seeds]


def check_seed(name: str, value: int) -> None:
    """ValueError unless the value is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{name} must hold integers of at least 0, got {value!r}.")
