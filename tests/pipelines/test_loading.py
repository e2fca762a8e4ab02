"""One set of weights in this package's class and in stock's, and saves that are whole or absent."""

import os
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.files import staging_folder
from ddpm_hf.pipelines.loading import move_saved


def storages(unet) -> dict[str, int]:
    return {name: parameter.untyped_storage().data_ptr() for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"num_class_embeds": 4}, {"time_embedding_type": "fourier"}])
def test_both_ways_the_very_same_parameters_are_used(make_pipeline, changes, diffusers_log):
    pipe = make_pipeline(**changes)
    stock = pipe.to_diffusers()
    back = DDPMPipelineCustom.from_diffusers(stock)
    assert type(stock) is DDPMPipeline and type(stock.unet) is UNet2DModel and type(stock.scheduler) is DDPMScheduler
    assert type(back.unet) is UNet2DModelCustom and type(back.scheduler) is DDPMSchedulerCustom
    assert storages(stock.unet) == storages(pipe.unet) == storages(back.unet)
    assert all(a is b for a, b in zip(pipe.unet.parameters(), back.unet.parameters(), strict=True))
    assert not stock.unet.training and diffusers_log.messages == []
    with torch.no_grad():
        stock.unet.conv_in.weight += 1
    assert torch.equal(pipe.unet.conv_in.weight, stock.unet.conv_in.weight)
    assert back.unet.to_json_string() == pipe.unet.to_json_string()


def test_the_stock_pipeline_makes_the_same_images(tiny_pipeline):
    stock = tiny_pipeline.to_diffusers()
    stock.set_progress_bar_config(disable=True)
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    mine = tiny_pipeline(2, seeded[0], 20, output_type="np").images
    theirs = stock(2, seeded[1], 20, output_type="np").images
    assert abs(mine - theirs).max() < 2e-3  # stock's tables are float32


def test_other_schedulers_are_handed_on_and_what_stock_cannot_do_is_refused(make_pipeline, scheduler_config):
    ddim = DDIMScheduler(**scheduler_config)
    assert make_pipeline(ddim).to_diffusers().scheduler is ddim
    analytic = DDPMSchedulerCustom(**scheduler_config, variance_type="analytic", analytic_moments=[0.5] * 20)
    with pytest.raises(NotImplementedError, match="analytic"):
        make_pipeline(analytic).to_diffusers()


def test_from_pipe_goes_both_ways_through_the_twins(tiny_pipeline):
    stock = DDPMPipeline.from_pipe(tiny_pipeline.to_diffusers())
    assert storages(stock.unet) == storages(DDPMPipelineCustom.from_pipe(stock).unet) == storages(tiny_pipeline.unet)


# ------------------------------------------------------------------ saving


def test_a_save_that_fails_leaves_the_old_one_and_no_rubbish(tiny_pipeline, make_pipeline, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny_pipeline.save_pretrained(folder)
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(type(tiny_pipeline.scheduler), "save_config", full_disk)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            make_pipeline().save_pretrained(target)
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_save_beside_other_files_and_another_variant_leaves_them(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "unet" / "notes.txt").write_text("mine")
    tiny_pipeline.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    tiny_pipeline.save_pretrained(tmp_path, variant="ema")
    names = sorted(p.name for p in (tmp_path / "unet").iterdir())
    assert names == [
        "config.json",
        "diffusion_pytorch_model.ema.safetensors",
        "diffusion_pytorch_model.safetensors",
        "notes.txt",
    ]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for variant in (None, "ema"):
        DDPMPipelineCustom.from_pretrained(tmp_path, variant=variant)


def test_a_new_folder_appears_in_one_step(tmp_path):
    with staging_folder(tmp_path / "deep" / "model") as staged:
        (staged / "file").write_text("x")
        move_saved(staged, tmp_path / "deep" / "model", None)
    assert os.listdir(tmp_path / "deep" / "model") == ["file"] and os.listdir(tmp_path / "deep") == ["model"]


def test_saving_to_the_current_folder_works(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline.save_pretrained(".")
    assert sorted(os.listdir()) == ["model_index.json", "scheduler", "unet"]
    DDPMPipelineCustom.from_pretrained(".")


@pytest.mark.parametrize("exists", [True, False])
def test_saving_to_a_link_writes_to_the_folder_it_points_to(tiny_pipeline, tmp_path, monkeypatch, exists):
    """The target may lie on another disk, so files are staged there: none is ever renamed from elsewhere."""
    target = tmp_path / "disk" / "model"
    (target if exists else target.parent).mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    replace, sources = os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: (sources.append(Path(a)), replace(a, b)))
    for _ in range(2):  # the second save replaces the first
        tiny_pipeline.save_pretrained(tmp_path / "link")
    assert sources and all(target.parent in source.parents for source in sources)
    assert (tmp_path / "link").is_symlink() and os.listdir(target.parent) == ["model"]
    assert sorted(os.listdir(target)) == ["model_index.json", "scheduler", "unet"]
    DDPMPipelineCustom.from_pretrained(tmp_path / "link")


# ------------------------------------------------------------------ the model's T


def test_a_scheduler_trained_on_another_T_is_refused_before_the_first_step(tiny_pipeline, make_unet, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    swapped = DDPMPipelineCustom.from_pretrained(tmp_path)
    swapped.scheduler = DDIMScheduler()
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, scheduler=DDIMScheduler())
    told = DDPMPipelineCustom(make_unet(time_embedding_type="learned", num_train_timesteps=20), DDIMScheduler())
    for pipe in (swapped, loaded, told):
        pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
        with pytest.raises(ValueError, match="DDIMScheduler.*num_train_timesteps=1000.*trained on 20"):
            pipe(num_inference_steps=5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_made_from_the_models_own_has_its_T(tiny_pipeline, name):
    tiny_pipeline.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config)
    assert tiny_pipeline(num_inference_steps=5, output_type="np").images.shape == (1, 8, 8, 3)
