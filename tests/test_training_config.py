"""Options: presets are valid, flags override them, and what makes no run is refused with a reason."""

import dataclasses
from pathlib import Path

import pytest
from train import build
from training_config import TrainingConfig, load_preset, parse_config, presets

from ddpm_hf import UNet2DModelCustom

TINY = {"dataset": "digits", "resolution": [8], "block_out_channels": [8, 8], "total_images": 1000}


def test_every_preset_is_a_valid_configuration_whose_network_can_be_built():
    assert "digits" in presets()
    for name in presets():
        options = load_preset(name)
        config = TrainingConfig(**({"dataset": "digits"} | options))
        unet, scheduler = build(config)
        assert isinstance(unet, UNet2DModelCustom) and len(scheduler) == config.num_train_timesteps


def test_the_digits_preset_is_the_default():
    assert parse_config([]) == TrainingConfig(**load_preset("digits"))


def test_flags_override_the_preset():
    config = parse_config(["--config", "digits", "--batch_size", "64", "--resolution", "16", "24", "--random_flip"])
    assert (config.batch_size, config.resolution, config.random_flip) == (64, [16, 24], True)
    assert config.learning_rate == load_preset("digits")["learning_rate"]


def test_a_yaml_file_is_a_preset_of_one_s_own_and_a_resolved_configuration_can_be_used_again(tmp_path):
    config = parse_config(["--seed", "7"])
    (tmp_path / "mine.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "mine.yaml")]) == config


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="'digit' is neither a preset .*digits"):
        parse_config(["--config", "digit"])


def test_an_unknown_option_in_a_file_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rte: 1")
    with pytest.raises(ValueError, match=r"\['learning_rte'\] is no option"):
        parse_config(["--config", str(tmp_path / "mine.yaml")])


def test_an_unknown_flag_is_refused():
    with pytest.raises(ValueError, match="--learning_rte"):
        parse_config(["--learning_rte", "1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": [9]}, "9×9 cannot be halved 1 times.*multiples of 2"),
        ({"resolution": [8, 6], "block_out_channels": [8, 8, 8]}, "multiples of 4"),
        ({"resolution": [1, 2, 3]}, "resolution must be one number or height and width"),
        ({"dataset": ""}, "dataset must be given"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"total_images": 5}, "less than one batch"),
        ({"sample_steps": 1001}, "sample_steps must lie in 1..1000"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1, got 1.0"),
        ({"ema_decay": 0.99, "ema_halflife_images": 10}, "exclude each other; --ema_halflife_images 0 takes back"),
        ({"ema_halflife_images": 0}, "ema_halflife_images = 0 needs an ema_decay"),
        ({"ema_snapshot_every_images": -1}, "ema_snapshot_every_images must be at least 1, or 0 for never"),
        ({"validate_every_steps": -1}, "validate_every_steps must be at least 1, or 0 for never"),
        ({"validation_images": 0}, "validation_images must be at least 1"),
        ({"validation_split": "train"}, "validation_split must be another split"),
        ({"sample_every_steps": -1}, "sample_every_steps must be at least 1, or 0 for never"),
    ],
)
def test_what_makes_no_run_is_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**(TINY | options))


def test_the_average_has_a_half_life_or_a_decay():
    assert TrainingConfig(**TINY).ema_halflife_images == 1_000_000
    config = parse_config(["--ema_decay", "0.9999", "--ema_halflife_images", "0", "--no_ema_warmup"])
    assert (config.ema_halflife_images, config.ema_decay, config.ema_warmup) == (None, 0.9999, False)
    with pytest.raises(ValueError, match="exclude each other"):
        parse_config(["--ema_decay", "0.9999"])  # over the preset's half-life


def test_a_batch_that_does_not_divide_among_processes_and_parts_is_refused():
    config = TrainingConfig(**TINY, batch_size=24, micro_batch_size=4)
    assert [config.micro_batches(n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    for processes in (5, 4):
        with pytest.raises(ValueError, match=f"must be a multiple of {processes} processes"):
            config.micro_batches(processes)


def test_the_rate_rises_to_its_value_and_then_stays_or_falls_to_zero():
    constant = TrainingConfig(**TINY, batch_size=10, warmup_steps=10, learning_rate=1.0)
    assert [constant.learning_rate_at(step) for step in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    cosine = dataclasses.replace(constant, learning_rate_schedule="cosine")
    rates = [cosine.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3) and rates[50] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_options_that_change_the_weights_may_not_change_within_a_run():
    config = TrainingConfig(**TINY)
    saved = dataclasses.asdict(config)
    config.check_same_run(saved, Path("there"))
    dataclasses.replace(config, output_dir="elsewhere", log_every_steps=3).check_same_run(saved, Path("there"))
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 asked for\n(.|\n)*--overwrite"):
        dataclasses.replace(config, seed=1).check_same_run(saved, Path("there"))


def test_a_run_of_constant_rate_may_be_made_longer_and_one_whose_rate_depends_on_its_length_may_not():
    constant = TrainingConfig(**TINY)
    dataclasses.replace(constant, total_images=2000).check_same_run(dataclasses.asdict(constant), Path("there"))
    cosine = dataclasses.replace(constant, learning_rate_schedule="cosine")
    with pytest.raises(ValueError, match="total_images: 1000 there, 2000 asked for"):
        dataclasses.replace(cosine, total_images=2000).check_same_run(dataclasses.asdict(cosine), Path("there"))


OPTIONS = """output_dir overwrite dataset dataset_config split validation_split image_column resolution channels random_flip
skip_broken_images memory_limit_bytes num_workers block_out_channels down_block_types up_block_types layers_per_block
attention_head_dim norm_num_groups dropout num_train_timesteps beta_schedule prediction_type variance_type
timestep_sampler seed total_images batch_size micro_batch_size learning_rate adam_beta2 warmup_steps
learning_rate_schedule max_grad_norm ema_halflife_images ema_decay ema_warmup ema_snapshot_every_images cpu_threads
mixed_precision dry_run checkpoint_every_steps keep_checkpoints log_every_steps validate_every_steps validation_images
sample_every_steps report_to sample_steps quality_samples"""


def test_the_list_of_options_changes_only_on_purpose():
    assert [field.name for field in dataclasses.fields(TrainingConfig)] == OPTIONS.split()
