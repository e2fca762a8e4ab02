"""LoRA: a run trains adapters alone, and leaves a whole model with them in its weights, and the adapters beside it."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ddpm_hf.scripts import train
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from benchmarks import fine_tuning
from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.hub.contents import published_files
from ddpm_hf.training.base_model import load_base_weights
from ddpm_hf.training.build import build_unet
from ddpm_hf.training.ema import trained_parameters
from ddpm_hf.training.lora import LAYERS, add_lora
from ddpm_hf.training.presets import parse_config
from tests.conftest import TINY_TRAINING, flags
from tests.training.helpers import assert_bit_identical, checkpoint

SHORT = flags(
    **{name: TINY_TRAINING[name] for name in ("batch_size", "quality_samples", "report_to", "cpu_threads")},
    dataset="digits", total_images=192, checkpoint_every_steps=4, keep_checkpoints=10, sample_steps=4,
    learning_rate=1e-2, warmup_steps=0, lora_rank=3,
)  # fmt: skip


@pytest.fixture
def base(make_pipeline, tmp_path) -> Path:
    make_pipeline(in_channels=1, out_channels=1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def predict(unet) -> torch.Tensor:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet.eval()(x, torch.tensor([0, 5, 12, 19])).sample


def run(base, folder, *options):
    train.main([*SHORT, "--init_from", str(base), "--output_dir", str(folder), *options])
    return DDPMPipelineCustom.from_pretrained(folder).unet


def test_adapters_alone_are_trained_and_begin_without_effect(base):
    config = parse_config([*SHORT, "--init_from", str(base)])
    unet = build_unet(config)
    load_base_weights(unet, config.init_from)
    before = predict(unet)
    add_lora(unet, config)
    assert torch.equal(predict(unet), before)
    trained = trained_parameters(unet)
    assert trained and all(".lora_" in name for name in trained)
    layers = {name for name, _ in unet.named_modules() if any(name.endswith(f".{layer}") for layer in LAYERS)}
    assert {name.split(".lora_")[0] for name in trained} == layers


def test_merged_weights_are_those_of_the_base_plus_the_adapters(base, tmp_path):
    unet = run(base, tmp_path / "run")
    adapted = DDPMPipelineCustom.from_pretrained(base).unet
    assert (predict(unet) - predict(adapted)).abs().max() > 1e-3
    factors = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    old, new = adapted.state_dict(), unet.state_dict()
    for name in old:
        layer = name.removesuffix(".weight")
        if (key := f"{layer}.lora_A.weight") in factors:
            a, b = factors[key], factors[f"{layer}.lora_B.weight"]
            # The product of the factors: of a convolution, a 1×1 convolution after one of the same kernel.
            change = torch.einsum("or...,ri...->oi...", b, a) if b.ndim == 4 else b @ a
            torch.testing.assert_close(new[name], old[name] + change, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(new[name], old[name]), name
    adapted.load_lora_adapter(tmp_path / "run" / "lora", prefix=None, use_safetensors=True)
    torch.testing.assert_close(predict(adapted), predict(unet), rtol=1e-4, atol=1e-5)


def test_a_convolution_of_the_factors_is_the_convolution_by_their_product():
    a, b, x = torch.randn(3, 5, 3, 3), torch.randn(7, 3, 1, 1), torch.randn(2, 5, 8, 8)
    change = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    torch.testing.assert_close(F.conv2d(F.conv2d(x, a), b), F.conv2d(x, change), rtol=1e-4, atol=1e-4)


def test_the_folder_of_a_run_is_a_whole_model_for_stock_and_the_hub(base, tmp_path):
    unet = run(base, tmp_path / "run")
    stock = DDPMPipeline.from_pretrained(tmp_path / "run").unet
    torch.testing.assert_close(predict(stock), predict(unet), rtol=1e-4, atol=1e-5)
    assert {"lora/pytorch_lora_weights.safetensors", "README.md"} <= published_files(tmp_path / "run").keys()
    assert "| adapters | LoRA of rank 3, merged into the weights" in (tmp_path / "run" / "README.md").read_text()


def test_a_stopped_run_resumes_to_the_same_adapters(base, tmp_path):
    run(base, tmp_path / "whole")
    run(base, tmp_path / "parts", "--total_images", "128")
    run(base, tmp_path / "parts")
    assert_bit_identical(*(checkpoint(tmp_path / name, 12) for name in ("whole", "parts")))
    averages = checkpoint(tmp_path / "whole", 12)["ema"]
    assert averages and all(".lora_" in name for name in averages)


def test_the_summary_counts_the_memory_of_the_adapters(base, tmp_path, capsys):
    config = parse_config([*SHORT, "--init_from", str(base)])
    unet = build_unet(config)
    add_lora(unet, config)
    train.main([*SHORT, "--init_from", str(base), "--output_dir", str(tmp_path / "run"), "--dry_run"])
    count = sum(p.numel() for p in trained_parameters(unet).values())
    assert f" parameters, {count:,} of them trained as adapters, on 1 process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_rank", "3"], "lora_rank = 3 is for init_from only"),
        (["--init_from", "BASE", "--lora_rank", "0"], "lora_rank must be an integer in 1..65536, got 0"),
        (
            ["--init_from", "BASE", "--lora_rank", "3", "--ema_snapshot_every_images", "64"],
            "ema_snapshot_every_images = 64 is for lora_rank=None only",
        ),
    ],
)
def test_options_that_adapters_do_not_fit_are_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        parse_config(
            [
                "--dataset",
                "digits",
                "--sample_steps",
                "4",
                *(str(base) if option == "BASE" else option for option in options),
            ]
        )


def test_adapters_for_new_classes_are_refused(base, tmp_path, capsys):
    with pytest.raises(SystemExit, match="lora_rank = 3 trains no embeddings, and init_from = .* has other classes"):
        run(base, tmp_path / "run", "--label_column", "label")
    assert not (tmp_path / "run").exists()


def test_the_benchmark_of_fine_tuning_measures_each_way():
    found = fine_tuning.main(flags(budgets=64, num_samples=60, steps=2, rank=2))
    ways = {"the model of all digits": 0, "from scratch": 64, "fine-tuned": 64, "adapters of rank 2": 64}
    assert found.keys() == set(ways.items())
    assert all(distance > 0 and 0 <= share <= 1 for distance, share in found.values())


def test_without_peft_the_error_says_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="lora_rank = 3 needs peft: pip install"):
        run(base, tmp_path / "run")
