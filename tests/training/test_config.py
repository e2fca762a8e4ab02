"""Options: invalid values are refused with a reason, and those that change the weights are fixed on resume."""

import dataclasses
import re
from pathlib import Path

import pytest

from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.presets import parse_config

TINY = {"dataset": "digits", "resolution": [8], "block_out_channels": [8, 8], "total_images": 1000}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": [9]}, "9×9 cannot be halved 1 times.*multiples of 2"),
        ({"resolution": [8, 6], "block_out_channels": [8, 8, 8]}, "multiples of 4"),
        ({"resolution": [1, 2, 3]}, "resolution must be one number or height and width"),
        ({"dataset": ""}, "dataset must be given"),
        ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
        ({"report_to": "paper"}, "report_to must be one of .*tensorboard.* got 'paper'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"total_images": 5}, "less than one batch"),
        ({"sample_steps": 1001}, "sample_steps must be an integer in 1..1000, num_train_timesteps, got 1001"),
        ({"crop": "left"}, r"crop must be one of \['center', 'pad'\], got 'left'"),
        ({"background": "whitish"}, "background must be a color such as 'white'.* got 'whitish'"),
        ({"white_level": [0]}, r"white_level must be a value above 0, or two: .* got \[0\]"),
        ({"white_level": [9, 3]}, r"white_level must be .* the second above the first, got \[9, 3\]"),
        ({"white_level": [1, 2, 3]}, r"white_level must be .* got \[1, 2, 3\]"),
        ({"white_level": [float("inf")]}, r"white_level must be a finite number in \(-inf, inf\), got inf"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be a finite number in \[0, 1\), got 1.0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be an integer of at least 1, got 0"),
        ({"streaming": True, "stream_lanes": 3}, "stream_lanes = 3 must divide batch_size = 128"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"compile": "fast"}, "compile must be one of .*inductor.* got 'fast'"),
        ({"process_group_timeout": 0}, "process_group_timeout must be an integer in 1..1000000000, got 0"),
        ({"mixed_precision": "fp8"}, r"mixed_precision must be one of \[None, 'no', 'bf16', 'fp16'\], got 'fp8'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be an integer of at least 1"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps must be an integer of at least 1"),
        ({"push_every_checkpoints": 0}, "push_every_checkpoints must be an integer of at least 1"),
        ({"push_to_hub": True}, "push_to_hub needs hub_model_id"),
        ({"hub_model_id": "user/two/three"}, "user/two/three"),
        ({"trained_betas": [0.1, 1.5]}, r"trained_betas must be a finite number in \(0, 1\], got 1.5"),
        ({"trained_betas": [0.1] * 1000, "beta_end": 0.1}, "beta_end = 0.1 is for trained_betas=None only"),
        ({"trained_betas": [0.1] * 1000, "beta_schedule": "jsd"}, "beta_schedule = jsd is for trained_betas=None only"),
        ({"beta_schedule": "jsd", "beta_end": 0.1}, "beta_end = 0.1 is for a beta_schedule with a range only"),
        ({"beta_schedule": "const", "beta_start": 0.1}, "beta_start = 0.1 is for a beta_schedule with a first β only"),
        ({"downsample_padding": 2}, "downsample_padding must be an integer in 0..1, got 2"),
        ({"loss_weighting": "snr"}, "loss_weighting must be one of"),
        ({"min_snr_gamma": 1.0}, "min_snr_gamma = 1.0 is for loss_weighting='min_snr' only"),
        ({"loss_weighting": "min_snr", "p2_k": 2.0}, "p2_k = 2.0 is for loss_weighting='p2' only"),
        (
            {"hybrid_lambda": 0.01},
            "hybrid_lambda = 0.01 is for variance_type='learned_range' without loss_weighting='vlb' only",
        ),
        (
            {"variance_type": "learned_range", "hybrid_lambda": 0.0},
            r"hybrid_lambda must be a finite number in \(0, inf\)",
        ),
        ({"variance_type": "learned_range", "offset_noise": 0.1}, "offset_noise = 0.1 changes the chain"),
        ({"loss_weighting": "vlb", "input_perturbation": 0.1}, "input_perturbation = 0.1 changes the chain"),
        (
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr = True excludes prediction_type = 'epsilon'",
        ),
        ({"weight_decay": -0.1}, r"weight_decay must be a finite number in \[0, inf\), got -0.1"),
        ({"offset_noise": -0.1}, r"offset_noise must be a finite number in \[0, inf\), got -0.1"),
        ({"shuffle_buffer": 50}, "shuffle_buffer = 50 is for streaming only"),
        ({"label_dropout": 0.1}, "label_dropout = 0.1 is for label_column only"),
        ({"num_classes": 10}, "num_classes = 10 is for label_column only"),
        (
            {"label_column": "label", "num_classes": 0},
            "num_classes must be an integer of at least 1, got 0",
        ),
        (
            {"label_column": "label", "num_classes": 2, "label_dropout": 1.0},
            r"label_dropout must be a finite number in \[0, 1\)",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type = timestep is for label_column only"),
        (
            {"label_column": "label", "class_embed_type": "text"},
            r"class_embed_type must be one of \[None, 'timestep', 'identity'\], got 'text'",
        ),
        (
            {"label_column": "label", "class_embed_type": "timestep", "num_classes": 3},
            "num_classes = 3 is for class_embed_type=None only",
        ),
        (
            {"label_column": "label", "class_embed_type": "identity", "label_dropout": 0.1},
            "label_dropout = 0.1 is for class_embed_type=None only",
        ),
        ({"ema_decay": 1.0}, r"ema_decay must be a finite number in \(0, 1\), got 1.0"),
        ({"ema_decay": 0.99, "ema_halflife_images": 10}, "exclude each other; --ema_halflife_images 0 removes"),
        ({"ema_halflife_images": 0}, "ema_halflife_images = 0 needs an ema_decay"),
        ({"ema_snapshot_every_images": -1}, "ema_snapshot_every_images must be an integer of at least 0, got -1"),
        ({"validate_every_steps": -1}, "validate_every_steps must be an integer of at least 0, got -1"),
        ({"validation_images": 0}, "validation_images must be an integer of at least 1"),
        ({"validation_split": "train"}, "validation_split must be another split"),
        ({"sample_every_steps": -1}, "sample_every_steps must be an integer of at least 0, got -1"),
    ],
)
def test_invalid_options_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**(TINY | options))


