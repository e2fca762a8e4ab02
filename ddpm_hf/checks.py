"""Checks of arguments. Error messages name the argument, what is accepted, and the given value."""

import math
import reprlib
from collections.abc import Callable, Collection
from numbers import Integral, Number, Real
from typing import Any

import numpy as np


class ArgumentTypeError(TypeError, ValueError):
    """An argument of the wrong type. Also a ValueError, for callers that handle all invalid input alike."""


def check_int(name: str, value: Any, minimum: int | None = None, maximum: int | None = None, note: str = "") -> int:
    """`value` as an int, in minimum..maximum (both inclusive; a maximum requires a minimum).

    `note` follows the range in the message, as in "an integer in 1..1000, the model's own T". Raises ArgumentTypeError if
    `value` is not an integer (bool is not accepted, NumPy integers are), ValueError if it is out of range.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if is_integer and (minimum is None or value >= minimum) and (maximum is None or value <= maximum):
        return int(value)
    error = ValueError if is_integer else ArgumentTypeError
    raise error(f"{name} must be {expected_int(minimum, maximum)}{note and ', ' + note}, got {shown(value)}.")


def expected_int(minimum: int | None = None, maximum: int | None = None) -> str:
    """The words of error messages and help texts for an integer in a range."""
    if maximum is not None:
        return f"an integer in {minimum}..{maximum}"
    return "an integer" if minimum is None else f"an integer of at least {minimum}"


def check_float(name: str, value: Any, interval: str = "(-inf, inf)") -> float:
    """`value` as a float in an interval such as "[0, 1)", where a bracket includes the end.

    Raises ArgumentTypeError if `value` is not a real number (bool is not accepted), ValueError if it is infinite, NaN or
    outside the interval.
    """
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    if is_real and _is_within(value, interval):
        return float(value)
    error = ValueError if is_real else ArgumentTypeError
    raise error(f"{name} must be {expected_float(interval)}, got {shown(value)}.")


def expected_float(interval: str) -> str:
    """The words of error messages and help texts for a number in an interval."""
    return f"a finite number in {interval}"


def _is_within(value: Real, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    try:
        return above and below and math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def check_bool(name: str, value: Any) -> bool:
    """`value` as a bool. Raises ArgumentTypeError if it is not one (NumPy's are accepted): "False" would count as true."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ArgumentTypeError(f"{name} must be True or False, got {shown(value)}.")


def check_text(name: str, value: Any) -> str:
    """`value` as it is. Raises ArgumentTypeError if it is not a str, ValueError if it is empty or cannot be in a file's name."""
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be text, got {shown(value)}.")
    if not value or "\0" in value or value.encode(errors="replace").decode() != value:
        raise ValueError(f"{name} must be text that is not empty, in valid characters, got {shown(value)}.")
    return value


def check_choice(name: str, value: Any, choices: Collection) -> None:
    """Raises ValueError if `value` is not one of `choices`."""
    if not any(value is choice or _is_same(value, choice) for choice in choices):
        raise ValueError(f"{name} must be one of {list(choices)}, got {shown(value)}.")


def _is_same(value: Any, choice: Any) -> bool:
    # Of the same kind first: == of arrays and tensors is no bool, and True == 1 == 1.0.
    kind = str if isinstance(choice, str) else Integral if isinstance(choice, Integral) else Number
    return isinstance(value, kind) and isinstance(value, bool) == isinstance(choice, bool) and bool(value == choice)


def check_list(name: str, values: Any, check: Callable[[str, Any], Any]) -> list:
    """What `check(name, value)` returns for each item of a list, a tuple or another sequence that is not text.

    Raises ArgumentTypeError if `values` is no such sequence, ValueError if it is empty, and the errors of `check`.
    """
    try:
        items = None if isinstance(values, (str, bytes, dict, set)) else list(values)
    except TypeError:
        items = None
    if items is None:
        raise ArgumentTypeError(f"{name} must be a list, got {shown(values)}.")
    if not items:
        raise ValueError(f"{name} must be a list with at least one item, got {shown(values)}.")
    return [check(name, item) for item in items]


def check_device(name: str, value: Any, computes: bool = False):
    """`value` as a torch.device. Raises ValueError if this machine does not have it; `computes` excludes "meta"."""
    import torch  # not above: options are checked before torch is imported

    try:
        device = torch.device(value)
        probe = torch.zeros(1, device=device)
        if computes:
            probe.item()
    except Exception as error:  # of many types, by device
        raise ValueError(f"{name} must be a device of this machine, such as 'cpu', got {shown(value)}.") from error
    return device


class _Shortened(reprlib.Repr):
    def repr_instance(self, x, level):
        has_own = type(x).__repr__ is not object.__repr__
        return super().repr_instance(x, level) if has_own else f"an object of {type(x).__name__}"

    def repr_int(self, x, level):
        # Python refuses to write integers of more than 4300 digits.
        return super().repr_int(x, level) if abs(x) < 10**100 else f"an integer of {x.bit_length()} bits"


_SHORTENED = _Shortened()
_SHORTENED.maxlevel, _SHORTENED.maxother, _SHORTENED.maxstring, _SHORTENED.maxlong = 4, 300, 300, 120
_SHORTENED.maxlist = _SHORTENED.maxtuple = _SHORTENED.maxdict = _SHORTENED.maxset = 20


def shown(value: Any) -> str:
    """`repr(value)` for an error message, shortened where it is long."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= 400 else f"{text[:300]} ... {text[-50:]}"
