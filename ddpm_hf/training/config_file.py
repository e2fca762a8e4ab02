"""Read a YAML file of options, of which nothing is executed, expanded, or repeated in error messages."""

import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**16
TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Plain scalars are those of YAML 1.2, so that `1e-3` is a number and `no` is text, as in JSON."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, "tags, anchors and aliases are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            is_name = isinstance(key, yaml.ScalarNode) and key.tag == TAG + "str"
            if not is_name or key.value in keys[:i]:
                problem = "the same option twice" if is_name else "a key that is not the name of an option"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]{0,99})", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
     r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
]:  # fmt: skip
    _Loader.add_implicit_resolver(TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def read_options(file: Path) -> dict[str, Any]:
    """The options in a YAML file, by name. Their values are not checked.

    Raises ValueError, naming the file, for what is no YAML file of options: one that cannot be read, is larger than
    64 KiB, is no text, or is no mapping of names to values. The message does not have the content of the file.
    """
    try:
        if not file.is_file():
            raise ValueError(f"{file} is no file of options.")
        with open(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file} is no file of options: it is larger than {MAX_BYTES:,} bytes.")
    try:
        options = yaml.load(data.decode("utf-8-sig"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        known = problem if problem and "'" not in problem else "it is not valid YAML"
        raise ValueError(f"{file}, line {mark.line + 1}, column {mark.column + 1}: {known}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{file} is no text file in UTF-8, so it is no file of options.") from None
    except RecursionError:
        raise ValueError(f"{file} is no file of options: it is nested too deeply.") from None
    if not isinstance(options, dict) or not options:
        found = "it is empty" if not options else "it is a list" if isinstance(options, list) else "it is one value"
        raise ValueError(f"{file} must have a line `name: value` for each option, but {found}.")
    return options


def read_run(folder: str | Path) -> dict[str, Any]:
    """The options that a model was trained with, of the config.yaml in its folder; {} for a model without one."""
    file = Path(folder) / "config.yaml"
    return read_options(file) if file.is_file() else {}