def test_the_crop_centre_of_earlier_versions_is_read_as_center():
    config = TrainingConfig(**TINY)
    assert TrainingConfig(**TINY, crop="centre") == config
    config.check_same_run(dataclasses.asdict(config) | {"crop": "centre"}, Path("there"))
    with pytest.raises(ValueError, match="crop: 'center' there, 'pad' here"):
        dataclasses.replace(config, crop="pad").check_same_run(
            {**dataclasses.asdict(config), "crop": "centre"}, Path("there")
        )


def test_every_option_has_a_help_text():
    assert [field.name for field in dataclasses.fields(TrainingConfig) if not field.metadata.get("help")] == []


def test_the_average_has_a_half_life_or_a_decay():
    assert TrainingConfig(**TINY).ema_halflife_images == 1_000_000
    for zero in ([], ["--ema_halflife_images", "0"]):  # the preset has a half-life
        config = parse_config(["--ema_decay", "0.9999", *zero, "--no_ema_warmup"])
        assert (config.ema_halflife_images, config.ema_decay, config.ema_warmup) == (None, 0.9999, False)
    with pytest.raises(ValueError, match="exclude each other"):
        parse_config(["--ema_decay", "0.9999", "--ema_halflife_images", "10"])


def test_the_length_is_in_images_steps_or_epochs():
    base = {key: value for key, value in TINY.items() if key != "total_images"}
    steps = TrainingConfig(**base, num_steps=12, batch_size=16)
    assert (steps.total_images, steps.num_steps, steps.total_steps) == (192, None, 12)
    assert steps == TrainingConfig(**base, total_images=192, batch_size=16) == steps.with_length(None)
    epochs = TrainingConfig(**base, num_epochs=5, batch_size=16)
    assert epochs.with_length(60) == dataclasses.replace(steps, total_images=300)
    with pytest.raises(ValueError, match="num_epochs = 5 of 3 images must be at least one batch, batch_size = 16"):
        epochs.with_length(3)


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ({"total_images": None}, "got none"),
        ({"num_steps": 3}, "got total_images = 1000, num_steps = 3"),
        ({"total_images": None, "num_steps": 3, "num_epochs": 2}, "got num_steps = 3, num_epochs = 2"),
        ({"total_images": None, "num_epochs": 2, "streaming": True}, "num_epochs = 2 needs the number of images"),
        ({"total_images": None, "num_steps": 2**62}, "num_steps = 4611686018427387904 of batch_size = 128 are 2"),
    ],
)
def test_exactly_one_length_is_accepted(lengths, found):
    with pytest.raises(ValueError, match=found):
        TrainingConfig(**TINY | lengths)


@pytest.mark.parametrize("size", [[28], [30, 44], [9], [64, 96]])
@pytest.mark.parametrize("preset", ["custom", "cifar10", "celebahq-256"])
def test_a_size_that_cannot_be_halved_gets_values_that_work(size, preset):
    line = ["--config", preset, "--dataset", "somewhere", "--resolution", *map(str, size)]
    try:
        assert parse_config(line).resolution == size * (3 - len(size)) == [64, 96]
    except ValueError as error:
        assert "cannot be halved" in str(error)
        proposals = re.findall(r"\((--[^)]+)\)", str(error))
        assert len(proposals) == 2
        for proposal in proposals:
            parse_config([*line, *proposal.split()])


