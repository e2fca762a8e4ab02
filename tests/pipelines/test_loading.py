"""Folders and classes of this package and of diffusers: loading, saving, and conversion without copying weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from safetensors.torch import load_file

from ddpm_hf import DDIMSchedulerCustom, DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.files import staging_folder
from ddpm_hf.pipelines.guidance import mark_null_class, null_class_of
from ddpm_hf.pipelines.loading import move_saved, scheduler_class
from tests.pipelines.helpers import ROUNDING, SHORT, images, seeded, stock_unet


@pytest.fixture
def stock_pipeline(unet_config) -> DDPMPipeline:
    return DDPMPipeline(UNet2DModel(**unet_config).eval(), DDPMScheduler(**SHORT))


# ---------------------------------------------------------------------- loading


def write_flat(stock: DDPMPipeline, folder, kind: str) -> None:
    """The layout of google/ddpm-*: everything in the root."""
    stock.unet.save_pretrained(folder, safe_serialization=kind == "safetensors")
    stock.scheduler.save_pretrained(folder)
    stock.save_config(folder)


@pytest.mark.parametrize("layout", ["nested", "nested bin", "flat safetensors", "flat bin"])
def test_diffusers_repository_loads_as_this_packages_classes(stock_pipeline, tmp_path, diffusers_log, layout):
    if layout.startswith("nested"):
        stock_pipeline.save_pretrained(tmp_path, safe_serialization=not layout.endswith("bin"))
    else:
        write_flat(stock_pipeline, tmp_path, layout.split()[1])
    assert bool(list(tmp_path.rglob("*.bin"))) == layout.endswith("bin")
    diffusers_log.clear()
    pipe = DDPMPipelineCustom.from_pretrained(str(tmp_path) if layout == "nested" else tmp_path)
    assert diffusers_log.messages == []
    assert type(pipe.unet) is UNet2DModelCustom and type(pipe.scheduler) is DDPMSchedulerCustom
    assert not pipe.unet.training
    for stock_part, part in ((stock_pipeline.unet, pipe.unet), (stock_pipeline.scheduler, pipe.scheduler)):
        public = {k: v for k, v in stock_part.config.items() if not k.startswith("_")}
        assert public.items() <= {k: tuple(v) if isinstance(v, list) else v for k, v in part.config.items()}.items()
    stock_pipeline.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    # Stock's tables are float32, with relative errors of up to 1e-3 in the posterior.
    expected = images(stock_pipeline, batch_size=2, generator=seeded(0), num_inference_steps=20)
    torch.testing.assert_close(images(pipe, batch_size=2, generator=seeded(0)), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (DDIMScheduler, DDIMSchedulerCustom),
        (DDIMSchedulerCustom, DDIMSchedulerCustom),
        (DPMSolverMultistepScheduler, DPMSolverMultistepScheduler),
    ],
)
def test_other_schedulers_load_with_their_configuration(make_pipeline, tmp_path, saved, loaded):
    scheduler = saved(**SHORT, timestep_spacing="trailing")
    make_pipeline(scheduler).save_pretrained(tmp_path)
    found = DDPMPipelineCustom.from_pretrained(tmp_path).scheduler
    assert type(found) is loaded and found.config.timestep_spacing == "trailing"
    assert found.config.num_train_timesteps == scheduler.config.num_train_timesteps


def test_given_components_replace_the_saved_ones(make_pipeline, make_unet, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    unet, scheduler = make_unet(), DDIMScheduler()
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, unet=unet, scheduler=scheduler)
    assert loaded.unet is unet and loaded.scheduler is scheduler
    with pytest.raises(TypeError, match="torch_dtype"):
        DDPMPipelineCustom.from_pretrained(tmp_path, unet=unet, torch_dtype=torch.bfloat16)


def test_loading_options_reach_the_network(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    assert len(list(tmp_path.glob("unet/*.ema-*.safetensors"))) > 2 or list(tmp_path.glob("unet/*ema*.safetensors"))
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, variant="ema", torch_dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    assert torch.equal(loaded.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight.bfloat16())


def test_missing_folder_configuration_and_weights_are_named(tiny_pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DDPMPipelineCustom.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as error:
        DDPMPipelineCustom.from_pretrained("outputs/nowhere")  # could be a folder or a repository
    assert any("outputs/nowhere" in note for note in [str(error.value), *error.value.__notes__])
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        DDPMPipelineCustom.from_pretrained(tmp_path)
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        DDPMPipelineCustom.from_pretrained(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="unet/config.json"):
        DDPMPipelineCustom.from_pretrained(tmp_path)


def with_entry(name: str, value):
    return lambda content: {**content, name: value}


def refused(folder: Path, file: str, kind: type[Exception], words: str) -> None:
    """Loading fails with an error that begins with, or holds, the file's path; no random state is used for weights."""
    with pytest.raises(kind, match=words) as error:
        DDPMPipelineCustom.from_pretrained(folder)
    assert str(folder / file) in str(error.value)


