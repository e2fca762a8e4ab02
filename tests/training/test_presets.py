"""Presets are valid configurations of the published sizes, and flags override them."""

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import UNet2DModelCustom
from ddpm_hf.options import default_of
from ddpm_hf.training.build import build_unet
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.presets import CONFIGS, load_preset, parse_config, presets

# Millions of parameters: as published (DDPM, appendix B; "50M" in the name of Improved DDPM's checkpoint), or counted.
PARAMETERS = {
    "butterflies-128": 113.7,
    "celebahq-256": 113.7,
    "cifar10": 35.7,
    "cifar10-conditional": 35.8,
    "cifar10-improved": 52.5,
    "cifar10-small": 5.6,
    "custom": 26.6,
    "digits": 0.7,
    "digits-conditional": 1.0,
    "fashion-mnist": 6.5,
    "flowers-64": 113.7,
    "folder-64": 5.1,
    "fine-tuning": 35.7,  # without a model to start from
    "lsun-bedroom-256": 113.7,
    "lsun-cat-256": 113.7,
    "lsun-church-256": 113.7,
    "mnist": 6.5,
    "mnist-small": 1.5,
    "photos": 1.1,
    "pokemon-64": 113.7,
}


def preset_config(name):
    options = load_preset(name)
    return TrainingConfig(**options | {"dataset": options.get("dataset") or "digits"})


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_preset_is_valid_and_has_the_published_network_size(name):
    config = preset_config(name)
    with torch.device("meta"):
        unet = build_unet(config)
    assert isinstance(unet, UNet2DModelCustom)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == PARAMETERS[name]
    assert config.output_dir == f"outputs/{name}"


def test_presets_are_those_with_a_known_network_size():
    assert presets() == sorted(PARAMETERS)


# Presets that state an estimate of their time, and where their data are on the Hub.
HUB_NAMES = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "butterflies-128": "huggan/smithsonian_butterflies_subset",
    "flowers-64": "huggan/flowers-102-categories",
    "pokemon-64": "huggan/pokemon",
    "cifar10-small": "uoft-cs/cifar10",
    "folder-64": None,
}


def forward_operations(config):
    """Floating-point operations of the network for one image."""
    with torch.device("meta"):
        unet, image = build_unet(config), torch.empty(1, config.channels, *config.resolution)
        zero = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            assert unet(image, zero, None if config.label_column is None else zero).sample.shape[2:] == image.shape[2:]
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [*HUB_NAMES, "cifar10-improved"])
def test_hours_of_presets_follow_from_those_of_cifar10(name):
    """The rule of docs/training.md: 85 V100 hours of cifar10, times the ratio of operations per image and of images."""
    config, cifar10 = preset_config(name), preset_config("cifar10")
    operations = forward_operations(config) / forward_operations(cifar10)
    hours = 85 * operations * config.total_images / cifar10.total_images
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert float(re.search(r"about ([\d.]+) V100\s+hours", text)[1]) == pytest.approx(hours, rel=0.05, abs=0.05)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_presets_of_learners_state_source_length_time_and_data(name):
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert load_preset(name).get("dataset") == HUB_NAMES[name]
    assert all(f"# {word}: " in text for word in ("Source", "Length", "Time"))
    assert f"{preset_config(name).total_images:,} images to see" in text
    assert f"{PARAMETERS[name]} M parameters" in text.replace("\n# ", " ") and "an estimate" in text


def test_the_presets_of_the_paper_have_its_training_lengths():
    """Appendix B: steps, batch, rate, dropout, flips; the checkpoints' variance."""
    paper = {  # steps, batch, rate, dropout, flips, variance
        "cifar10": (800_000, 128, 2e-4, 0.1, True, "fixed_large"),
        "celebahq-256": (500_000, 64, 2e-5, 0.0, True, "fixed_small"),
        "lsun-bedroom-256": (2_400_000, 64, 2e-5, 0.0, False, "fixed_small"),
        "lsun-cat-256": (1_800_000, 64, 2e-5, 0.0, True, "fixed_small"),
        "lsun-church-256": (1_200_000, 64, 2e-5, 0.0, True, "fixed_small"),
    }
    for name, expected in paper.items():
        c = preset_config(name)
        assert (c.total_steps, c.batch_size, c.learning_rate, c.dropout, c.random_flip, c.variance_type) == expected
        assert (c.warmup_steps, c.adam_beta2, c.max_grad_norm, c.num_train_timesteps) == (5000, 0.999, 1.0, 1000)
        assert 0.5 ** (c.batch_size / c.ema_halflife_images) == pytest.approx(0.9999, abs=1e-6)