def test_a_batch_that_cannot_be_divided_is_refused():
    config = TrainingConfig(**TINY, batch_size=24, micro_batch_size=4)
    assert [config.micro_batches(n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    for processes in (5, 4):
        with pytest.raises(ValueError, match=f"must be a multiple of {processes} processes"):
            config.micro_batches(processes)


def test_learning_rate_warms_up_then_stays_or_falls_to_zero():
    constant = TrainingConfig(**TINY, batch_size=10, warmup_steps=10, learning_rate=1.0)
    assert [constant.learning_rate_at(step) for step in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    cosine = dataclasses.replace(constant, learning_rate_schedule="cosine")
    rates = [cosine.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3) and rates[50] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_options_that_change_the_weights_are_fixed_on_resume():
    config = TrainingConfig(**TINY)
    saved = dataclasses.asdict(config)
    config.check_same_run(saved, Path("there"))
    dataclasses.replace(config, output_dir="elsewhere", log_every_steps=3).check_same_run(saved, Path("there"))
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here\n(.|\n)*--overwrite"):
        dataclasses.replace(config, seed=1).check_same_run(saved, Path("there"))


def test_an_option_that_an_earlier_version_lacked_is_at_its_default():
    config = TrainingConfig(**TINY)
    saved = dataclasses.asdict(config)
    del saved["weight_decay"]
    config.check_same_run(saved, Path("there"))
    with pytest.raises(ValueError, match="weight_decay: 0.0 there, 0.1 here"):
        dataclasses.replace(config, weight_decay=0.1).check_same_run(saved, Path("there"))


def test_micro_batch_size_may_change_on_resume_without_dropout():
    for dropout in (0.0, 0.1):
        config = TrainingConfig(**TINY, dropout=dropout, batch_size=24)
        parts = dataclasses.replace(config, micro_batch_size=4)
        if dropout:
            with pytest.raises(ValueError, match="micro_batch_size: None there, 4 here"):
                parts.check_same_run(dataclasses.asdict(config), Path("there"))
        else:
            parts.check_same_run(dataclasses.asdict(config), Path("there"))


def test_total_images_may_change_on_resume_with_a_constant_rate():
    constant = TrainingConfig(**TINY)
    dataclasses.replace(constant, total_images=2000).check_same_run(dataclasses.asdict(constant), Path("there"))
    cosine = dataclasses.replace(constant, learning_rate_schedule="cosine")
    with pytest.raises(ValueError, match="total_images: 1000 there, 2000 here"):
        dataclasses.replace(cosine, total_images=2000).check_same_run(dataclasses.asdict(cosine), Path("there"))


def test_a_published_checkpoint_resumes_on_a_folder_of_the_same_name(tmp_path):
    config = TrainingConfig(dataset=str(tmp_path / "birds"), total_images=1000)
    config.check_same_run(dataclasses.asdict(config) | {"dataset": "birds"}, Path("there"))
    with pytest.raises(ValueError, match="dataset: 'fish' there"):
        config.check_same_run(dataclasses.asdict(config) | {"dataset": "fish"}, Path("there"))


OPTIONS = """output_dir overwrite init_from lora_rank distill_steps dataset dataset_config dataset_revision dataset_name split validation_split image_column
label_column num_classes class_embed_type resolution channels crop background white_level random_flip skip_broken_images
validation_fraction memory_limit_bytes num_workers streaming shuffle_buffer stream_lanes block_out_channels down_block_types up_block_types
layers_per_block attention_head_dim norm_num_groups dropout resnet_time_scale_shift norm_eps downsample_padding
flip_sin_to_cos freq_shift num_train_timesteps beta_schedule beta_start beta_end trained_betas
rescale_betas_zero_snr prediction_type variance_type loss_weighting min_snr_gamma p2_k p2_gamma hybrid_lambda timestep_sampler label_dropout
input_perturbation offset_noise seed total_images num_steps num_epochs batch_size micro_batch_size learning_rate adam_beta2 weight_decay
warmup_steps learning_rate_schedule max_grad_norm max_nonfinite_steps gradient_checkpointing ema_halflife_images ema_decay ema_warmup
ema_snapshot_every_images cpu_threads mixed_precision tf32 process_group_timeout compile dry_run checkpoint_every_steps keep_checkpoints
log_every_steps validate_every_steps validation_images sample_every_steps report_to sample_steps quality_samples
push_to_hub hub_model_id hub_private push_every_checkpoints push_wait_seconds"""


def test_the_list_of_options_is_frozen():
    assert [field.name for field in dataclasses.fields(TrainingConfig)] == OPTIONS.split()