NO_SCHEDULERS = [
    "MyScheduler",
    "UNet2DModel",
    "DDPMPipeline",
    "SchedulerMixin",
    "ConfigMixin",
    "KarrasDiffusionSchedulers",
]
NO_SCHEDULERS += ["utils", "logging", "load_image", "__version__", "__getattr__", "schedulers", "FlaxDDPMScheduler"]


@pytest.mark.parametrize("name", NO_SCHEDULERS)
def test_a_name_that_is_no_scheduler_of_diffusers_is_refused(name):
    assert scheduler_class(name) is None


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        *(
            ("scheduler/scheduler_config.json", with_entry("_class_name", n), f"scheduler.*{n}")
            for n in NO_SCHEDULERS[:2]
        ),
        ("scheduler/scheduler_config.json", with_entry("_class_name", "../../x"), "must name a class"),
        ("scheduler/scheduler_config.json", with_entry("_class_name", "VQDiffusionScheduler"), "num_vec_classes"),
        ("scheduler/scheduler_config.json", with_entry("num_train_timesteps", "20"), "num_train_timesteps"),
        ("scheduler/scheduler_config.json", with_entry("beta_start", float("nan")), "beta_start"),
        ("unet/config.json", with_entry("_class_name", "UNet1DModel"), "UNet2DModel"),
        ("unet/config.json", with_entry("_class_name", None), "must name a class"),
        ("unet/config.json", with_entry("in_channels", 0), "in_channels must be"),
        ("unet/config.json", with_entry("norm_eps", float("nan")), "norm_eps must be"),
        ("unet/config.json", with_entry("_null_class", "x"), "_null_class"),
        ("unet/config.json", with_entry("_class_names", [1]), "_class_names"),
        ("model_index.json", with_entry("../../x", ["diffusers", "UNet2DModel"]), r"'\.\./\.\./x'"),
        ("model_index.json", with_entry("vae", ["diffusers", "AutoencoderKL"]), "'vae'"),
        ("model_index.json", with_entry("unet", ["../../x", "UNet2DModel"]), "must name a class of diffusers"),
        ("model_index.json", with_entry("unet", ["os", "system"]), "must name a class of diffusers"),
        ("model_index.json", with_entry("unet", ["my_module", "UNet2DModel"]), "must name a class of diffusers"),
        ("model_index.json", with_entry("unet", "UNet2DModel"), "must name a class of diffusers"),
        ("model_index.json", with_entry("unet", [None, None]), "must name a class of diffusers"),
        ("model_index.json", with_entry("scheduler", ["diffusers", "UNet2DModel"]), "must name a class of diffusers"),
        ("model_index.json", with_entry("_class_name", 5), "must name a class"),
        ("model_index.json", lambda content: {}, "for the unet, got None"),
        *(
            (file, lambda content, bad=bad: bad, "JSON object")
            for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
            for bad in ([], None, "text")
        ),
    ],
)
def test_folders_whose_json_is_wrong_are_refused_with_the_file(tiny_pipeline, tmp_path, file, change, words):
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(change(json.loads((tmp_path / file).read_text()))))
    refused(tmp_path, file, ValueError, words)


