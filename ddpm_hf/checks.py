"""Checks of arguments. An error names the argument, what is accepted, and the value that was given."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


class ArgumentTypeError(TypeError, ValueError):
    """An argument of a wrong type: a TypeError, and a ValueError as well for callers that handle bad input of any kind."""


def check_int(name: str, value: Any, minimum: int | None = None, maximum: int | None = None, note: str = "") -> int:
    """`value` as an int. Raises ArgumentTypeError for what is no integer (True is none), ValueError outside the range.

    `note` follows the range in the message, as in "an integer in 1..1000, the model's own T".
    """
    expected = "an integer"
    if maximum is not None:
        expected += f" in {minimum}..{maximum}"
    elif minimum is not None:
        expected += f" of at least {minimum}"
    message = f"{name} must be {expected}{note and ', ' + note}, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentTypeError(message)
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise ValueError(message)
    return int(value)


def check_float(name: str, value: Any, interval: str = "(-inf, inf)") -> float:
    """`value` as a float in an interval such as "[0, 1)". Raises ArgumentTypeError for what is no number, ValueError for
    one that is not finite or lies outside."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    message = f"{name} must be a finite number in {interval}, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(message)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (math.isfinite(value) and above and below):
        raise ValueError(message)
    return float(value)


def check_choice(name: str, value: Any, choices: Collection) -> None:
    """ValueError unless `value` is one of `choices`."""
    try:
        is_known = value in choices
    except TypeError:  # a list, say, asked of a dict or a set
        is_known = False
    if not is_known:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")
