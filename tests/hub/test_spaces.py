"""A demo becomes a Space in one commit, and an upload is retried as that of a model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.hub import Fault, HubServer, hub_environment

CLIENT = """
import json, sys
from ddpm_hf.hub.spaces import publish_space
from ddpm_hf.transfer.downloads import Retries

asked = json.loads(sys.argv[1])
files = {name: text.encode() for name, text in asked.pop("files").items()}
try:
    done = publish_space(**asked, files=files, retries=Retries(first_wait_seconds=0.05))
    print(json.dumps({"commit": done.commit, "url": done.url}))
except (ValueError, OSError) as error:
    print(json.dumps({"error": str(error)}))
"""
LOAD = """
import json
from ddpm_hf import DDPMPipelineCustom

pipe = DDPMPipelineCustom.from_pretrained("maker/digits", backend="onnxruntime")
print(json.dumps(pipe(1, seed=0, num_inference_steps=3, output_type="np").images.tolist()))
"""
ROOT = Path(__file__).resolve().parents[2]
FILES = {"README.md": "---\ntitle: Digits\nsdk: static\n---\n", "index.html": "<p>", "model.onnx": "\0graph" * 100}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def publish(hub, tmp_path):
    token = hub.add_user("user")

    def call(repo_id: str, files: dict[str, str] = FILES, sdk: str = "static", **options) -> dict:
        asked = json.dumps({"repo_id": repo_id, "files": files, "sdk": sdk, **options})
        env = hub_environment(hub, tmp_path / "home", HF_TOKEN=token, HF_HUB_DISABLE_XET="1")
        command = [sys.executable, "-c", CLIENT, asked]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def test_a_space_holds_the_files_in_one_commit(hub, publish):
    done = publish("user/digits")
    space = hub.repo("user/digits", "spaces")
    assert space.contents() == {name: text.encode() for name, text in FILES.items()}
    assert done["url"] == f"{hub.endpoint}/spaces/user/digits/commit/{space.at('main').oid}"
    assert len(space.history()) == 2 and space.at("main").files["model.onnx"].is_lfs
    assert ("models", "user/digits") not in hub.repos
    publish("user/digits", FILES | {"index.html": "<p>new"})
    assert space.contents()["index.html"] == b"<p>new" and len(space.history()) == 3


def test_a_lost_response_makes_no_second_commit(hub, publish):
    hub.faults += [Fault("POST .*/spaces/user/lost/commit/", after_acting=True, times=1)]
    done = publish("user/lost")
    space = hub.repo("user/lost", "spaces")
    assert done["commit"] == space.at("main").oid and len(space.history()) == 2
    assert done["url"] == f"{hub.endpoint}/spaces/user/lost/commit/{done['commit']}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": {"index.html": "<p>"}}, "files must hold README.md"),
        ({"sdk": "docker"}, "sdk must be one of"),
        ({"repo_id": "other/digits"}, "write access|rights"),
    ],
)
def test_what_cannot_be_a_space_is_refused(hub, publish, options, message):
    answer = publish(**{"repo_id": "user/refused", **options})
    assert re.search(message, answer["error"])
    assert ("spaces", "user/refused") not in hub.repos


def test_the_script_publishes_a_model_with_its_onnx_file_and_a_page(hub, make_pipeline, tmp_path):
    pipe = make_pipeline(in_channels=1, out_channels=1)
    pipe.save_pretrained(tmp_path / "model")
    env = hub_environment(hub, tmp_path / "home", HF_TOKEN=hub.add_user("maker"), HF_HUB_DISABLE_XET="1")
    command = [sys.executable, str(ROOT / "training" / "publish.py"), str(tmp_path / "model"), "--with_onnx"]
    command += ["--repo_id", "maker/digits", "--space", "maker/page"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model, page = hub.repo("maker/digits").contents(), hub.repo("maker/page", "spaces").contents()
    assert model["onnx/model.onnx"] == page["model.onnx"] and "unet/config.json" in model
    assert "models: [maker/digits]" in page["README.md"].decode() and "index.html" in page
    # What loads the file again downloads nothing else.
    hub.requests.clear()
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got = np.array(json.loads(done.stdout))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(1, seed=0, num_inference_steps=3, output_type="np").images
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    read = {
        request.split("/resolve/")[1].split("/", 1)[1] for request in map(str, hub.requests) if "/resolve/" in request
    }
    assert read and all(name.startswith("onnx/model.onnx") for name in read)


def test_the_script_publishes_a_gradio_space_for_a_model(hub, make_pipeline, tmp_path):
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    make_pipeline().save_pretrained(tmp_path / "model")
    env = hub_environment(hub, tmp_path / "home", HF_TOKEN=hub.add_user("guide"), HF_HUB_DISABLE_XET="1")
    script = [sys.executable, str(ROOT / "training" / "publish.py")]

    def publish(*arguments: str) -> subprocess.CompletedProcess:
        command = [*script, "--repo_id", "guide/model", "--gradio_space", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    missing = publish("guide/early")
    assert missing.returncode == 1 and "guide/model" in missing.stderr and "Traceback" not in missing.stderr
    assert ("spaces", "guide/early") not in hub.repos
    for arguments in (("guide/first", "--model", str(tmp_path / "model")), ("guide/second",)):
        done = publish(*arguments)
        assert done.returncode == 0, done.stderr
        space = hub.repo(arguments[0], "spaces").contents()
        assert {"app.py", "requirements.txt", "README.md", "ddpm_hf/demo/app.py"} <= space.keys()
        assert 'from_pretrained("guide/model")' in space["app.py"].decode()
    assert "unet/config.json" in hub.repo("guide/model").contents()