@pytest.mark.parametrize("content", [b"", b'{"a": 1,', b"<html>", b"\xff\xfe"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_json_is_refused_with_the_file(tiny_pipeline, tmp_path, file, content):
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    refused(tmp_path, file, ValueError, "is not a JSON file")


@pytest.mark.parametrize(
    ("entries", "given"),
    [
        ({"unet": ["ddpm_hf", "UNet2DModelCustom"], "scheduler": ["ddpm_hf", "DDPMSchedulerCustom"]}, []),
        ({"_class_name": "DDIMPipeline", "safety_checker": [None, None], "requires_safety_checker": False}, []),
        ({"unet": ["my_module", "MyUNet"]}, ["unet"]),
        ({"scheduler": ["my_module", "MyScheduler"]}, ["scheduler"]),
    ],
)
def test_only_the_components_to_be_loaded_must_be_known(tiny_pipeline, tmp_path, entries, given):
    tiny_pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    DDPMPipelineCustom.from_pretrained(tmp_path, **{name: getattr(tiny_pipeline, name) for name in given})


def test_whole_safetensors_are_preferred_and_damaged_ones_not_replaced(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    zeros = {name: torch.zeros_like(value) for name, value in tiny_pipeline.unet.state_dict().items()}
    torch.save(zeros, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path).unet
    assert torch.equal(loaded.conv_in.weight, tiny_pipeline.unet.conv_in.weight)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    refused(tmp_path, "unet/diffusion_pytorch_model.safetensors", OSError, "it is empty")


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler(**SHORT)], ids=["own", "stock"])
@pytest.mark.parametrize("network", ["own", "stock"])
def test_saved_files_are_safetensors_and_json_with_stock_names(make_pipeline, tmp_path, scheduler, network):
    pipe = make_pipeline(scheduler)
    if network == "stock":
        pipe = DDPMPipelineCustom(stock_unet(pipe.unet), pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if name != "_diffusers_version"} == {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    for path in tmp_path.rglob("*.json"):
        assert "ddpm_hf" not in path.read_text() and "Custom" not in path.read_text()


def test_second_save_is_whole_and_holds_no_local_path(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "a", max_shard_size="20KB")
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "a")
    assert not any(str(tmp_path) in path.read_text() for path in tmp_path.rglob("*.json"))
    weights = load_file(tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors")
    again = DDPMPipelineCustom.from_pretrained(tmp_path / "a")
    assert all(torch.equal(weights[key], value) for key, value in again.unet.state_dict().items())


def test_weights_are_never_written_as_pickle(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        tiny_pipeline.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


def test_failed_save_keeps_the_old_one_and_leaves_no_files(tiny_pipeline, make_pipeline, tmp_path, monkeypatch):
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


def test_save_keeps_other_files_and_other_variants(tiny_pipeline, tmp_path):
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


def test_new_folder_appears_in_one_step(tmp_path):
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
    """The target may lie on another disk, so files are staged there and never renamed from elsewhere."""
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


@pytest.mark.parametrize("place", ["link", "mount", "link of a component", "mount of a component"])
def test_saving_to_another_disk_works_and_leaves_no_other_files(tiny_pipeline, tmp_path, other_disk, mount, place):
    folder = tmp_path / "model"
    target = folder / ("unet" if "component" in place else "")
    target.parent.mkdir(exist_ok=True)
    if place.startswith("link"):
        target.symlink_to(other_disk)
    else:
        mount(target.relative_to(tmp_path))
    (target / "notes.txt").write_text("kept")
    (target / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()  # of an older save, if it is a component
    for _ in range(2):
        tiny_pipeline.save_pretrained(folder)
    weights = DDPMPipelineCustom.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in tiny_pipeline.unet.state_dict().items())
    assert (target / "notes.txt").read_text() == "kept" and target.is_symlink() == place.startswith("link")
    assert [path.name for path in (folder / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert not [path for path in (*tmp_path.rglob("*"), *other_disk.rglob("*")) if "unfinished" in path.name]


@pytest.mark.parametrize("name", ["", "unet", "model_index.json"])
def test_saving_where_something_is_in_the_way_is_refused(tiny_pipeline, tmp_path, name):
    folder = tmp_path / "model"
    place = folder / name
    if name == "model_index.json":
        place.mkdir(parents=True)
    else:
        place.parent.mkdir(exist_ok=True)
        place.touch()
    with pytest.raises(ValueError, match=f"save_directory must be a folder .*{place.name}' is "):
        tiny_pipeline.save_pretrained(folder)
    assert [path for path in tmp_path.rglob("*") if path != folder] == ([place] if name else [])


# ---------------------------------------------------------------------- diffusers without this package


STOCK_ALONE = """
import importlib.abc, json, logging, sys, warnings

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddpm_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import numpy, torch, diffusers

records = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: records.append(record.getMessage())
for name in ("", "diffusers"):
    logging.getLogger(name).addHandler(handler)
folder, seed, steps, batch, out = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pipe = diffusers.DDPMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(int(seed))
    images = pipe(int(batch), generator, int(steps), output_type="np").images
numpy.save(out, images)
print(json.dumps({
    "log": records,
    "warnings": [str(w.message) for w in caught],
    "classes": [type(part).__module__ for part in (pipe, pipe.unet, pipe.scheduler)],
    "blocked": "ddpm_hf" not in sys.modules,
}))
"""


def test_saved_pipeline_gives_the_same_images_in_diffusers_alone(make_pipeline, tmp_path):
    pipe = make_pipeline(num_class_embeds=None, dropout=0.1)
    pipe.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "11", "20", "3", str(tmp_path / "images.npy")]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_ALONE, *arguments], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["blocked"] and report["log"] == [] and report["warnings"] == []
    assert all(module.startswith("diffusers.") for module in report["classes"])
    mine = images(pipe, batch_size=3, generator=seeded(11)).permute(0, 2, 3, 1).numpy()
    # Limited by stock's float32 tables; other noise would give differences above 0.1.
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), mine, rtol=0, atol=2e-3)


# ---------------------------------------------------------------------- conversion


def storages(unet) -> dict[str, int]:
    return {name: parameter.untyped_storage().data_ptr() for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"num_class_embeds": 4}, {"time_embedding_type": "fourier"}])
