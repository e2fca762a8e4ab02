"""Options: the table beside the fields is what the check, the command line and `--help` follow."""

import math
import runpy
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, get_origin

import numpy as np
import pytest
from ddpm_hf.scripts.choose_ema import EMAArguments
from ddpm_hf.scripts.publish import PublishArguments
from ddpm_hf.scripts.sample import SampleArguments

from ddpm_hf.convert.options import ConvertOptions
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.options import accepted, check_options, kinds, option
from ddpm_hf.training.config import TrainingConfig

TABLES = [TrainingConfig, SampleArguments, EvaluationOptions, EMAArguments, PublishArguments, ConvertOptions]


@dataclass
class Options:
    name: str = option(MISSING, "a name")
    steps: int = option(3, "a number", "[1, 9]")
    rate: float = option(0.5, "a rate", "(0, inf]")
    sizes: list[int] = option([1], "sizes", "[1, inf)")
    kind: Literal["a", "b"] | None = option(None, "a kind; 50% of them")
    bits: Literal[8, 16] = option(8, "bits")
    fast: bool = option(True, "a flag")
    other: str | None = option(None, "another name")

    def __post_init__(self):
        check_options(self)


@pytest.mark.parametrize("table", TABLES)
def test_every_number_has_a_range_and_every_option_a_help_text(table):
    for spec in fields(table):
        kind, _, _ = kinds(table)[spec.name]
        assert spec.metadata["help"], spec.name
        assert kind in (bool, int, float, str) or get_origin(kind) is Literal, spec.name
        assert (spec.metadata["interval"] is not None) == (kind in (int, float)), f"{spec.name} has no range"


def test_an_option_without_a_range_cannot_be_used():
    @dataclass
    class Careless:
        steps: int = option(3, "no range")

    with pytest.raises(AttributeError):
        check_options(Careless())


REFUSED = [
    ("steps", 0, "steps must be an integer in 1..9, got 0"),
    ("steps", "3", "steps must be an integer in 1..9, got '3'"),
    ("steps", True, "got True"),
    ("steps", None, "got None"),
    ("steps", 10**4000, "got an integer of 13288 bits"),
    ("rate", 0, r"rate must be a finite number in \(0, inf\], got 0"),
    ("rate", math.nan, "got nan"),
    ("rate", "inf", "got 'inf'"),
    ("rate", 10**400, "got an integer of 1329 bits"),
    ("sizes", [], "sizes must be a list with at least one item"),
    ("sizes", [1, 0], "sizes must be an integer of at least 1, got 0"),
    ("sizes", [2**63], "sizes must be an integer of at most 64 bits"),
    ("sizes", {1: 2}, "sizes must be a list, got {1: 2}"),
    ("sizes", None, "sizes must be a list, got None"),
    ("kind", "c", r"kind must be one of \[None, 'a', 'b'\], got 'c'"),
    ("kind", np.zeros(2), "kind must be one of"),
    ("bits", 8.0, r"bits must be one of \[8, 16\], got 8.0"),
    ("fast", "False", "fast must be True or False, got 'False'"),
    ("fast", 1, "fast must be True or False, got 1"),
    ("name", "", "name must be text that is not empty"),
    ("name", "a\0b", "name must be text that is not empty, in valid characters"),
    ("name", "\udc80", "in valid characters"),
    ("name", b"bytes", "name must be text, got b'bytes'"),
    ("other", 5, "other must be text, got 5"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_values_out_of_range_or_of_another_type_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Options(**{"name": "x", name: value})
    assert str(caught.value).startswith(f"{name} must be ")


def test_numbers_of_numpy_become_those_of_python():
    made = Options(name="x", steps=np.int64(4), rate=np.float32(0.5), sizes=(np.uint8(3), 4), fast=np.False_)
    assert made == Options(name="x", steps=4, rate=0.5, sizes=[3, 4], fast=False)
    assert {type(getattr(made, name)) for name in ("steps", "rate", "fast")} == {int, float, bool}
    assert type(made.sizes[0]) is int and Options(name="x", sizes=np.int64(3)).sizes == [3]


def test_what_an_option_accepts_is_said_in_words():
    assert accepted(Options, fields(Options)[2]) == "a number in (0, inf]"


def test_the_page_of_options_is_that_of_the_tables():
    page = Path(__file__).parents[1] / "docs" / "options.md"
    text = runpy.run_path(str(page.with_name("make_options.py")))["text"]()
    assert page.read_text(encoding="utf-8") == text, "run python docs/make_options.py"
