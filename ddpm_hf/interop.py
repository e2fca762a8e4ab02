"""What is saved here is plain diffusers: the JSON files name the stock classes and hold the stock arguments only."""

import json

import diffusers


class SavesAsStock:
    """Mixin for a ConfigMixin class that is the counterpart of `stock_class`, a class of diffusers.

    Saved configurations carry the stock name, so that diffusers loads them with this package absent. Arguments that
    stock does not know (`own_arguments`) are left out of the file; a class for which leaving one out would change
    what stock computes overrides `to_json_string` and expresses it in stock's terms.
    """

    stock_class: type
    own_arguments: tuple[str, ...] = ()

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        for name in self.own_arguments:
            config.pop(name, None)
        config.pop("_name_or_path", None)  # where this copy was read from, often a path of somebody's machine
        config["_class_name"] = self.stock_class.__name__
        config["_diffusers_version"] = diffusers.__version__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def refuse_pickle(safe_serialization: bool) -> None:
    """ValueError for `safe_serialization=False`: a pickle can hold code, and whoever loads it would run that."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False would write weights as pickle; only safetensors are written.")


def stock_config(part) -> dict:
    """A part's configuration as its file would hold it: in stock's terms."""
    config = json.loads(part.to_json_string())
    config.pop("_name_or_path", None)
    return config