def test_conversion_keeps_the_same_parameter_objects(make_pipeline, changes, diffusers_log):
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


def compile_wrapped(pipe) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compile_in_place(pipe) -> None:
    pipe.unet.compile(backend="eager")


each_compilation = pytest.mark.parametrize("compile_unet", [compile_wrapped, compile_in_place])


@each_compilation
def test_conversion_of_a_compiled_network_gives_the_network_itself(make_pipeline, compile_unet):
    pipe, stock = make_pipeline(num_class_embeds=4), make_pipeline(num_class_embeds=4).to_diffusers()
    network, stock_network = pipe.unet, stock.unet
    compile_unet(pipe), compile_unet(stock)
    mark_null_class(pipe.unet)
    converted, back, own = pipe.to_diffusers(), DDPMPipelineCustom.from_diffusers(stock), pipe.from_diffusers(pipe)
    assert type(converted.unet) is UNet2DModel and type(back.unet) is UNet2DModelCustom and own.unet is network
    assert storages(converted.unet) == storages(network) and storages(back.unet) == storages(stock_network)
    assert null_class_of(converted.unet) == null_class_of(network) == 3


@each_compilation
def test_compiled_network_is_saved_as_the_network_itself(make_pipeline, tmp_path, compile_unet):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "plain")
    compile_unet(pipe)
    pipe.save_pretrained(tmp_path / "compiled")
    DDPMPipelineCustom.from_pipe(pipe).save_pretrained(tmp_path / "from_pipe")
    plain, *others = (
        {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()}
        for name in ("plain", "compiled", "from_pipe")
    )
    assert len(plain) == 4 and others == [plain, plain]


