"""Judges: modules that measure the quality of samples of one built-in data set."""

import importlib
from typing import Any, Protocol

import numpy as np
from huggingface_hub import EvalResult

from ddpm_hf.data.builtin import BUILTIN


class Judge(Protocol):
    """The functions that such a module has."""

    def backbone(self) -> Any:
        """A backbone for `ddpm_hf.evaluation.features` that is made for these images."""

    def judge(self, samples: np.ndarray, steps: int, seed: int) -> dict:
        """The quality of samples (N, H, W, C) in [0, 1], made in `steps` steps from `seed`: "quality" in metrics.json."""

    def card_section(self, quality: dict) -> str:
        """The quality in Markdown."""

    def card_results(self, quality: dict, dataset: str) -> list[EvalResult]:
        """The quality as results in the model card's metadata."""


def judge_of(dataset: str) -> Judge | None:
    """The judge of a built-in data set by its name; None for a data set without one."""
    builtin = BUILTIN.get(dataset)
    return importlib.import_module(builtin.judge) if builtin is not None and builtin.judge is not None else None
