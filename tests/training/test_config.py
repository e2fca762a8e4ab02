"""Options: presets are valid, flags override them, and invalid values are refused with a reason."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ddpm_hf import UNet2DModelCustom
from ddpm_hf.training.build import build_unet
from ddpm_hf.training.config import TrainingConfig, load_preset, parse_config, presets

TINY = {"dataset": "digits", "resolution": [8], "block_out_channels": [8, 8], "total_images": 1000}


# Millions of parameters: as published (DDPM, appendix B; "50M" in the name of Improved DDPM's checkpoint), or counted.
PARAMETERS = {
    "celebahq-256": 113.7,
    "cifar10": 35.7,
    "cifar10-conditional": 35.8,
    "cifar10-improved": 52.5,
    "custom": 26.6,
    "digits": 0.7,
    "digits-conditional": 1.0,
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
        ({"sample_steps": 1001}, "sample_steps must be an integer in 1..1000, got 1001"),
        ({"crop": "left"}, r"crop must be one of \['center', 'pad'\], got 'left'"),
        ({"background": "whitish"}, "background must be a color such as 'white'.* got 'whitish'"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be a finite number in \[0, 1\), got 1.0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be an integer of at least 1, got 0"),
        ({"stream_lanes": 3}, "stream_lanes = 3 must divide batch_size = 128"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"compile": "fast"}, "compile must be one of .*inductor.* got 'fast'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be an integer of at least 1"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps must be an integer of at least 1"),
        ({"push_every_checkpoints": 0}, "push_every_checkpoints must be an integer of at least 1"),
        ({"push_to_hub": True}, "push_to_hub needs hub_model_id"),
        ({"hub_model_id": "user/two/three"}, "user/two/three"),
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
        ({"label_dropout": 0.1}, "label_dropout = 0.1 is for label_column only"),
        ({"num_classes": 10}, "num_classes = 10 is for label_column only"),
        (
            {"label_column": "label", "num_classes": 0},
            "num_classes must be an integer of at least 1, the number of classes in 'label', got 0",
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
    config = parse_config(["--ema_decay", "0.9999", "--ema_halflife_images", "0", "--no_ema_warmup"])
    assert (config.ema_halflife_images, config.ema_decay, config.ema_warmup) == (None, 0.9999, False)
    with pytest.raises(ValueError, match="exclude each other"):
        parse_config(["--ema_decay", "0.9999"])  # over the preset's half-life


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


OPTIONS = """output_dir overwrite dataset dataset_config dataset_revision split validation_split image_column
label_column num_classes class_embed_type resolution channels crop background random_flip skip_broken_images validation_fraction
memory_limit_bytes num_workers streaming shuffle_buffer stream_lanes block_out_channels down_block_types up_block_types
layers_per_block attention_head_dim norm_num_groups dropout resnet_time_scale_shift num_train_timesteps beta_schedule
rescale_betas_zero_snr prediction_type variance_type loss_weighting min_snr_gamma p2_k p2_gamma hybrid_lambda timestep_sampler label_dropout
input_perturbation offset_noise seed total_images batch_size micro_batch_size learning_rate adam_beta2 weight_decay
warmup_steps learning_rate_schedule max_grad_norm max_nonfinite_steps gradient_checkpointing ema_halflife_images ema_decay ema_warmup
ema_snapshot_every_images cpu_threads mixed_precision tf32 compile dry_run checkpoint_every_steps keep_checkpoints
log_every_steps validate_every_steps validation_images sample_every_steps report_to sample_steps quality_samples
push_to_hub hub_model_id hub_private push_every_checkpoints"""


def test_the_list_of_options_is_frozen():
    assert [field.name for field in dataclasses.fields(TrainingConfig)] == OPTIONS.split()
