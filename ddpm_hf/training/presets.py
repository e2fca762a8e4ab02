"""The configuration of a command line: a preset from configs/*.yaml, overridden by flags.

Nothing here imports torch at module level, so that `--help` answers quickly.
"""

import importlib.resources
from pathlib import Path

from ddpm_hf.checks import shown
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.config_file import read_options
from ddpm_hf.training.option_parser import OptionParser

CONFIGS = importlib.resources.files("ddpm_hf.scripts") / "configs"
FINE_TUNING = "fine-tuning"


def presets() -> list[str]:
    """The names that `--config` accepts."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def parse_config(arguments: list[str] | None = None) -> TrainingConfig:
    """The configuration of a command line: `--config <preset or YAML file>`, then flags that override it. The model of
    `--init_from` gives the options of the network and of the diffusion.

    Raises ValueError or TypeError, naming the option, for values that do not describe a run.
    """
    parser = OptionParser(TrainingConfig, "Train a DDPM.")
    parser.add_argument(
        "--config", help=f"one of {presets()}, or a YAML file (default: digits, and {FINE_TUNING} with --init_from)"
    )
    given = parser.given(arguments)
    preset = given.pop("config", "digits" if given.get("init_from") is None else FINE_TUNING)
    options = load_preset(preset) | given
    if options.get("init_from") is not None:
        from ddpm_hf.training.base_model import settled_by_base  # it imports torch, as below

        options = settled_by_base(options)
    config = TrainingConfig(**options)
    from ddpm_hf.training.build import check_builds  # not above: it imports torch

    check_builds(config)
    return config


def load_preset(name: str) -> dict:
    """The options in a preset or YAML file. Raises ValueError if there is no such file, and for unknown options."""
    file = CONFIGS / f"{name}.yaml" if name in presets() else Path(name)
    try:
        exists = file.exists()
    except OSError:  # such as a name that is too long
        exists = False
    if not exists:
        raise ValueError(f"--config {shown(name)} is neither a preset ({', '.join(presets())}) nor a YAML file.")
    options = read_options(file)
    if unknown := sorted(options.keys() - TrainingConfig.__dataclass_fields__.keys()):
        raise ValueError(f"{file}: {shown(unknown)} is no option of a run.")
    return options
