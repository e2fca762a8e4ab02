"""Judges of samples: modules that know one built-in data set, and what the rest of the package asks of them."""

import importlib
from typing import Any, Protocol

import numpy as np
from huggingface_hub import EvalResult

from ddpm_hf.data.builtin import BUILTIN


class Judge(Protocol):
    """What such a module has."""

    def backbone(self) -> Any:
        """Features of its images for `ddpm_hf.evaluation.features`."""

    def judge(self, samples: np.ndarray, steps: int, seed: int) -> dict:
        """The quality of samples (N, H, W, C) in [0, 1], made in `steps` steps from `seed`: "quality" of metrics.json."""

    def card_section(self, quality: dict) -> str:
        """These figures in Markdown."""

    def card_results(self, quality: dict, dataset: str) -> list[EvalResult]:
        """These figures as the Hub keeps them."""


def judge_of(dataset: str) -> Judge | None:
    """The judge of a data set's samples; None where there is none."""
    builtin = BUILTIN.get(dataset)
    return importlib.import_module(builtin.judge) if builtin is not None and builtin.judge is not None else None
