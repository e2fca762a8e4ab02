"""Publishing a model and loading it again, with the real client and a Hub server on loopback."""

import hashlib
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.hub.model_card import BEGIN, END
from tests.conftest import TINY_SCHEDULER, TINY_UNET
from tests.hub import Fault, HubServer, hub_environment, run_client
from tests.hub.client import LOAD, sample

ROOT = Path(__file__).resolve().parents[2]
PUBLISH = str(ROOT / "training" / "publish.py")
ROUNDING = 1e-5  # float32 sums in another order: memory alignment differs between processes
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINE = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]
PUBLISHED = sorted([*PIPELINE, "README.md", "config.yaml", "metrics.json", "samples.png"])
USE = 'pipe = DDPMPipeline.from_pretrained("{}")\n'
# Names of attention weights in diffusers today, and in weight files of 2020.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def make_run(folder: Path, seed: int) -> Path:
    """An output folder of a training, with files to publish and others."""
    torch.manual_seed(seed)
    pipe = DDPMPipelineCustom(UNet2DModelCustom(**TINY_UNET).eval(), DDPMSchedulerCustom(**TINY_SCHEDULER))
    pipe.save_pretrained(folder)
    texts = {
        "README.md": "---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n\n# A tiny model\n" + USE.format("run"),
        "metrics.json": '{"training": {}}\n',
        "config.yaml": "seed: 0\n",
        "notes.txt": "mine\n",
        "samples/seed0-000000.png": "one image",
        "checkpoints/step-00000010/unet/config.json": "{}",
        "checkpoints/step-00000010/figure.png": "a figure",
        "logs/events.out.tfevents.0": "log",
        "logs/loss.png": "a figure",
        ".samples.png.unfinished": "half",
        ".half.png": "half",
        "unet/diffusion_pytorch_model.bin": "a pickle",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n\0" + bytes(range(256)))
    return folder


def as_published(folder: Path, repo_id: str) -> dict[str, bytes]:
    """The files of a run as the Hub should have them: byte for byte, except that the card's examples load `repo_id` and
    that its text stands between the comments of generated text."""
    files = files_of(folder, PUBLISHED)
    head, text = files["README.md"].decode().split("\n\n", 1)
    text = text.replace(USE.format("run"), USE.format(repo_id))
    assert text not in files["README.md"].decode()
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return files | {"README.md": f"{head}\n\n{BEGIN.format(digest)}{text}{END}".encode()}


def files_of(folder: Path, names: list[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


@dataclass
class World:
    """A Hub, two trained models in local folders, and a user on another machine."""

    hub: HubServer
    token: str
    tmp: Path
    first: Path
    second: Path
    first_commit: str = ""

    def env(self, **changes: str) -> dict[str, str]:
        options = {"HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"} | changes
        return hub_environment(self.hub, self.tmp / "home", **options)

    def load(self, out: str, steps: list[str], **env: str) -> "Outcomes":
        folder = self.tmp / out
        folder.mkdir()
        run_client(self.env(FIRST_COMMIT=self.first_commit, **env), "load", str(folder), *steps)
        return Outcomes(folder)


@dataclass
class Outcomes:
    folder: Path

    def images(self, step: str) -> np.ndarray:
        assert not (self.folder / f"{step}.txt").exists(), self.error(step)
        return np.load(self.folder / f"{step}.npy")

    def error(self, step: str) -> str:
        return (self.folder / f"{step}.txt").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("world")
    with HubServer() as hub:
        token = hub.add_user("user")
        yield World(hub, token, tmp, make_run(tmp / "first", seed=1), make_run(tmp / "second", seed=2))


def assert_same(images: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(images, expected, rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------ publishing


@pytest.fixture(scope="module")
def published(world) -> World:
    """`world` with the first model published as user/name, by the script."""
    command = [sys.executable, PUBLISH, "--model", str(world.first), "--repo_id", "user/name"]
    done = subprocess.run(command, env=world.env(), capture_output=True, text=True, cwd=world.tmp, timeout=120)
    assert done.returncode == 0, done.stderr
    head = world.hub.repo("user/name").at("main").oid
    assert f"Published: {world.hub.endpoint}/user/name/commit/{head}" in done.stdout
    world.first_commit = head
    return world


# Name of the case -> folder, repository and options.
CASES = """
again: first user/name
private: first user/secret --private
private, but exists: first user/name --private
branch: second user/branched --revision step-20
pull request: second user/reviewed --create_pr
over another model: first user/stale
no namespace: first mine
no folder: nowhere user/unmade
no model: home user/unmade
bad name: first user/two/three
foreign: first other/name
no token: first user/unmade
bad token: first user/unmade
upload refused: third user/refused
busy: first user/busy
cut: first user/cut
offline: first user/unmade
"""
CASES = {name: words.split() for name, words in (line.split(": ") for line in CASES.strip().splitlines())}
CASE_ENV = {
    "no token": {"HF_TOKEN": ""},
    "bad token": {"HF_TOKEN": "hf_" + "0" * 34},
}


@pytest.fixture(scope="module")
def cases(published) -> dict[str, dict]:
    """Status and output of the script for each of `CASES`."""
    world = published
    third = make_run(world.tmp / "third", seed=3)
    (world.tmp / "home").mkdir(exist_ok=True)
    shards = {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors": b"old" for i in (1, 2)}
    world.hub.add_repo(
        "user/stale", {**shards, f"{WEIGHTS}.index.json": b"{}", "unet/config.json": b"{}", "notes/mine.md": b"kept"}
    )
    world.hub.faults += [
        Fault(f"PUT /{hashlib.sha256((third / WEIGHTS).read_bytes()).hexdigest()}", status=400),
        Fault("POST /api/models/user/busy/commit/", status=503, times=100),
        Fault("POST /api/models/user/cut/commit/", times=100),
    ]
    asked = [
        {
            "script": PUBLISH,
            "arguments": [str(world.tmp / model), "--repo_id", *rest, "--first_wait_seconds", "0.05"],
            "env": CASE_ENV.get(name, {}),
        }
        for name, (model, *rest) in CASES.items()
        if name != "offline"
    ]
    offline = [{**asked[0], "arguments": [*asked[0]["arguments"][:2], "user/unmade", "--first_wait_seconds", "0.05"]}]
    results = run_client(world.env(), "scripts", requests=asked)
    results += run_client(world.env(HF_ENDPOINT="http://127.0.0.1:9"), "scripts", requests=offline)
    return dict(zip(CASES, results))


def test_publishing_is_one_commit_of_the_files_byte_for_byte(published):
    repo = published.hub.repo("user/name")
    made, initial = repo.history(published.first_commit)
    assert initial.title == "initial commit"
    assert repo.contents(made.oid) == as_published(published.first, "user/name")
    assert made.files[WEIGHTS].is_lfs
    assert not repo.private


def test_published_files_name_classes_of_diffusers_only(published):
    contents = published.hub.repo("user/name").contents(published.first_commit)
    configs = [json.loads(data) for name, data in contents.items() if name in PIPELINE and name.endswith(".json")]
    assert sorted(config["_class_name"] for config in configs) == ["DDPMPipeline", "DDPMScheduler", "UNet2DModel"]
    assert not any(b"Custom" in contents[name] for name in PIPELINE)


def test_publishing_twice_makes_one_commit(published, cases):
    assert cases["again"]["status"] == 0
    assert f"/commit/{published.first_commit}" in cases["again"]["output"]
    titles = [commit.title for commit in published.hub.repo("user/name").history()]
    assert titles.count("Publish a model trained with ddpm_hf") == 1


def test_private_creates_a_private_repository(published, cases):
    assert cases["private"]["status"] == 0
    assert published.hub.repo("user/secret").private
    assert published.hub.repo("user/secret").contents() == as_published(published.first, "user/secret")


def test_revision_creates_a_branch_and_leaves_main_unchanged(published, cases):
    assert cases["branch"]["status"] == 0, cases["branch"]["output"]
    repo = published.hub.repo("user/branched")
    assert repo.contents("step-20") == as_published(published.second, "user/branched")
    assert repo.contents("main") == {}


def test_create_pr_leaves_main_unchanged(published, cases):
    assert cases["pull request"]["status"] == 0, cases["pull request"]["output"]
    assert "/user/reviewed/discussions/1" in cases["pull request"]["output"]
    repo = published.hub.repo("user/reviewed")
    assert repo.contents("refs/pr/1") == as_published(published.second, "user/reviewed")
    assert repo.contents("main") == {}


def test_publishing_deletes_weights_of_an_earlier_model(published, cases):
    assert cases["over another model"]["status"] == 0, cases["over another model"]["output"]
    expected = {**as_published(published.first, "user/stale"), "notes/mine.md": b"kept"}
    assert published.hub.repo("user/stale").contents() == expected


def test_a_repo_id_without_namespace_is_the_users_own(published, cases):
    assert cases["no namespace"]["status"] == 0
    assert published.hub.repo("user/mine").contents() == as_published(published.first, "user/mine")


@pytest.mark.parametrize(
    "case, words",
    {
        "private, but exists": ["user/name", "public"],
        "no folder": ["nowhere"],
        "no model": ["home", "model_index.json"],
        "bad name": ["user/two/three"],
        "foreign": ["other", "no write access"],
        "no token": ["not logged in", "hf auth login", "HF_TOKEN"],
        "bad token": ["does not accept this token", "hf auth login", "HF_TOKEN"],
        "upload refused": [WEIGHTS, "400"],
        "busy": ["user/busy", "503"],
        "cut": ["cannot be reached, or closed the connection"],
        "offline": ["127.0.0.1:9", "cannot be reached"],
    }.items(),
)
def test_publish_errors_are_one_sentence_with_the_reason(published, cases, case, words):
    (line,) = [line for line in cases[case]["output"].splitlines() if not line.startswith("Warning")]
    assert cases[case]["status"] == 1
    assert line.startswith("publish.py: error: ")
    assert [word for word in words if word not in line] == []


def test_a_failed_upload_leaves_no_files(published, cases):
    assert ("models", "user/unmade") not in published.hub.repos
    for name in ("user/refused", "user/busy", "user/cut"):
        assert published.hub.repo(name).contents() == {}


def test_the_token_is_neither_printed_nor_sent_in_bodies(published, cases):
    tokens = [published.token, CASE_ENV["bad token"]["HF_TOKEN"]]
    assert not any(token in case["output"] for token in tokens for case in cases.values())
    assert not any(token.encode() in request.body for token in tokens for request in published.hub.requests)
    storage = [r for r in published.hub.requests if "signature" in r.query]
    assert storage
    assert all(request.token is None for request in storage)


# ------------------------------------------------------------------ loading


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def online(published, cases) -> Outcomes:
    """All steps of `LOAD` with an empty cache. user/name has the first model as v1 and the second on main, so `cases` must
    have ended."""
    world, hub = published, published.hub
    repo = hub.repo("user/name")
    repo.name(repo.tags, "v1", world.first_commit)
    repo.add({WEIGHTS: (world.second / WEIGHTS).read_bytes()})

    configs = files_of(world.first, ["model_index.json"]) | {
        "config.json": (world.first / "unet/config.json").read_bytes(),
        "scheduler_config.json": (world.first / "scheduler/scheduler_config.json").read_bytes(),
        "README.md": b"# Flat\n",
    }
    weights = load_file(world.first / WEIGHTS)
    legacy = {}
    for name, tensor in weights.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        legacy[name] = tensor
    assert set(legacy) != set(weights)
    torch.save(legacy, world.tmp / "legacy.bin")
    hub.add_repo("google/ddpm-flat", {**configs, "diffusion_pytorch_model.safetensors": save(weights)})
    hub.add_repo(
        "google/ddpm-pickle",
        {**configs, "diffusion_pytorch_model.bin": (world.tmp / "legacy.bin").read_bytes()},
    )
    code = pickle.dumps(Touch(str(world.tmp / "touched")), protocol=2)
    hub.add_repo("other/code", {**configs, "diffusion_pytorch_model.bin": code})
    hub.add_repo("other/text", {"README.md": b"# No model\n"})
    hub.add_repo("user/private", files_of(world.first, PIPELINE), private=True)
    hub.add_repo("other/gated", files_of(world.first, PIPELINE)).gated = True
    hub.add_repo("other/uncached", files_of(world.first, PIPELINE))
    return world.load("online", [step for step in LOAD if not step.startswith("trained")])


@pytest.fixture(scope="module")
def reference(published) -> list[np.ndarray]:
    """The images of both models, loaded from their local folders."""
    return [sample(DDPMPipelineCustom.from_pretrained(folder)) for folder in (published.first, published.second)]


def test_a_loaded_model_gives_the_images_of_the_published_folder(online, reference):
    assert_same(online.images("own"), reference[1])


@pytest.mark.parametrize("step", ["tag", "commit"])
def test_revision_loads_the_model_of_a_tag_or_commit(online, reference, step):
    assert_same(online.images(step), reference[0])
    assert np.abs(reference[0] - reference[1]).max() > 0.05


def test_diffusers_alone_gives_the_same_images(online, reference):
    assert_same(online.images("stock"), reference[1])


def test_a_flat_repository_loads(online, reference):
    assert_same(online.images("flat"), reference[0])


def test_pickled_weights_of_2020_load_from_a_flat_repository(online, reference):
    assert_same(online.images("pickle"), reference[0])


def test_pickled_weights_run_no_code(online, published):
    assert "diffusion_pytorch_model.bin" in online.error("code")
    touched = published.tmp / "touched"
    assert not touched.exists()
    pickle.loads(published.hub.repo("other/code").contents()["diffusion_pytorch_model.bin"]).close()
    assert touched.exists()  # the pickle does work


def test_use_safetensors_refuses_pickled_weights(online):
    assert "safetensors" in online.error("safetensors only")


def test_a_private_repository_loads_with_a_token_only(online, reference):
    assert_same(online.images("private"), reference[0])
    assert "user/private" in online.error("private, no token")
    assert "hf auth login" in online.error("private, no token")


def test_push_to_hub_publishes_a_pipeline_that_diffusers_loads(online, reference, published):
    assert_same(online.images("pushed"), reference[1])
    contents = published.hub.repo("user/name2").contents()
    assert sorted(contents) == sorted([*PIPELINE, "README.md"])
    assert json.loads(contents["model_index.json"])["_class_name"] == "DDPMPipeline"
    assert json.loads(contents["unet/config.json"])["_class_name"] == "UNet2DModel"
    assert not any(b"Custom" in contents[name] for name in PIPELINE)


@pytest.mark.parametrize(
    "step, words",
    {
        "missing": ["FileNotFoundError", "user/nothing", "hf auth login", "no folder"],
        "no revision": ["FileNotFoundError", "user/name", "branch, tag or commit"],
        "gated": ["PermissionError", "other/gated", "terms"],
        "no network": ["ConnectionError", "other/uncached", "127.0.0.1:9", "try again later"],
        "bad token": ["PermissionError", "other/uncached", "hf auth login"],
        "no pipeline": ["other/text", "no pipeline"],
    }.items(),
)
def test_loading_errors_name_the_repository_and_the_remedy(online, step, words):
    error = online.error(step)
    assert [word for word in words if word not in error] == []
    message, *notes = error.splitlines()  # the error is a single line
    assert all("looked for on the Hub" in note for note in notes if note)


@pytest.fixture(scope="module")
def offline(online, published, tmp_path_factory) -> Outcomes:
    """Loading again with HF_HUB_OFFLINE and the Hub stopped. Must come last."""
    published.hub.__exit__()
    return published.load("offline", ["own", "tag", "flat", "pickle", "missing"], HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("step, model", [("own", 1), ("tag", 0), ("flat", 0), ("pickle", 0)])
def test_a_cached_model_loads_offline(offline, reference, step, model):
    assert_same(offline.images(step), reference[model])


def test_offline_errors_name_an_uncached_repository(offline):
    assert "user/nothing" in offline.error("missing")
