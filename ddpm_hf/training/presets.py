"""The configuration of a command line: a preset from configs/*.yaml, overridden by flags.

Nothing here imports torch at module level, so that `--help` answers quickly.
"""

import importlib.resources
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ddpm_hf.training.config import TrainingConfig

CONFIGS = importlib.resources.files("ddpm_hf.scripts") / "configs"


def presets() -> list[str]:
    """The names that `--config` accepts."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def parse_config(arguments: list[str] | None = None) -> TrainingConfig:
    """The configuration of a command line: `--config <preset or YAML file>` (default: digits), then flags that override it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(TrainingConfig, description="Train a DDPM.", allow_abbrev=False)
    parser.add_argument("--config", default="digits", help=f"one of {presets()}, or a YAML file")
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; --help lists all.")
    parser.set_defaults(**load_preset(known.config))
    config, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return config


def load_preset(name: str) -> dict:
    """The options in a preset or YAML file. Raises ValueError if there is no such file, and for unknown options."""
    file = CONFIGS / f"{name}.yaml" if name in presets() else Path(name)
    if not file.is_file():
        raise ValueError(f"--config {name!r} is neither a preset ({', '.join(presets())}) nor a YAML file.")
    options = yaml.safe_load(file.read_text()) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{file}: {options!r} is no option of a run.")
    if unknown := sorted(options.keys() - TrainingConfig.__dataclass_fields__.keys()):
        raise ValueError(f"{file}: {unknown} is no option of a run.")
    return options