@each_compilation
def test_compiled_network_samples_with_labels_and_dropout_off(make_pipeline, compile_unet):
    pipe = make_pipeline(num_class_embeds=4, dropout=0.5)
    options = {"seed": 0, "num_inference_steps": 3, "class_labels": 1, "guidance_scale": 2.0, "null_class": 3}
    expected = images(pipe, **options)
    pipe.unet.train()
    compile_unet(pipe)
    mark_null_class(pipe.unet)
    assert torch.equal(images(pipe, **options | {"null_class": None}), expected)
    shared = DDPMPipelineCustom.from_pipe(pipe)
    shared.set_progress_bar_config(disable=True)
    assert torch.equal(images(shared, **options), expected) and pipe.unet.training
    pipe.compile(backend="eager")
    torch.testing.assert_close(images(pipe, **options), expected, rtol=0, atol=ROUNDING)


def test_converted_pipeline_makes_the_same_images(tiny_pipeline):
    stock = tiny_pipeline.to_diffusers()
    stock.set_progress_bar_config(disable=True)
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    mine = tiny_pipeline(2, seeded[0], 20, output_type="np").images
    theirs = stock(2, seeded[1], 20, output_type="np").images
    assert abs(mine - theirs).max() < 2e-3  # stock's tables are float32


def test_conversion_keeps_other_schedulers_and_refuses_analytic_variance(make_pipeline, scheduler_config):
    ddim = DDIMScheduler(**scheduler_config)
    assert make_pipeline(ddim).to_diffusers().scheduler is ddim
    analytic = DDPMSchedulerCustom(**scheduler_config, variance_type="analytic", analytic_moments=[0.5] * 20)
    with pytest.raises(NotImplementedError, match="analytic"):
        make_pipeline(analytic).to_diffusers()


def test_from_pipe_accepts_converted_pipelines(tiny_pipeline):
    stock = DDPMPipeline.from_pipe(tiny_pipeline.to_diffusers())
    assert storages(stock.unet) == storages(DDPMPipelineCustom.from_pipe(stock).unet) == storages(tiny_pipeline.unet)


def test_from_pipe_takes_the_components_of_a_diffusers_pipeline(stock_pipeline, diffusers_log):
    mine = DDPMPipelineCustom.from_pipe(stock_pipeline)
    assert mine.unet is stock_pipeline.unet and mine.scheduler is stock_pipeline.scheduler
    assert not any("not switched over" in message for message in diffusers_log.messages)
    mine.set_progress_bar_config(disable=True)
    assert images(mine, num_inference_steps=2).shape == (1, 3, 8, 8)


def test_diffusers_from_pipe_takes_this_packages_components(tiny_pipeline):
    # Without `unet=`, stock accepts only components of exactly its own class.
    stock = DDPMPipeline.from_pipe(tiny_pipeline, unet=tiny_pipeline.unet)
    assert stock.unet is tiny_pipeline.unet and stock.scheduler is tiny_pipeline.scheduler
    stock.set_progress_bar_config(disable=True)
    mine, theirs = (images(p, generator=seeded(0), num_inference_steps=20) for p in (tiny_pipeline, stock))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("option", ["torch_dtyp", "trust_remote_code", "custom_pipeline", "ignore_mismatched_sizes"])
def test_an_option_that_nothing_reads_is_refused_by_name(tiny_pipeline, tmp_path, option):
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(
        TypeError, match=f"^{option} must be an option of from_pretrained, which are unet, scheduler, rev"
    ):
        DDPMPipelineCustom.from_pretrained(tmp_path, **{option: True})
    options = {
        "torch_dtype": torch.float16,
        "low_cpu_mem_usage": False,
        "dropout": 0.1,
        "token": None,
        "revision": None,
    }
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, **options)
    assert loaded.unet.dtype == torch.float16 and loaded.unet.config.dropout == 0.1
