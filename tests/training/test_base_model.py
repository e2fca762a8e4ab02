"""Fine-tuning: a run has the network, diffusion, predictions and weights of the model that it starts from."""

import os
import subprocess
import sys

import pytest
import torch
from ddpm_hf.scripts import train
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.pipelines.guidance import mark_null_class, null_class_of
from ddpm_hf.training.base_model import load_base_weights
from ddpm_hf.training.build import build
from ddpm_hf.training.presets import load_preset, parse_config
from tests.conftest import TINY_SCHEDULER, TINY_TRAINING, TINY_UNET, flags
from tests.hub import HubServer
from tests.training.helpers import assert_bit_identical, checkpoint

SHORT = flags(
    **{name: TINY_TRAINING[name] for name in ("batch_size", "quality_samples", "report_to", "cpu_threads")},
    total_images=192,
    checkpoint_every_steps=4,
    keep_checkpoints=10,
    sample_steps=4,
)
CLASSES = ("--label_column", "label")
# Each differs from the default of a run, of this package and of diffusers.
UNUSUAL_UNET = {
    "in_channels": 1, "out_channels": 2, "act_fn": "gelu", "mid_block_scale_factor": 1.5, "center_input_sample": True,
    "time_embedding_dim": 24, "norm_eps": 1e-3, "freq_shift": 2, "downsample_type": "resnet", "downsample_padding": 1,
    "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 8, "add_attention": False,
}  # fmt: skip
UNUSUAL_SCHEDULER = {
    "num_train_timesteps": 20, "beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.5, "clip_sample": False,
    "prediction_type": "v_prediction", "variance_type": "learned_range", "timestep_spacing": "trailing",
}  # fmt: skip


@pytest.fixture
def save(make_pipeline, tmp_path):
    """Saves a pipeline of gray images as a folder to start from."""

    def save(scheduler=None, null=False, **changes):
        pipe = make_pipeline(scheduler, **{"in_channels": 1, "out_channels": 1} | changes)
        if null:
            mark_null_class(pipe.unet)
        pipe.save_pretrained(tmp_path / "base")
        return pipe

    return save


def start(folder, *options):
    """The configuration, network and scheduler of a run that starts from a folder."""
    config = parse_config([*SHORT, "--init_from", str(folder / "base"), "--dataset", "digits", *options])
    unet, scheduler = build(config)
    load_base_weights(unet, config.init_from)
    return config, unet.eval(), scheduler


def prediction(unet, labels=None):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return unet(x, torch.tensor([0, 5, 12, 19]), class_labels=labels).sample.detach()


def test_network_and_chain_of_a_run_are_those_of_its_base_model(save, tmp_path):
    base = save(DDPMSchedulerCustom(**UNUSUAL_SCHEDULER), **UNUSUAL_UNET)
    config, unet, scheduler = start(tmp_path)
    assert torch.equal(prediction(unet), prediction(base.unet))
    assert {name: unet.config[name] for name in UNUSUAL_UNET} == UNUSUAL_UNET
    assert {name: scheduler.config[name] for name in UNUSUAL_SCHEDULER} == UNUSUAL_SCHEDULER
    assert (config.norm_eps, config.beta_end, config.variance_type, config.channels) == (1e-3, 0.5, "learned_range", 1)
    assert config.resolution == [8, 8] and config.learning_rate == load_preset("fine-tuning")["learning_rate"]


def test_a_pipeline_of_diffusers_with_its_own_conventions_is_a_base_model(tmp_path):
    stock = UNet2DModel(**TINY_UNET | {"in_channels": 1, "out_channels": 1, "attention_head_dim": 8}).eval()
    DDPMPipeline(stock, DDPMScheduler(**TINY_SCHEDULER)).save_pretrained(tmp_path / "base")
    config, unet, _ = start(tmp_path)
    torch.testing.assert_close(prediction(unet), prediction(stock), rtol=0, atol=1e-6)
    assert (config.norm_eps, config.freq_shift, config.flip_sin_to_cos, config.downsample_padding) == (1e-5, 0, True, 1)


