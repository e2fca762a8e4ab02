"""Options of a script: the fields of a dataclass, each with its type, range and help text, for the check of its value, the
command line, `--help` and docs/options.md alike.

Nothing here imports torch, so that `--help` answers quickly.
"""

import argparse
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
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
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def option(default: Any, help: str, interval: str | None = None) -> Any:
    """A field of a dataclass of options.

    Args:
        default: MISSING for an option that must be given.
        help: what the option is for.
        interval: of the numbers that are accepted, such as "[0, 1)", where a bracket includes the end, infinity too.
            Options of numbers must have one. That of a list is for each item.
    """
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help, "interval": interval})


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

        check = partial(_checked, kind, spec.metadata["interval"], is_optional)
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


def default_of(spec: Field) -> Any:
    """The default of an option; MISSING if it must be given."""
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


class OptionParser(argparse.ArgumentParser):
    """The command line of a dataclass of options: `--name value`; lists as `--name value value`; flags as `--name`,
    `--name false` and, for those that are on by default, `--no_name`. `--name None` stands for None."""

    def __init__(self, cls: type, description: str):
        super().__init__(prog=None, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.cls = cls
        for spec in fields(cls):
            kind, is_list, _ = kinds(cls)[spec.name]
            default = default_of(spec)
            words = accepted(cls, spec) + ("" if default is MISSING else f"; default: {default!r}")
            help, name = f"{spec.metadata['help']} ({words})".replace("%", "%%"), spec.name
            names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            nargs = {"nargs": "+"} if is_list else {"nargs": "?", "const": "true"} if kind is bool else {}
            self.add_argument(*names, dest=name, metavar="VALUE", help=help, **nargs)
            if kind is bool and default is True:
                names = dict.fromkeys((f"--no_{name}", f"--no-{name.replace('_', '-')}"))
                self.add_argument(*names, dest=name, action="store_const", const="false", help=f"{name} false")

    def error(self, message: str) -> None:
        raise ValueError(message)

    def given(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """The options in a command line (None: that of the process), not checked. Raises ValueError for unknown ones."""
        found, unknown = self.parse_known_args(sys.argv[1:] if arguments is None else arguments)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]}; --help lists all.")
        values = vars(found)
        for name in values.keys() & kinds(self.cls).keys():
            kind, is_list, is_optional = kinds(self.cls)[name]
            texts = values[name]
            if is_optional and texts in ("None", ["None"]):
                values[name] = None
            else:
                values[name] = [_from_text(t, kind) for t in texts] if is_list else _from_text(texts, kind)
        return values

    def parse(self, arguments: Sequence[str] | None = None) -> Any:
        """The options of a command line. Raises ValueError or TypeError that names the option."""
        values = self.given(arguments)
        missing = [s.name for s in fields(self.cls) if default_of(s) is MISSING and s.name not in values]
        if missing:
            raise ValueError(f"--{missing[0]} must be given; --help lists all options.")
        return self.cls(**values)


def _from_text(text: str, kind: Any) -> Any:
    """The value that a text gives; the text itself, for the check to refuse, if it gives none of this kind."""
    if kind is bool:
        return BOOLS.get(text.lower(), text)
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}.get(text, text)
    try:
        return text if kind is str else kind(text)
    except ValueError:
        return text
