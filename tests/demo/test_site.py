"""The files of the page: which they are, what they know about a model, and which models are refused."""

import copy
import json
import os
import re
import shutil
import tarfile

import pytest
import torch

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.demo.site import WEB, add_runtime, check_page_can_sample, integrity, page_facts, site_files, write_site
from ddpm_hf.export.onnx_files import agrees
from ddpm_hf.models.onnx_unet import OnnxUNet
from ddpm_hf.pipelines.guidance import mark_null_class
from tests.conftest import TINY_SCHEDULER

RUNTIME = json.loads((WEB / "runtime.json").read_text(encoding="utf-8"))


@pytest.fixture
def model(exports, tmp_path):
    return shutil.copytree(exports[1], tmp_path / "tiny")


def test_files_are_the_page_its_facts_and_the_network(model):
    files = site_files(model)
    page = {path.name for path in WEB.iterdir()}
    assert files.keys() == page | {"model.json", "model.onnx"} and {"index.html", "style.css", "app.js"} <= page
    assert files["model.onnx"] == model / "onnx" / "model.onnx"
    assert json.loads(files["model.json"])["name"] == "tiny"


def test_a_network_without_its_own_file_is_exported(model, make_pipeline, tmp_path):
    torch.manual_seed(1)
    pipe = make_pipeline()
    shutil.rmtree(model / "onnx")
    pipe.save_pretrained(model)
    exported = tmp_path / "model.onnx"
    exported.write_bytes(site_files(model)["model.onnx"])
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(OnnxUNet(exported)(x, 5).sample, pipe.unet(x, 5).sample)
    assert not (model / "onnx").exists()


@pytest.mark.parametrize("other", ["weights", "classes", "schedule", "file"])
def test_an_export_of_another_training_is_not_its_own(exports, model, make_pipeline, other):
    file, pipe = model / "onnx" / "model.onnx", copy.deepcopy(exports[0])
    assert agrees(file, pipe)
    if other == "weights":
        with torch.no_grad():
            pipe.unet.conv_out.bias += 0.1
    elif other == "classes":
        pipe = make_pipeline()
    elif other == "schedule":
        pipe.scheduler = DDPMSchedulerCustom(**{**TINY_SCHEDULER, "beta_schedule": "linear"})
    else:
        file.write_bytes(b"no graph")
    assert not agrees(file, pipe)


def test_facts_are_exact_and_name_the_labels(make_pipeline):
    scheduler = DDPMSchedulerCustom(**TINY_SCHEDULER, variance_type="fixed_large")
    pipe = make_pipeline(scheduler, num_class_embeds=4)
    mark_null_class(pipe.unet, 1)
    facts = json.loads(json.dumps(page_facts(pipe)))
    assert facts["labels"] == [0, 2, 3] and facts["null_class"] == 1
    assert facts["alphas_cumprod"] == scheduler.diffusion.alphas_cumprod.tolist()
    assert facts["variance_type"] == "fixed_large" and facts["prediction_type"] == "v_prediction"
    assert page_facts(make_pipeline())["labels"] is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_channels": 2, "out_channels": 2}, "channels of a model for the page must be 1 or 3, got 2"),
        ({"sample_size": None}, "sample_size .* a size, got None"),
        ({"num_class_embeds": None, "class_embed_type": "timestep"}, "class_embed_type .* None, got 'timestep'"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 20}, "time_embedding_type"),
        ({"out_channels": 6, "scheduler": {"variance_type": "learned_range"}}, "a fixed variance, got 'learned_range'"),
        ({"scheduler": {"thresholding": True}}, "thresholding .* False, got True"),
    ],
)
def test_a_model_that_the_page_cannot_sample_from_is_refused(make_pipeline, changes, named):
    options = {**TINY_SCHEDULER, **changes.pop("scheduler", {})}
    with pytest.raises(ValueError, match=named):
        check_page_can_sample(make_pipeline(DDPMSchedulerCustom(**options), **changes))


def test_a_site_is_written_beside_other_files(model, tmp_path):
    folder = tmp_path / "new" / "site"
    write_site(model, folder)
    (folder / "index.html").write_text("old")
    (folder / "other.txt").write_text("kept")
    write_site(model, folder)
    assert {path.name for path in folder.iterdir()} == site_files(model).keys() | {"other.txt"}
    assert (folder / "index.html").read_bytes() == (WEB / "index.html").read_bytes()
    assert (folder / "model.onnx").read_bytes() == (model / "onnx" / "model.onnx").read_bytes()


def test_a_place_that_is_no_folder_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be"):
        write_site(model, tmp_path / "file")


def test_the_runtime_of_npm_has_the_hashes_that_the_page_accepts(tmp_path):
    if not add_runtime(tmp_path):
        pytest.skip("npm cannot get onnxruntime-web")
    found = {path.name: integrity(path.read_bytes()) for path in (tmp_path / "vendor").iterdir()}
    assert found == RUNTIME["files"]


def test_without_npm_there_is_no_runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert add_runtime(tmp_path) is False and not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_a_runtime_with_another_hash_is_refused(tmp_path, monkeypatch):
    for name in RUNTIME["files"]:
        file = tmp_path / "package" / "dist" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"changed")
    with tarfile.open(tmp_path / "changed.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\ncp {tmp_path}/changed.tgz .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="of npm must have the hash sha384-"):
        add_runtime(tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_hash_is_that_of_subresource_integrity():
    # The example of the W3C's recommendation.
    script = b"alert('Hello, world.');"
    assert integrity(script) == "sha384-H8BRh8j48O9oYatfu5AZzq6A9RINhZO5H16dQZngK7T62em8MUt1FLm52t+eX6xO"


def test_the_page_names_one_other_host():
    text = "".join(path.read_text(encoding="utf-8") for path in WEB.iterdir())
    assert set(re.findall(r"https?://([^/'\" ]+)", text)) == {"cdn.jsdelivr.net", "www.w3.org"}


def test_the_page_is_plain_javascript_without_packages():
    for path in WEB.glob("*.js"):
        imported = re.findall(r'^import .* from "(.+)";$', path.read_text(encoding="utf-8"), flags=re.M)
        assert all((WEB / name).is_file() and name.startswith("./") for name in imported)
