"""Names that other training scripts have for an option are answered with the option."""

import dataclasses
import re

import pytest

from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.other_names import DIFFUSERS, OTHER_NAMES
from ddpm_hf.training.presets import parse_config

KNOWN = {spec.name for spec in dataclasses.fields(TrainingConfig)}
# The options of train_unconditional.py in diffusers 0.40, without those that mean the same here.
TRAIN_UNCONDITIONAL = """dataset_config_name model_config_name_or_path train_data_dir overwrite_output_dir cache_dir center_crop
train_batch_size eval_batch_size dataloader_num_workers save_images_epochs save_model_epochs gradient_accumulation_steps
lr_scheduler lr_warmup_steps adam_beta1 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power ema_max_decay hub_token
hub_private_repo logger logging_dir local_rank ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention preserve_input_precision"""
SAME = """output_dir resolution random_flip num_epochs learning_rate adam_beta2 push_to_hub hub_model_id mixed_precision
prediction_type"""


def test_every_option_of_diffusers_script_is_known_or_answered():
    assert set(TRAIN_UNCONDITIONAL.split()) <= DIFFUSERS.keys() and set(SAME.split()) <= KNOWN


def test_no_option_of_a_run_is_taken_for_another():
    assert not OTHER_NAMES.keys() & KNOWN


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_answers_name_options_that_exist(name):
    with pytest.raises(ValueError, match=f"unknown option --{name}: ") as caught:
        parse_config([f"--{name}", "1"])
    answer = str(caught.value).removeprefix(f"unknown option --{name}: ")
    assert set(re.findall(r"--(\w+)", answer)) <= KNOWN | {"config"}
    assert answer.startswith("did you mean --") == OTHER_NAMES[name].startswith("--")
    assert answer.endswith(("?", "."))


@pytest.mark.parametrize("word", ["--train-data-dir", "--train_data_dir=x", "--train-data-dir=x"])
def test_dashes_and_values_do_not_matter(word):
    with pytest.raises(ValueError, match="did you mean --dataset?"):
        parse_config([word])
