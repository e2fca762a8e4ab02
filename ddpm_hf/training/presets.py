"""The configuration of a command line: a preset from configs/*.yaml, overridden by flags.

Nothing here imports torch at module level, so that `--help` answers quickly.
"""

import importlib.resources
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.checks import shown
from ddpm_hf.options import unknown_option
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.config_file import read_options
from ddpm_hf.training.config_rules import LENGTHS
from ddpm_hf.training.option_parser import OptionParser
from ddpm_hf.training.other_names import OTHER_NAMES

CONFIGS = importlib.resources.files("ddpm_hf.scripts") / "configs"
DEFAULT, FINE_TUNING = "digits", "fine-tuning"  # without --config, and with --init_from
# Options that exclude each other: one on the command line replaces those of the preset.
ALTERNATIVES = (LENGTHS, ("ema_halflife_images", "ema_decay"), ("validation_split", "validation_fraction"))


def presets() -> list[str]:
    """The names that `--config` accepts."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def parse_config(arguments: list[str] | None = None) -> TrainingConfig:
    """The configuration of a command line: `--config <preset or YAML file>` (default: digits, or fine-tuning with
    `--init_from`), then flags that override it. The model of `--init_from` gives the options of the network and of the
    diffusion. `--help` states the values of the preset.

    Raises ValueError or TypeError, naming the option, for values that do not describe a run.
    """
    words = sys.argv[1:] if arguments is None else arguments
    values = load_preset(_config_named(words)) if {"-h", "--help"} & set(words) else {}
    description = f"Train a DDPM. Defaults are those of --config {_config_named(words)}."
    parser = OptionParser(TrainingConfig, description, values, OTHER_NAMES)
    parser.add_argument(
        "--config",
        help=f"one of {', '.join(presets())}, or a YAML file (default: {DEFAULT}, and {FINE_TUNING} with --init_from)",
    )
    given = parser.given(words)
    name = given.pop("config", DEFAULT if given.get("init_from") is None else FINE_TUNING)
    preset = load_preset(name)
    if "dataset_name" in given and "dataset" not in given and name in presets():
        named = f"--dataset_name {given['dataset_name']}"
        raise ValueError(f"{named} only names the data in the model card: did you mean --dataset?")
    for group in ALTERNATIVES:
        if given.keys() & set(group):
            preset = {key: value for key, value in preset.items() if key not in group}
    options = preset | given
    if options.get("init_from") is not None:
        from ddpm_hf.training.base_model import settled_by_base  # it imports torch, as below

        options = settled_by_base(options)
    config = TrainingConfig(**options)
    from ddpm_hf.training.build import check_builds  # not above: it imports torch

    check_builds(config)
    return config


def _config_named(words: Sequence[str]) -> str:
    """The preset or file that a command line names, before it is parsed."""
    values = [value for word, value in zip(words, words[1:]) if word == "--config"]
    values += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return values[-1] if values else DEFAULT


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
    known = TrainingConfig.__dataclass_fields__.keys()
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{file}: {unknown_option(unknown[0], known, OTHER_NAMES)}")
    return options
