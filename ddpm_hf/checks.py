"""Checks of arguments. Error messages name the argument, what is accepted, and the given value."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


class ArgumentTypeError(TypeError, ValueError):
    """An argument of the wrong type. Also a ValueError, for callers that handle all invalid input alike."""


def check_int(name: str, value: Any, minimum: int | None = None, maximum: int | None = None, note: str = "") -> int:
    """`value` as an int, in minimum..maximum (both inclusive; a maximum requires a minimum).

    `note` follows the range in the message, as in "an integer in 1..1000, the model's own T". Raises ArgumentTypeError if
    `value` is not an integer (bool is not accepted, NumPy integers are), ValueError if it is out of range.
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
    """`value` as a float in an interval such as "[0, 1)", where a bracket includes the end.

    Raises ArgumentTypeError if `value` is not a real number (bool is not accepted), ValueError if it is infinite, NaN or
    outside the interval.
    """
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
    """Raises ValueError if `value` is not one of `choices`."""
    if value not in list(choices):  # a list: the value may be unhashable
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")
