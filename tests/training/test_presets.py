"""Presets are valid configurations of the published sizes, and flags override them."""

import pytest
import torch

from ddpm_hf import UNet2DModelCustom
from ddpm_hf.training.build import build_unet
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.presets import load_preset, parse_config, presets

# Millions of parameters: as published (DDPM, appendix B; "50M" in the name of Improved DDPM's checkpoint), or counted.
PARAMETERS = {
    "celebahq-256": 113.7,
    "cifar10": 35.7,
    "cifar10-conditional": 35.8,
    "cifar10-improved": 52.5,
    "custom": 26.6,
    "digits": 0.7,
    "digits-conditional": 1.0,
    "fine-tuning": 35.7,  # without a model to start from
    "lsun-bedroom-256": 113.7,
    "lsun-cat-256": 113.7,
    "lsun-church-256": 113.7,
    "photos": 1.1,
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
        assert (c.num_steps, c.batch_size, c.learning_rate, c.dropout, c.random_flip, c.variance_type) == expected
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
    with pytest.raises(ValueError, match=r"\['learning_rte'\] is no option"):
        parse_config(["--config", str(tmp_path / "mine.yaml")])


def test_an_unknown_flag_is_refused():
    with pytest.raises(ValueError, match="unknown option --learning_rte; --help lists all"):
        parse_config(["--learning_rte", "1"])
