"""Deterministic randomness: what is drawn depends on (seed, purpose, index), not on what was drawn before."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ddpm_hf.checks import check_int


def make_generator(device: torch.device | str, seed: int, purpose: str, *index: int) -> torch.Generator:
    """A generator whose numbers depend only on (seed, purpose, index) and the type of the device."""
    return torch.Generator(device=device).manual_seed(_derived_seed(seed, purpose, *index))


def seed_dropout(seed: int, step: int, position: int) -> None:
    """Seed torch's global generator, which draws the dropout masks, from (seed, step, position).

    `position` is the index, in the global batch, of the first example of the micro-batch. The masks of a micro-batch
    are drawn together, so they also depend on its size.
    """
    torch.manual_seed(_derived_seed(seed, "dropout", step, position))


def _derived_seed(seed: int, purpose: str, *index: int) -> int:
    entropy = [seed, int.from_bytes(purpose.encode(), "big"), *index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One generator for each of a seed's images, given by index. They are on the CPU, so that the noise is the same
    on every device.

    Raises ValueError unless the seed and the indices are integers of at least 0.
    """
    seed = check_int("seed", seed, 0)
    return [make_generator("cpu", seed, "sample", check_int("index", index, 0)) for index in indices]


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each seed, that of its image 0.

    Raises ValueError unless `seeds` holds at least one integer, all of them at least 0.
    """
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable) or not len(seeds := list(seeds)):
        raise ValueError(f"seeds must be a list of at least one integer, got {seeds!r}.")
    return [image_generators(check_int(f"seeds[{i}]", seed, 0), [0])[0] for i, seed in enumerate(seeds)]
