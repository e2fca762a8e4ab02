"""Rules between options. Those of single messages are in test_config.py."""

import dataclasses
from typing import get_args

import pytest

from ddpm_hf.data.arrays import MAX_CHANNELS
from ddpm_hf.diffusion.schedules import BETA_SCHEDULES
from ddpm_hf.diffusion.timesteps import MAX_TIMESTEPS
from ddpm_hf.models.builders import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES
from ddpm_hf.training import config as names
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.config_rules import check_rules

TINY = {"dataset": "digits", "resolution": [8], "block_out_channels": [8, 8], "total_images": 1000}


def test_names_in_the_table_are_those_that_network_and_scheduler_know():
    assert set(get_args(names.BetaSchedule)) == set(BETA_SCHEDULES)
    assert set(get_args(names.DownBlock)) == set(DOWN_BLOCK_TYPES)
    assert set(get_args(names.UpBlock)) == set(UP_BLOCK_TYPES)


def test_ranges_in_the_table_are_those_of_the_library():
    intervals = {spec.name: spec.metadata["interval"] for spec in dataclasses.fields(TrainingConfig)}
    assert intervals["channels"] == f"[1, {MAX_CHANNELS}]"
    assert intervals["num_train_timesteps"] == f"[1, {MAX_TIMESTEPS}]"


def test_a_configuration_that_passed_passes_again():
    check_rules(TrainingConfig(**TINY))
    check_rules(TrainingConfig(**TINY, ema_halflife_images=0, ema_decay=0.99))


def test_a_bad_name_on_the_hub_is_named_by_its_option():
    with pytest.raises(ValueError, match="hub_model_id must be user/name, got 'a b'"):
        TrainingConfig(**TINY, hub_model_id="a b")
