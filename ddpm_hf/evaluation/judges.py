"""Judges: modules that measure the quality of samples of one built-in data set.

A judge has these functions:

- `backbone()`: a backbone for `ddpm_hf.evaluation.features` that is made for these images.
- `judge(samples, steps, seed)`: the quality of samples (N, H, W, C) in [0, 1], made in `steps` steps from `seed`, as a
  dict that becomes "quality" in metrics.json.
- `card_section(quality)`: the quality in Markdown.
- `card_results(quality, dataset)`: the quality as a list of `EvalResult`, for the model card's metadata.
"""

import importlib
from types import ModuleType

from ddpm_hf.data.builtin import BUILTIN


def judge_of(dataset: str) -> ModuleType | None:
    """The judge of a built-in data set by its name; None for a data set without one."""
    builtin = BUILTIN.get(dataset)
    return importlib.import_module(builtin.judge) if builtin is not None and builtin.judge is not None else None
