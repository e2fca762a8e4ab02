"""Training with --push_to_hub: runs that are killed during an upload, and runs that the Hub refuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load, load_file, save_file
from sklearn.datasets import load_sample_image

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.hub import commits
from ddpm_hf.hub.publish import published_files
from ddpm_hf.training import uploads
from ddpm_hf.training.uploads import Uploader, stage_step, staged_steps
from tests.conftest import TINY_TRAINING, flags
from tests.hub import Fault, HubServer, hub_environment, run_client
from tests.hub.client import sample

ROOT = Path(__file__).resolve().parents[2]
TRAIN, PUBLISH = (str(ROOT / "training" / name) for name in ("train.py", "publish.py"))
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINE = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]
TINY = flags(
    **TINY_TRAINING, resolution=8, total_images=64, checkpoint_every_steps=2, log_every_steps=2, sample_steps=2
) + ["--push_to_hub", "--hub_model_id"]
FINAL, STEP = "Publish a model trained with ddpm_hf", "Step 2 of a training with ddpm_hf"


def test_a_staged_step_is_complete_and_shares_the_ema_file(tiny_pipeline, tmp_path):
    ema = tmp_path / "ema.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in tiny_pipeline.unet.state_dict().items()}
    save_file(weights, ema, metadata={"format": "pt"})
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    folder = stage_step(tmp_path, 2, tiny_pipeline.unet, tiny_pipeline.scheduler, ema)
    assert staged_steps(tmp_path) == [folder] and folder.name == "step-00000002"
    assert (folder / WEIGHTS).samefile(ema) and (folder / "config.yaml").read_text() == "seed: 0\n"
    assert set(published_files(folder)) == {*PIPELINE, "config.yaml"}
    expected, images = (sample(pipe) for pipe in (tiny_pipeline, DDPMPipelineCustom.from_pretrained(folder)))
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)


def test_staging_copies_the_weights_where_links_are_not_supported(tiny_pipeline, tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", fail)
    (tmp_path / "ema.safetensors").write_bytes(b"weights")
    folder = stage_step(tmp_path, 2, tiny_pipeline.unet, tiny_pipeline.scheduler, tmp_path / "ema.safetensors")
    assert (folder / WEIGHTS).read_bytes() == b"weights"


def test_staging_that_fails_is_logged_and_leaves_no_folder(tiny_pipeline, tmp_path, caplog):
    uploader = Uploader(tmp_path, "user/name", every_steps=2)
    uploader.upload_checkpoint(1, tiny_pipeline.unet, tiny_pipeline.scheduler, tmp_path / "missing")
    assert caplog.text == ""  # step 1 is not uploaded
    uploader.upload_checkpoint(2, tiny_pipeline.unet, tiny_pipeline.scheduler, tmp_path / "missing")
    assert "Step 2 could not be prepared for upload" in caplog.text
    assert list((tmp_path / "unpublished").iterdir()) == []


def test_constructing_an_uploader_makes_no_request_and_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "get_token", lambda: None)
    uploader = Uploader(tmp_path, "user/name")
    with pytest.raises(ValueError, match="not logged in"):
        uploader.create_repository()
    assert list(tmp_path.iterdir()) == []


def test_an_uploader_without_a_repository_does_nothing(tiny_pipeline, tmp_path):
    uploader = Uploader(tmp_path, None)
    uploader.create_repository()
    uploader.start()
    uploader.upload_checkpoint(2, tiny_pipeline.unet, tiny_pipeline.scheduler, tmp_path)
    uploader.finish()
    assert list(tmp_path.iterdir()) == []


def test_failed_uploads_keep_the_newest_steps_only(tiny_pipeline, tmp_path, monkeypatch, caplog):
    def fail(*_args, **_options):
        raise ValueError("refused")

    monkeypatch.setattr(uploads, "publish", fail)
    uploader = Uploader(tmp_path, "user/name", keep=2)
    (tmp_path / "ema.safetensors").write_bytes(b"weights")
    uploader.start()
    for step in range(1, 6):
        uploader.upload_checkpoint(step, tiny_pipeline.unet, tiny_pipeline.scheduler, tmp_path)
    uploader.finish()
    assert [folder.name for folder in staged_steps(tmp_path)] == ["step-00000004", "step-00000005"]
    assert "Could not upload step-00000001: refused" in caplog.text
    assert f"ddpm-publish {tmp_path} --repo_id user/name" in caplog.text


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        server.token = server.add_user("user")
        yield server


def environment(hub, tmp: Path, **changes: str) -> dict[str, str]:
    return hub_environment(hub, tmp / "home", **{"HF_TOKEN": hub.token} | changes)


def no_token_in(hub, folder: Path, *texts: str) -> bool:
    contents = [file.read_bytes() for file in folder.rglob("*") if file.is_file()] + [text.encode() for text in texts]
    return not any(hub.token.encode() in content for content in contents)


@pytest.fixture(scope="module")
def stopped(hub, tmp_path_factory):
    """A run that gets SIGTERM during its first upload, whose commit the Hub makes nevertheless; then the same command."""
    tmp = tmp_path_factory.mktemp("stopped")
    hub.faults.append(Fault("POST .*/user/stopped/commit/", delay_seconds=3))
    command = [sys.executable, TRAIN, "--output_dir", str(tmp / "run"), *TINY, "user/stopped"]
    first = subprocess.Popen(
        command, env=environment(hub, tmp), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not any("/user/stopped/commit/" in request.path for request in hub.requests):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 128 + signal.SIGTERM, output
    left = [folder.name for folder in (tmp / "run" / "unpublished").iterdir()]
    second = subprocess.run(command, env=environment(hub, tmp), capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    return tmp, left, output + second.stdout + second.stderr


def test_a_killed_upload_is_neither_lost_nor_made_twice(hub, stopped):
    tmp, left, output = stopped
    repo = hub.repo("user/stopped")
    assert left == ["step-00000002"]
    assert [commit.title for commit in repo.history()] == [FINAL, STEP, "initial commit"]
    assert repo.tags == {"step-2": repo.history()[1].oid}
    assert list((tmp / "run" / "unpublished").iterdir()) == []
    assert no_token_in(hub, tmp / "run", output)


def test_an_uploaded_step_holds_the_ema_weights_of_its_checkpoint(hub, stopped):
    pushed = load(hub.repo("user/stopped").contents("step-2")[WEIGHTS])
    checkpoint = stopped[0] / "run" / "checkpoints" / "checkpoint-00000002"
    ema, model = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    assert pushed.keys() == ema.keys()
    assert all((pushed[name] == ema[name]).all() for name in ema)
    assert any((pushed[name] != model[name]).any() for name in ema)


def test_both_pipelines_loaded_over_xet_give_the_folders_images(hub, stopped):
    tmp = stopped[0]
    (tmp / "out").mkdir()
    steps = ["trained, stock", "trained", "trained, step 2"]
    hub.requests.clear()
    run_client(environment(hub, tmp, HF_HOME=str(tmp / "elsewhere")), "load", str(tmp / "out"), *steps)
    assert sum("/xorbs/" in request.path for request in hub.requests) >= 3
    expected = sample(DDPMPipelineCustom.from_pretrained(tmp / "run"))
    for step in steps[:2]:
        np.testing.assert_allclose(np.load(tmp / "out" / f"{step}.npy"), expected, rtol=0, atol=1e-5)
    assert np.abs(np.load(tmp / "out" / "trained, step 2.npy") - expected).max() > 1e-4


@pytest.fixture(scope="module")
def refused(hub, tmp_path_factory):
    """Runs on a data set of the Hub whose uploads the Hub refuses, and publishing afterwards."""
    tmp = tmp_path_factory.mktemp("refused")
    photograph = load_sample_image("china.jpg")
    pictures = [Image.fromarray(photograph[i * 20 : i * 20 + 16, :16]) for i in range(16)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(tmp / "train.parquet")
    data = {"data/train-00000-of-00001.parquet": (tmp / "train.parquet").read_bytes()}
    hub.add_repo("user/pictures", data, kind="datasets")
    # A wait longer than `longest_wait_seconds` is not retried.
    hub.faults.append(Fault("POST .*/user/kept/commit/", status=429, retry_after_seconds=9999, times=3))

    hub.faults.append(Fault("POST .*/user/silent/commit/", hangs="silent"))
    hub.faults.append(Fault("POST .*/user/revoked/commit/", status=401, times=2))

    def train(name: str, *more: str, **env: str) -> dict:
        options = [*TINY, name, *more, "--output_dir", str(tmp / name.replace("/", "-")), "--dataset", "user/pictures"]
        return {"script": TRAIN, "arguments": [*options, "--channels", "3"], "env": env}

    runs = {
        "bad token": train("user/bad", HF_TOKEN="hf_" + "0" * 34),
        "no token": train("user/bad", HF_TOKEN=""),
        "foreign": train("other/name"),
        "kept": train("user/kept"),
        "silent": train("user/silent", "--push_wait_seconds", "3"),
        "silent, later": {"script": PUBLISH, "arguments": [str(tmp / "user-silent")], "env": {}},
        "revoked": train("user/revoked"),
        "later": {
            "script": PUBLISH,
            "arguments": [str(tmp / "user-kept"), "--tag", "v1", "--with_training_state"],
            "env": {},
        },
    }
    return tmp, dict(zip(runs, run_client(environment(hub, tmp), "scripts", requests=list(runs.values()))))


@pytest.mark.parametrize(
    "run, words",
    {
        "bad token": ["does not accept this token", "hf auth login"],
        "no token": ["not logged in", "hf auth login"],
        "foreign": ["other/name", "no write access"],
    }.items(),
)
def test_a_run_without_write_access_ends_before_training(hub, refused, run, words):
    tmp, runs = refused
    assert runs[run]["status"] == 1
    assert [word for word in ["train.py: error: ", *words] if word not in runs[run]["output"]] == []
    assert not list(tmp.glob("*/checkpoints")) or {folder.parent.name for folder in tmp.glob("*/checkpoints")} <= {
        "user-kept",
        "user-silent",
        "user-revoked",
    }


def test_a_refused_upload_is_kept_and_logged_and_training_continues(hub, refused):
    tmp, runs = refused
    assert runs["kept"]["status"] == 0, runs["kept"]["output"]
    output = runs["kept"]["output"]
    assert "Could not upload step-00000002" in output and "Could not upload the model" in output and "429" in output
    assert f"ddpm-publish {tmp / 'user-kept'} --repo_id user/kept" in output
    assert DDPMPipelineCustom.from_pretrained(tmp / "user-kept").unet.config.in_channels == 3
    assert no_token_in(hub, tmp / "user-kept", output)


def test_an_upload_that_hangs_is_given_up_and_kept_at_the_end(hub, refused):
    tmp, runs = refused
    assert runs["silent"]["status"] == 0, runs["silent"]["output"]
    output = runs["silent"]["output"]
    assert "Could not upload step-00000002, the model: uploads to user/silent took longer than 3 s." in output
    assert f"ddpm-publish {tmp / 'user-silent'} --repo_id user/silent" in output
    assert output.count("Could not upload") == 1 and "Traceback" not in output
    assert runs["silent, later"]["status"] == 0, runs["silent, later"]["output"]
    assert [commit.title for commit in hub.repo("user/silent").history()] == [FINAL, STEP, "initial commit"]


def test_a_token_revoked_during_training_is_said_and_nothing_is_lost(hub, refused):
    output = refused[1]["revoked"]["output"]
    assert refused[1]["revoked"]["status"] == 0 and "Traceback" not in output
    assert output.count("the Hub does not accept this token for user/revoked: run `hf auth login`") == 2
    assert (refused[0] / "user-revoked" / "unpublished" / "step-00000002" / WEIGHTS).is_file()


def test_publish_uploads_kept_steps_to_the_configured_repository(hub, refused):
    tmp, runs = refused
    assert runs["later"]["status"] == 0, runs["later"]["output"]
    repo = hub.repo("user/kept")
    assert [commit.title for commit in repo.history()] == [FINAL, STEP, "initial commit"]
    assert repo.tags == {"step-2": repo.history()[1].oid, "v1": repo.at().oid}
    assert repo.contents()[WEIGHTS] == (tmp / "user-kept" / WEIGHTS).read_bytes()
    assert "user/pictures" in repo.contents()["README.md"].decode()
    checkpoint = tmp / "user-kept" / "checkpoints" / "checkpoint-00000004"
    state = repo.contents("training-state")
    whole = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.suffix == ".safetensors"}
    assert {name: state[f"checkpoints/{checkpoint.name}/{name}"] for name in whole} == whole
    published = [*repo.contents().values(), *state.values()]
    assert not any(str(path).encode() in content for path in (tmp, Path.home()) for content in published)


def test_a_data_set_on_the_hub_gives_the_same_images_streamed(hub, refused, tmp_path):
    code = """
import sys, datasets, numpy as np
for name, streaming in (("plain", False), ("streamed", True)):
    rows = datasets.load_dataset("user/pictures", split="train", streaming=streaming)
    np.save(sys.argv[1] + "/" + name, np.stack([np.asarray(row["image"]) for row in rows]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment(hub, refused[0]), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    expected = [np.asarray(row["image"]) for row in datasets.Dataset.from_parquet(str(refused[0] / "train.parquet"))]
    for name in ("plain", "streamed"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), np.stack(expected))
