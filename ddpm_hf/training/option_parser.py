"""The command line of a script, from the dataclass of its options (see `ddpm_hf.options`)."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

from ddpm_hf.options import accepted, default_of, kinds, unknown_option

USAGE = "%(prog)s [--option value ...]"
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class OptionParser(argparse.ArgumentParser):
    """The command line of a dataclass of options: `--name value`; lists as `--name value value`; flags as `--name`,
    `--name false` and, for those that are on by default, `--no_name`. `--name None` stands for None."""

    def __init__(
        self,
        cls: type,
        description: str,
        defaults: Mapping[str, Any] | None = None,
        other_names: Mapping[str, str] | None = None,
    ):
        """
        Args:
            defaults: values that `--help` states instead of those of `cls`.
            other_names: see `unknown_option`.
        """
        super().__init__(usage=USAGE, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.cls, self.other_names, group = cls, other_names, self
        for spec in fields(cls):
            kind, is_list, _ = kinds(cls)[spec.name]
            default = (defaults or {}).get(spec.name, default_of(spec))
            if spec.metadata["group"]:
                group = self.add_argument_group(spec.metadata["group"])
            words = accepted(cls, spec) + ("" if default is MISSING else f"; default: {default!r}")
            help, name = f"{spec.metadata['help']} ({words})".replace("%", "%%"), spec.name
            names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            nargs = {"nargs": "+"} if is_list else {"nargs": "?", "const": "true"} if kind is bool else {}
            group.add_argument(*names, dest=name, metavar="VALUE", help=help, **nargs)
            if kind is bool and default is True:
                names = dict.fromkeys((f"--no_{name}", f"--no-{name.replace('_', '-')}"))
                group.add_argument(*names, dest=name, action="store_const", const="false", help=f"{name} false")

    def error(self, message: str) -> None:
        raise ValueError(message)

    def given(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """The options in a command line (None: that of the process), not checked. Raises ValueError for unknown ones."""
        values, unknown = self.known(arguments)
        if unknown:
            raise ValueError(unknown_option(unknown[0], kinds(self.cls), self.other_names))
        return values

    def known(self, arguments: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
        """The options in a command line, not checked, and the words that are none of them."""
        found, unknown = self.parse_known_args(sys.argv[1:] if arguments is None else arguments)
        values = vars(found)
        for name in values.keys() & kinds(self.cls).keys():
            kind, is_list, is_optional = kinds(self.cls)[name]
            texts = values[name]
            if is_optional and texts in ("None", ["None"]):
                values[name] = None
            else:
                values[name] = [_from_text(t, kind) for t in texts] if is_list else _from_text(texts, kind)
        return values, unknown

    def parse(self, arguments: Sequence[str] | None = None) -> Any:
        """The options of a command line. Raises ValueError or TypeError that names the option."""
        return self._checked(self.given(arguments))

    def parse_model_first(self, arguments: Sequence[str] | None = None) -> Any:
        """As `parse`. A first word that is no option is the value of --model."""
        words = list(sys.argv[1:] if arguments is None else arguments)
        return self.parse(["--model", *words] if words and not words[0].startswith("-") else words)

    def parse_known(self, arguments: Sequence[str] | None = None) -> tuple[Any, list[str]]:
        """The options of a command line, and the words that are none of them, for another script."""
        values, unknown = self.known(arguments)
        return self._checked(values), unknown

    def _checked(self, values: dict[str, Any]) -> Any:
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
