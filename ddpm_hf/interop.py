"""Save in the format of diffusers: the JSON files name diffusers' classes and hold only arguments that those take."""

import json
from numbers import Real

import diffusers
import numpy as np


class SavesAsStock:
    """Mixin for a ConfigMixin class that is the counterpart of `stock_class`, a class of diffusers.

    Saved configurations name the stock class, so that diffusers loads them without this package. Arguments that the
    stock class does not have (`own_arguments`) are left out of the file. A class for which this would change what
    stock computes overrides `to_json_string` and expresses the argument in stock's terms.
    """

    stock_class: type
    own_arguments: tuple[str, ...] = ()

    def register_to_config(self, **kwargs) -> None:
        # A configuration file holds no numbers of NumPy.
        super().register_to_config(**{name: _plain(value) for name, value in kwargs.items()})

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        for name in (*self.own_arguments, "_name_or_path"):  # the latter is often a path on the user's machine
            config.pop(name, None)
        config["_class_name"] = self.stock_class.__name__
        config["_diffusers_version"] = diffusers.__version__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _plain(value):
    """`value`, and the items of a list or tuple, with numbers of NumPy, and fractions, as those of Python."""
    if isinstance(value, (list, tuple)):
        # Not `type(value)`: a named tuple takes its items one by one.
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    if isinstance(value, np.generic):
        return value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, (int, float)) else value


def refuse_pickle(safe_serialization: bool) -> None:
    """Raise ValueError for `safe_serialization=False`: loading a pickle can execute code."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False would write weights as pickle; only safetensors are written.")


def stock_config(component) -> dict:
    """The configuration of a model or scheduler as its JSON file would hold it, in stock's terms."""
    config = json.loads(component.to_json_string())
    config.pop("_name_or_path", None)
    return config