@pytest.mark.parametrize(
    ("options", "settled"),
    [
        ({"beta_schedule": "sigmoid"}, {"beta_schedule": "sigmoid", "trained_betas": None, "beta_end": 0.02}),
        ({"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.3}, {"trained_betas": None, "beta_end": 0.02}),
        ({"trained_betas": [0.1 + i / 40 for i in range(20)]}, {"trained_betas": [0.1 + i / 40 for i in range(20)]}),
    ],
)
def test_the_chain_is_the_same_however_it_is_saved(save, tmp_path, options, settled):
    base = save(DDPMSchedulerCustom(num_train_timesteps=20, **options))
    config, _, scheduler = start(tmp_path)
    assert torch.equal(scheduler.diffusion.betas, base.scheduler.diffusion.betas)
    assert {name: getattr(config, name) for name in settled} == settled
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_model_saved_with_another_scheduler_keeps_its_chain(make_pipeline, tmp_path):
    scheduler = DDIMScheduler(num_train_timesteps=20, beta_end=0.5, clip_sample=False)
    make_pipeline(scheduler, in_channels=1, out_channels=1).save_pretrained(tmp_path / "base")
    _, _, mine = start(tmp_path)
    assert isinstance(mine, DDPMSchedulerCustom) and mine.config.clip_sample is False
    torch.testing.assert_close(mine.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--block_out_channels", "8", "8"], "block_out_channels"),
        (["--norm_eps", "0.1"], "norm_eps"),
        (["--prediction_type", "epsilon"], "prediction_type"),
        (["--beta_schedule", "linear"], "beta_schedule"),
        (["--trained_betas", "0.1"], "trained_betas"),
        (["--channels", "3"], "channels"),
        (["--variance_type", "learned_range"], "variance_type"),
        (["--class_embed_type", "identity", *CLASSES], "class_embed_type"),
        (["--config", "digits"], "block_out_channels"),
    ],
)
def test_an_option_that_contradicts_the_base_model_is_refused_by_name(save, tmp_path, options, name):
    save()
    with pytest.raises(ValueError, match=f"{name} = .* contradicts init_from = .*, where it is .*: leave it out"):
        start(tmp_path, *options)


def test_options_that_agree_with_the_base_model_are_accepted(save, tmp_path):
    save()
    config, _, _ = start(tmp_path, "--block_out_channels", "8", "16", "--prediction_type", "v_prediction")
    assert config == start(tmp_path)[0]


def test_another_resolution_may_be_trained(save, tmp_path):
    save()
    _, unet, _ = start(tmp_path, "--resolution", "16", "24")
    assert unet.config.sample_size == (16, 24)


@pytest.mark.parametrize("dropout", [[], ["--label_dropout", "0.2"]])
def test_classes_added_to_an_unconditional_model_do_not_change_it(save, tmp_path, dropout):
    base = save()
    _, unet, _ = start(tmp_path, *CLASSES, "--num_classes", "3", *dropout)
    rows = 3 + len(dropout) // 2
    for label in range(rows):
        torch.testing.assert_close(prediction(unet, torch.full((4,), label)), prediction(base.unet), rtol=0, atol=1e-6)
    output = unet(torch.randn(4, 1, 8, 8), torch.tensor([3]), class_labels=torch.arange(4) % rows).sample
    output.square().sum().backward()
    assert unet.class_embedding.weight.grad.abs().sum(1).all()  # every new row can learn


def test_a_number_added_as_condition_does_not_change_the_model(save, tmp_path):
    base = save()
    _, unet, _ = start(tmp_path, *CLASSES, "--class_embed_type", "timestep")
    numbers = torch.tensor([0.0, 1.5, -3.0, 800.0])
    torch.testing.assert_close(prediction(unet, numbers), prediction(base.unet), rtol=0, atol=1e-6)
    unet(torch.randn(4, 1, 8, 8), torch.tensor([3]), class_labels=numbers).sample.square().sum().backward()
    assert unet.class_embedding.linear_2.weight.grad.any()


def test_a_conditional_model_keeps_its_classes_and_null_class(save, tmp_path):
    base = save(num_class_embeds=4, null=True)
    old = torch.tensor([0, 1, 2, 3])
    config, same, _ = start(tmp_path, *CLASSES, "--label_dropout", "0.1")
    assert config.num_classes == 3 and null_class_of(same) == 3
    assert torch.equal(prediction(same, old), prediction(base.unet, old))
    _, more, _ = start(tmp_path, *CLASSES, "--label_dropout", "0.1", "--num_classes", "5")
    assert null_class_of(more) == 5
    assert torch.equal(prediction(more, torch.tensor([0, 1, 2, 5])), prediction(base.unet, old))
    assert not more.class_embedding.weight[3:5].any()


def test_classes_are_neither_removed_nor_ignored(save, tmp_path):
    save(num_class_embeds=4)
    with pytest.raises(ValueError, match="num_classes = 3 contradicts .* 4 classes: classes may be added"):
        start(tmp_path, *CLASSES, "--num_classes", "3")
    with pytest.raises(ValueError, match="is class-conditional: give the label_column"):
        start(tmp_path)


def test_a_base_model_that_is_the_output_or_is_missing_is_refused(save, tmp_path):
    save()
    with pytest.raises(ValueError, match="init_from must be another folder than output_dir"):
        start(tmp_path, "--output_dir", str(tmp_path / "base"))
    for name in (str(tmp_path / "elsewhere"), str(tmp_path), "a" * 5000):
        with pytest.raises(ValueError, match="init_from must be the folder of a pipeline, or its name on the Hub, got"):
            parse_config([*SHORT, "--init_from", name, "--dataset", "digits"])


def test_a_flat_repository_on_the_hub_is_a_base_model(save, tmp_path):
    base = save(sample_size=16)
    folders = (tmp_path / "base" / "unet", tmp_path / "base" / "scheduler")
    files = {file.name: file.read_bytes() for folder in folders for file in folder.iterdir()}
    code = """
from tests.training.test_base_model import *
config = parse_config([*SHORT, "--init_from", "u/base", "--dataset", "digits"])
unet, _ = build(config)
load_base_weights(unet, config.init_from)
print(config.resolution, unet.conv_in.weight.double().sum().item())
"""
    with HubServer() as hub:
        hub.add_repo("u/base", files)
        # In a process of its own: the client reads the address when it is imported.
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"[16, 16] {base.unet.conv_in.weight.double().sum().item()}"


def test_without_a_base_model_the_default_preset_stays(tmp_path):
    assert parse_config(["--init_from", "None"]) == parse_config([])


def test_a_fine_tuned_run_resumes_to_the_same_weights(save, tmp_path):
    base = save()
    options = [*SHORT, "--init_from", str(tmp_path / "base"), "--dataset", "digits", *CLASSES]
    train.main([*options, "--output_dir", str(tmp_path / "whole")])
    for total in ("128", "192"):  # the second continues the first
        train.main([*options, "--output_dir", str(tmp_path / "parts"), "--total_images", total])
    assert_bit_identical(*(checkpoint(tmp_path / name, 12) for name in ("whole", "parts")))
    pipe = DDPMPipelineCustom.from_pretrained(tmp_path / "whole")
    moved = (pipe.unet.conv_in.weight - base.unet.conv_in.weight).abs().max()
    assert 0 < moved < 0.01  # 12 steps at a small rate from the weights of the base model
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| base model | base, whose weights were the start" in card and str(tmp_path) not in card


def test_the_card_names_a_base_model_on_the_hub(tmp_path):
    from ddpm_hf.hub.model_card import make_card
    from ddpm_hf.training.config import TrainingConfig
    from tests.hub.test_model_card import TRAINING

    options = load_preset("digits") | {"init_from": "google/ddpm-cifar10-32"}
    card = make_card(TrainingConfig(**options).to_yaml(), {"training": TRAINING})
    assert ModelCard(str(card)).data.base_model == "google/ddpm-cifar10-32"
    options["init_from"] = str(tmp_path)  # no name on the Hub
    assert (
        ModelCard(str(make_card(TrainingConfig(**options).to_yaml(), {"training": TRAINING}))).data.base_model is None
    )
