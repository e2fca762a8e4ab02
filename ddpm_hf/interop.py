"""Save in the format of diffusers: the JSON files name diffusers' classes and hold only arguments that those take."""

import inspect
import json
from numbers import Real
from pathlib import Path

import diffusers
import numpy as np

from ddpm_hf.checks import ArgumentTypeError
from ddpm_hf.model_files import class_name, read_json_object


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

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        # Called by diffusers' load_config (seen in 0.42), whose own reader takes a list, or null, for a configuration.
        config = read_json_object(json_file)
        class_name(json_file, config, cls.__name__)
        config.pop("_use_default_values", None)  # never saved: arguments listed there would be ignored
        return config

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """`ConfigMixin.from_config`. Raises TypeError for an argument that the class does not have."""
        unknown = sorted(name for name in kwargs if name not in inspect.signature(cls).parameters)
        if unknown and not return_unused_kwargs and isinstance(config, dict):
            raise ArgumentTypeError(f"{cls.__name__} has no argument {' and no '.join(unknown)}.")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The `from_pretrained` of diffusers. Raises ValueError or TypeError, naming the file, if a configuration does not
        describe an object of this class."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            if str(pretrained_model_name_or_path) in str(error):
                raise
            kind = ArgumentTypeError if isinstance(error, TypeError) else ValueError
            source = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", cls.config_name)
            raise kind(f"{source} does not describe a {cls.__name__}: {error}") from error

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
