"""What may be published: links, weights and model_index.json are checked before anything is sent."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_hf.hub.contents import published_files
from ddpm_hf.hub.publish import publish, training_state

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tests.hub.test_publish import make_run

    return make_run(tmp_path_factory.mktemp("saved") / "run", seed=0)


@pytest.fixture
def run(saved, tmp_path):
    (tmp_path / "secret").write_text("secret")
    return shutil.copytree(saved, tmp_path / "run")


def write_index(change):
    def write(run):
        file = run / "model_index.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return write


def link(name: str, target: str = "../secret"):
    def make(run):
        path = run / name
        if path.is_dir():
            shutil.move(path, run.parent / "moved")
            os.symlink(run.parent / "moved", path)
            return
        path.unlink(missing_ok=True)
        os.symlink(os.path.relpath(run / target, path.parent) if target.startswith("..") else target, path)

    return make


def cut(run):
    file = run / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])


def drop_a_tensor(run):
    weights = load_file(run / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, run / WEIGHTS)


def reshape_a_tensor(run):
    save_file(load_file(run / WEIGHTS) | {"conv_in.weight": torch.zeros(2)}, run / WEIGHTS)


def folder_as_file(run):
    (run / "metrics.json").unlink()
    (run / "metrics.json").mkdir()


def fifo(run):
    os.mkfifo(run / "loss.png")


REFUSED = {
    "image outside": (link("x.png"), "x.png leads out of the folder"),
    "card outside": (link("README.md"), "README.md leads out"),
    "metrics outside": (link("metrics.json"), "metrics.json leads out"),
    "index outside": (link("model_index.json"), "model_index.json leads out"),
    "part outside": (link("unet"), "leads out of the folder"),
    "link to itself": (link("x.png", "x.png"), "x.png"),
    "folder as a file": (folder_as_file, "metrics.json must be a file"),
    "pipe": (fifo, "loss.png must be a file"),
    "weights missing": (lambda run: (run / WEIGHTS).unlink(), "unet"),
    "weights empty": (lambda run: (run / WEIGHTS).write_bytes(b""), "is truncated"),
    "weights cut": (cut, "is truncated"),
    "weights without tensors": (lambda run: save_file({}, run / WEIGHTS), "holds no weights"),
    "a web page as weights": (lambda run: (run / WEIGHTS).write_text("<html>" * 99), "is truncated or no safetensors"),
    "a tensor missing": (drop_a_tensor, "conv_in.weight is no such weight"),
    "a tensor of another shape": (reshape_a_tensor, r"conv_in.weight is \[2\], expected"),
    "network without configuration": (lambda run: (run / "unet/config.json").unlink(), "unet/config.json is missing"),
    "scheduler without configuration": (
        lambda run: shutil.rmtree(run / "scheduler"),
        "scheduler_config.json is missing",
    ),
    "configuration as a list": (lambda run: (run / "unet/config.json").write_text("[]"), "JSON object, got list"),
    "configuration of something else": (
        lambda run: (run / "unet/config.json").write_text('{"block_out_channels": 5}'),
        "describes no UNet",
    ),
    "shard missing": (
        lambda run: (run / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        "lists gone.safetensors",
    ),
    "index as a list": (write_index(lambda index: [index]), "model_index.json must be a JSON object, got list"),
    "index as null": (write_index(lambda index: None), "must be a JSON object, got NoneType"),
    "index cut": (lambda run: (run / "model_index.json").write_text('{"unet": '), "is no JSON"),
    "index without unet": (
        write_index(lambda index: {k: v for k, v in index.items() if k != "unet"}),
        "none for 'unet'",
    ),
    "index without scheduler": (write_index(lambda index: index | {"scheduler": [None, None]}), "none for 'scheduler'"),
    "index naming outside": (
        write_index(lambda index: index | {"../../x": ["diffusers", "UNet2DModel"]}),
        r"got '\.\./\.\./x'",
    ),
    "index naming an absolute path": (write_index(lambda index: index | {"/etc": ["a", "b"]}), "got '/etc'"),
    "index with numbers": (write_index(lambda index: index | {"unet": [1, 2]}), "got 'unet'"),
    "card in another encoding": (lambda run: (run / "README.md").write_bytes(b"\xff\xfe"), "README.md must be UTF-8"),
    "metrics that are no JSON": (lambda run: (run / "metrics.json").write_text("{"), "metrics.json must be JSON"),
    "configuration that is no YAML": (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml must be YAML"),
}


@pytest.mark.parametrize("damage, message", REFUSED.values(), ids=REFUSED)
def test_what_would_not_load_or_leads_outside_is_refused(run, damage, message):
    damage(run)
    # Nothing is sent: the tests run offline, and there is no token.
    with pytest.raises(ValueError, match=message):
        publish(run, "user/name")


def test_links_within_the_folder_and_a_linked_folder_are_published(run, tmp_path):
    (run / "copy.png").symlink_to("samples.png")
    (tmp_path / "link").symlink_to(run)
    assert "copy.png" in published_files(tmp_path / "link")
    assert set(FILES) < set(published_files(run))


def test_a_training_state_with_a_link_outside_is_refused(run):
    checkpoint = run / "checkpoints" / "checkpoint-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").symlink_to(run.parent / "secret")
    with pytest.raises(ValueError, match=r"state.json leads out of the folder"):
        training_state(run, checkpoint)