def test_a_preset_without_data_set_asks_for_one():
    with pytest.raises(ValueError, match="dataset must be given.*--dataset"):
        parse_config(["--config", "lsun-cat-256"])
    assert parse_config(["--config", "lsun-cat-256", "--dataset", "path/to/cats"]).dataset == "path/to/cats"


def test_the_digits_preset_is_the_default():
    assert parse_config([]) == TrainingConfig(**load_preset("digits"))


def test_flags_override_the_preset():
    config = parse_config(["--config", "digits", "--batch_size", "64", "--resolution", "16", "24", "--random_flip"])
    assert (config.batch_size, config.resolution, config.random_flip) == (64, [16, 24], True)
    assert config.learning_rate == load_preset("digits")["learning_rate"]


def test_a_saved_config_yaml_is_a_preset(tmp_path):
    config = parse_config(["--seed", "7"])
    (tmp_path / "mine.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "mine.yaml")]) == config


def test_an_unknown_preset_is_refused_with_the_list_of_presets():
    with pytest.raises(ValueError, match="'digit' is neither a preset .*digits"):
        parse_config(["--config", "digit"])


def test_an_unknown_option_in_a_file_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rte: 1")
    with pytest.raises(ValueError, match="mine.yaml: unknown option learning_rte: did you mean --learning_rate?"):
        parse_config(["--config", str(tmp_path / "mine.yaml")])


def test_an_unknown_flag_is_refused():
    with pytest.raises(ValueError, match="unknown option '--colour'; --help lists all"):
        parse_config(["--colour", "1"])


def test_the_name_of_the_card_is_not_taken_for_the_data(tmp_path):
    for preset in ("digits", "custom", "cifar10"):
        with pytest.raises(ValueError, match="--dataset_name a/b only names the data.* did you mean --dataset?"):
            parse_config(["--config", preset, "--dataset_name", "a/b"])
    assert parse_config(["--config", "custom", "--dataset", "x", "--dataset_name", "Birds"]).dataset_name == "Birds"
    (tmp_path / "mine.yaml").write_text(parse_config([]).to_yaml())
    assert parse_config(["--config", str(tmp_path / "mine.yaml"), "--dataset_name", "Birds"]).dataset_name == "Birds"


@pytest.mark.parametrize(
    ("option", "value", "replaced"),
    [
        ("num_steps", 7, {"total_images": 448}),
        ("num_epochs", 7, {"num_epochs": 7, "total_images": None}),
        ("total_images", 1280, {"total_images": 1280}),
        ("ema_decay", 0.9, {"ema_decay": 0.9, "ema_halflife_images": None}),
    ],
)
def test_an_alternative_replaces_that_of_the_preset(tmp_path, option, value, replaced):
    expected = dataclasses.replace(parse_config([]), **replaced)
    assert parse_config([f"--{option}", str(value)]) == expected
    if option != "ema_decay":
        text = parse_config(["--num_epochs", "3"]).to_yaml()
        (tmp_path / "mine.yaml").write_text(text)
        assert parse_config(["--config", str(tmp_path / "mine.yaml"), f"--{option}", str(value)]) == expected


@pytest.mark.parametrize("preset", [["--config", "photos"], ["--config=photos"], []])
def test_help_shows_groups_and_the_values_of_the_preset(preset, capsys):
    with pytest.raises(SystemExit):
        parse_config([*preset, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    config = parse_config(preset)
    for spec in dataclasses.fields(TrainingConfig):
        assert f"--{spec.name} " in printed
        value = load_preset("photos" if preset else "digits").get(spec.name, default_of(spec))
        assert f"default: {value!r})" in printed, spec.name
    assert f"default: {config.batch_size})" in printed
    groups = [spec.metadata["group"] for spec in dataclasses.fields(TrainingConfig) if spec.metadata["group"]]
    assert groups[:3] == ["Where", "Fine-tuning", "Data"]
    assert all(f" {group}: --" in printed for group in groups)
