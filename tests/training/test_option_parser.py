"""The command line of a dataclass of options."""

import contextlib
import io
import math

import pytest

from ddpm_hf.training.option_parser import OptionParser
from tests.test_options import Options


def test_a_command_line_gives_typed_values():
    line = "--name 5 --steps 4 --rate inf --sizes 2 3 --kind a --bits 16 --no_fast --other None --steps 5"
    expected = Options(name="5", steps=5, rate=math.inf, sizes=[2, 3], kind="a", bits=16, fast=False)
    assert OptionParser(Options, "").parse(line.split()) == expected
    assert OptionParser(Options, "").parse(["--name", "x", "--fast", "false"]).fast is False
    assert OptionParser(Options, "").parse(["--name", "x", "--no_fast", "--fast"]).fast is True


@pytest.mark.parametrize(
    "line, message",
    [
        ("--steps x", "steps must be an integer in 1..9, got 'x'"),
        ("--steps 1.5", "steps must be an integer in 1..9, got '1.5'"),
        ("--steps", "--steps: expected one argument"),
        ("--rate nan", "rate must be .* got nan"),
        ("--kind c", r"kind must be one of \[None, 'a', 'b'\], got 'c'"),
        ("--bits 9", r"bits must be one of \[8, 16\], got '9'"),
        ("--fast maybe", "fast must be True or False, got 'maybe'"),
        ("--stepz 3", "unknown option --stepz: did you mean --steps?"),
        ("--stepz=3", "unknown option --stepz: did you mean --steps?"),
        ("--colour 3", "unknown option '--colour'; --help lists all"),
        ("word", "unknown option 'word'; --help lists all"),
    ],
)
def test_a_command_line_is_refused_with_the_sentences_of_the_check(line, message):
    with pytest.raises(ValueError, match=message):
        OptionParser(Options, "").parse(["--name", "x", *line.split()])


def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match="--name must be given"):
        OptionParser(Options, "").parse([])


def test_help_states_type_range_and_default():
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
        OptionParser(Options, "What it does.").parse(["--help"])
    words = " ".join(output.getvalue().split())
    assert "a number (an integer in 1..9; default: 3)" in words and "50% of them (one of a, b, or None;" in words
    assert "sizes (a list, each an integer of at least 1; default: [1])" in words
