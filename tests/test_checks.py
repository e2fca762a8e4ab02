"""Checks of arguments: what is accepted, what is refused, and the messages."""

import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from ddpm_hf.checks import (
    ArgumentTypeError,
    check_bool,
    check_choice,
    check_device,
    check_float,
    check_int,
    check_list,
    check_text,
)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_check_int_returns_a_python_int(value):
    result = check_int("steps", value, 1, 3)
    assert type(result) is int and result == 3


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float32(3), "3", None, [3], torch.tensor(3), Fraction(3)])
def test_check_int_refuses_other_types(value):
    with pytest.raises(ArgumentTypeError, match=r"^steps must be an integer, got "):
        check_int("steps", value)


def test_an_argument_type_error_is_a_type_error_and_a_value_error():
    assert issubclass(ArgumentTypeError, TypeError) and issubclass(ArgumentTypeError, ValueError)


@pytest.mark.parametrize(
    "value, limits, message",
    [
        (0, {"minimum": 1}, "steps must be an integer of at least 1, got 0."),
        (-1, {"minimum": 0, "maximum": 5}, "steps must be an integer in 0..5, got -1."),
        (6, {"minimum": 0, "maximum": 5}, "steps must be an integer in 0..5, got 6."),
        (
            9,
            {"minimum": 1, "maximum": 8, "note": "the model's T"},
            "steps must be an integer in 1..8, the model's T, got 9.",
        ),
        (True, {"minimum": 1}, "steps must be an integer of at least 1, got True."),
    ],
)
def test_check_int_messages_name_argument_range_and_value(value, limits, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_int("steps", value, **limits)


@pytest.mark.parametrize("value", [0, 5])
def test_check_int_includes_both_ends(value):
    assert check_int("steps", value, 0, 5) == value


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_check_float_returns_a_python_float(value):
    result = check_float("rate", value)
    assert type(result) is float and result == value


@pytest.mark.parametrize("value", [True, np.True_, "0.5", None, [0.5], 1j, Decimal("0.5"), torch.tensor(0.5)])
def test_check_float_refuses_other_types(value):
    with pytest.raises(ArgumentTypeError, match=r"^rate must be a finite number in \[0, 1\), got "):
        check_float("rate", value, "[0, 1)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
@pytest.mark.parametrize("interval", ["(-inf, inf)", "[0, inf)", "[-inf, inf]"])
def test_check_float_refuses_nan_and_infinity(value, interval):
    with pytest.raises(ValueError, match=r"^rate must be a finite number in "):
        check_float("rate", value, interval)


@pytest.mark.parametrize(
    "interval, accepted, refused",
    [
        ("[0, 1]", [0, 0.5, 1], [-1e-9, 1 + 1e-9]),
        ("[0, 1)", [0, 0.5], [-1e-9, 1]),
        ("(0, 1]", [0.5, 1], [0, 1 + 1e-9]),
        ("(0, 1)", [0.5], [0, 1]),
        ("(0, inf)", [1e-300, 1e300], [0, -1]),
        ("[-1, 1]", [-1, 1], [-1.5, 1.5]),
    ],
)
def test_check_float_brackets_include_the_ends(interval, accepted, refused):
    for value in accepted:
        assert check_float("rate", value, interval) == value
    for value in refused:
        message = re.escape(f"rate must be a finite number in {interval}, got {value!r}.")
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_float("rate", value, interval)


@pytest.mark.parametrize("choices", [["linear", "cosine"], ("linear", "cosine"), {"linear": 1, "cosine": 2}])
def test_check_choice_accepts_the_choices_and_names_them(choices):
    check_choice("schedule", "cosine", choices)
    message = re.escape("schedule must be one of ['linear', 'cosine'], got 'sigmoid'.")
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_choice("schedule", "sigmoid", choices)


@pytest.mark.parametrize("choices", [{"linear": 1}, {"linear"}, ["linear"]])
@pytest.mark.parametrize("value", [["linear"], None, {}])
def test_check_choice_refuses_unhashable_values_and_none(value, choices):
    with pytest.raises(ValueError, match=r"^schedule must be one of \['linear'\], got "):
        check_choice("schedule", value, choices)


@pytest.mark.parametrize("value", [10**400, -(10**400), Fraction(10**400)], ids=range(3))
def test_check_float_refuses_what_no_float_can_hold(value):
    with pytest.raises(ValueError, match="^rate must be a finite number"):
        check_float("rate", value)


@pytest.mark.parametrize("value", [np.zeros(2), torch.zeros(2), True, 1.0, object(), float("nan")])
def test_check_choice_refuses_what_is_equal_but_of_another_kind(value):
    with pytest.raises(ValueError, match=r"^bits must be one of \[1, 'a'\]"):
        check_choice("bits", value, (1, "a"))
    check_choice("bits", np.int64(1), (1, "a"))


def test_check_bool_accepts_bools_of_numpy_alone_besides():
    assert check_bool("flag", np.True_) is True and check_bool("flag", False) is False
    for value in (1, 0, "False", None, torch.tensor(True)):
        with pytest.raises(ArgumentTypeError, match="^flag must be True or False, got "):
            check_bool("flag", value)


@pytest.mark.parametrize("value, kind", [(5, TypeError), (b"a", TypeError), ("", ValueError), ("a\0", ValueError)])
def test_check_text_refuses_what_cannot_name_a_file(value, kind):
    with pytest.raises(kind, match="^name must be text"):
        check_text("name", value)


@pytest.mark.parametrize("values", ["ab", {1: 2}, {1}, 5, None, [], torch.tensor(5)])
def test_check_list_refuses_what_is_no_list(values):
    with pytest.raises(ValueError, match="^sizes must be a list"):
        check_list("sizes", values, check_int)
    assert check_list("sizes", np.array([3, 4]), check_int) == [3, 4] == check_list("sizes", (3, 4), check_int)


@pytest.mark.parametrize("value", ["foo", "cuda:99", 1.5, None, "", torch.float32])
def test_check_device_refuses_what_this_machine_does_not_have(value):
    with pytest.raises(ValueError, match="^device must be a device of this machine, such as 'cpu', got "):
        check_device("device", value)
    assert check_device("device", "meta").type == "meta" and check_device("device", "cpu").type == "cpu"
    with pytest.raises(ValueError, match="got 'meta'"):
        check_device("device", "meta", computes=True)


@pytest.mark.parametrize("value", [10**5000, "x" * 10**6, [[0] * 10**5] * 10**5, object()], ids=range(4))
def test_values_in_messages_are_short(value):
    with pytest.raises(ValueError) as caught:
        check_int("steps", value, 0, 9)
    assert len(str(caught.value)) < 500
