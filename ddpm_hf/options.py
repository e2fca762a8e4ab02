"""Options of a script: the fields of a dataclass, each with its type, range and help text. The check of its value, the
command line (`ddpm_hf.training.option_parser`), `--help` and docs/options.md follow from them.

Nothing here imports torch, so that `--help` answers quickly.
"""

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from functools import cache, partial
from numbers import Number, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ddpm_hf.checks import (
    check_bool,
    check_choice,
    check_float,
    check_int,
    check_list,
    check_text,
    expected_float,
    expected_int,
    shown,
)

Options = TypeVar("Options")
LARGEST = 2**63 - 1  # of the integers of torch and NumPy


def option(default: Any, help: str, interval: str | None = None, group: str | None = None) -> Any:
    """A field of a dataclass of options.

    Args:
        default: MISSING for an option that must be given.
        help: what the option is for.
        interval: of the numbers that are accepted, such as "[0, 1)", where a bracket includes the end, infinity too.
            Options of numbers must have one. That of a list is for each item.
        group: heading, in `--help` and docs/options.md, of this option and those after it.
    """
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help, "interval": interval, "group": group})


@cache
def kinds(cls: type) -> dict[str, tuple[Any, bool, bool]]:
    """For each option: the type of a value (bool, int, float, str, or a Literal), whether the option is a list of such
    values, and whether it may be None."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        (kind,) = (part for part in parts if part is not type(None))
        is_list = get_origin(kind) is list
        found[name] = (get_args(kind)[0] if is_list else kind, is_list, type(None) in parts)
    return found


def check_options(options: Any) -> None:
    """Check the value of each option by itself, and make numbers of NumPy those of Python.

    Raises ValueError or TypeError that names the option, the value, and what is accepted.
    """
    for spec in fields(options):
        kind, is_list, is_optional = kinds(type(options))[spec.name]
        value = getattr(options, spec.name)
        if value is None and is_optional:
            continue
        if spec.default == "" and isinstance(value, str) and not value:  # not given
            continue

        check = partial(_checked, kind, spec.metadata["interval"], is_optional and not is_list)
        if is_list:  # of which one item may be given without a list
            value = check_list(spec.name, [value] if isinstance(value, (str, Number)) else value, check)
        else:
            value = check(spec.name, value)
        object.__setattr__(options, spec.name, value)


def _checked(kind: Any, interval: str | None, is_optional: bool, name: str, value: Any) -> Any:
    if kind is bool:
        return check_bool(name, value)
    if kind is str:
        return check_text(name, value)
    if kind is int:
        value = check_int(name, value, *_limits(interval))
        if not -LARGEST <= value <= LARGEST:
            raise ValueError(f"{name} must be an integer of at most 64 bits, got {shown(value)}.")
        return value
    if kind is float:
        if interval.endswith("inf]") and isinstance(value, Real) and value == math.inf:
            return math.inf
        number = check_float(name, value, interval)
        return value if type(value) is int else number  # config.yaml keeps the number as it was given
    check_choice(name, value, (*[None] * is_optional, *get_args(kind)))
    return value


def _limits(interval: str) -> tuple[int, int | None]:
    low, high = interval.strip("[]()").split(",")
    return int(low), None if "inf" in high else int(high)


def accepted(cls: type, spec: Field) -> str:
    """What an option accepts, in words."""
    kind, is_list, is_optional = kinds(cls)[spec.name]
    if get_origin(kind) is Literal:
        words = "one of " + ", ".join(str(choice) for choice in get_args(kind))
    elif kind is int:
        words = expected_int(*_limits(spec.metadata["interval"]))
    elif kind is float:
        words = expected_float(spec.metadata["interval"]).replace(" in (-inf, inf)", "")
        words = words.replace("a finite", "a") if spec.metadata["interval"].endswith("inf]") else words
    else:
        words = {bool: "true or false", str: "text"}[kind]
    return ("a list, each " if is_list else "") + words + (", or None" if is_optional else "")


def unknown_option(name: str, known: Iterable[str], other_names: Mapping[str, str] | None = None) -> str:
    """What to say about an option that does not exist: the one that was meant, if it can be told.

    Args:
        name: as it was given, with or without dashes and a value.
        known: the names of all options.
        other_names: what other programs call an option, and what to use here: an option with its dashes, or a sentence.
    """
    word = name.split("=")[0]
    plain = word.lstrip("-").replace("-", "_")
    meant = (other_names or {}).get(plain)
    if meant is None and (close := get_close_matches(plain, list(known), 1, 0.75)):
        meant = f"--{close[0]}"
    if meant is None:
        return f"unknown option {shown(word)}; --help lists all."
    return f"unknown option {word}: " + (f"did you mean {meant}?" if meant.startswith("--") else meant)


def default_of(spec: Field) -> Any:
    """The default of an option; MISSING if it must be given."""
    return spec.default if spec.default_factory is MISSING else spec.default_factory()
