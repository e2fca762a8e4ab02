"""Uploads and downloads with network faults: every fault at every endpoint, over both transports, with the real client.

Nothing is lost and nothing is uploaded twice.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from ddpm_hf import UNet2DModelCustom
from tests.hub import Fault, HubServer, hub_environment, run_client

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
README = "---\nlicense: mit\n---\n\n# By hand\n"

ERRORS = {
    "503": {"status": 503, "times": 2},
    "429": {"status": 429, "retry_after_seconds": 1},
    "cut": {"times": 2},
    "slow": {"delay_seconds": 0.3},
}
LOST = {"lost response": {"after_acting": True}}
UPLOAD = {"cut in mid-upload": {"mid_upload": True}}
DOWNLOAD = {"cut in mid-download": {"mid_download": True}}
FLIP = {"flipped bit": {"flips": True}}

# Endpoint -> pattern of its requests (with {user} and {sha256} of the case), and the faults they can have.
PUBLISH = {
    "create": ("POST /api/repos/create {user}$", ERRORS | LOST),
    "whoami": ("GET /api/whoami-v2 {user}$", ERRORS),
    "info": ("GET /api/models/{user}/m {user}$", ERRORS | DOWNLOAD),
    "refs": ("GET /api/models/{user}/m/refs ", ERRORS),
    "old card, metadata": ("HEAD /{user}/m/resolve/.*README", ERRORS),
    "old card": ("GET /{user}/m/resolve/.*README", ERRORS | DOWNLOAD | FLIP),
    "card check": ("POST /api/validate-yaml {user}$", ERRORS),
    "upload mode": ("POST .*/{user}/m/preupload/", ERRORS | UPLOAD),
    "commit": ("POST .*/{user}/m/commit/", ERRORS | LOST | UPLOAD),
    "read back": ("POST .*/{user}/m/paths-info/[0-9a-f]+ {user}$", ERRORS | DOWNLOAD),
    "tag": ("POST .*/{user}/m/tag/", ERRORS | LOST),
}
PUBLISH_LFS = {
    "LFS batch": ("POST /{user}/m.git/info/lfs/objects/batch", ERRORS | UPLOAD),
    "LFS upload": ("PUT /{sha256}", ERRORS | LOST | UPLOAD),
    "LFS verify": ("POST /{user}/m.git/info/lfs/objects/verify", ERRORS | LOST),
    "commit": PUBLISH["commit"],
}
PUBLISH_XET = {
    "Xet token": ("GET .*/{user}/m/xet-write-token/", ERRORS),
    "Xet xorb": ("POST /models/{user}/m/v1/xorbs/", ERRORS | LOST | UPLOAD),
    "Xet shard": ("POST /models/{user}/m/v2/shards", ERRORS | LOST | UPLOAD),
}
LOAD = {
    "info": ("GET /api/models/{user}/m/revision/", ERRORS | DOWNLOAD),
    "tree": ("GET /api/models/{user}/m/tree/", ERRORS | DOWNLOAD),
    "metadata": ("HEAD /{user}/m/resolve/.*model_index.json", ERRORS),
    "file": ("GET /{user}/m/resolve/.*model_index.json", ERRORS | DOWNLOAD | FLIP),
}
LOAD_LFS = {"LFS file": ("GET /{sha256}", ERRORS | DOWNLOAD | FLIP)}
LOAD_XET = {
    "Xet token": ("GET .*/{user}/m/xet-read-token/", ERRORS),
    "Xet reconstruction": ("GET .*/{user}/m/v1/reconstructions/", ERRORS | DOWNLOAD),
    "Xet xorb": ("GET /models/{user}/m/xorbs/", ERRORS | DOWNLOAD | FLIP),
}


def cases(*tables: dict) -> list[tuple[str, str]]:
    return [(endpoint, fault) for table in tables for endpoint, (_, faults) in table.items() for fault in faults]


NETWORK = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
with torch.device("meta"):
    SHAPES = {name: tensor.shape for name, tensor in UNet2DModelCustom.from_config(NETWORK).state_dict().items()}


def make_pipeline(folder: Path, seed: int) -> dict[str, bytes]:
    """Write the files of a saved pipeline that publishing reads, with weights of its own; the files by name."""
    random = np.random.default_rng(seed)
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    files = {
        "model_index.json": json.dumps({"_class_name": "DDPMPipeline", **index}).encode(),
        "scheduler/scheduler_config.json": b'{"_class_name": "DDPMScheduler"}',
        "unet/config.json": json.dumps(NETWORK | {"seed": seed}).encode(),
        WEIGHTS: save(weights),
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


class Bench:
    """A Hub on which each case has its own user, model and fault, so that all can run at once. `options` are environment
    variables of the client."""

    def __init__(self, hub: HubServer, tmp: Path, table: dict, transport: str, **options: str):
        self.options = options
        self.hub, self.tmp, self.transport = hub, tmp, transport
        self.outcomes, self.files, self.asked = {}, {}, []
        self.cases = cases(table)
        for i, (endpoint, fault) in enumerate(self.cases):
            user = f"u{i}"
            self.files[endpoint, fault] = make_pipeline(tmp / user, seed=i)
            self.prepare(user, endpoint, fault)
            sha256 = hashlib.sha256(self.files[endpoint, fault][WEIGHTS]).hexdigest()
            pattern, faults = table[endpoint]
            hub.faults.append(Fault(pattern.format(user=user, sha256=sha256), **faults[fault]))

    def prepare(self, user: str, endpoint: str, fault: str) -> None:
        token = self.hub.add_user(user)
        if endpoint.startswith("old card"):
            self.hub.add_repo(f"{user}/m", {"README.md": README.encode()})
            (self.tmp / user / "README.md").write_text("---\ntags:\n- ddpm\n---\n\n# By a program\n")
        asked = {"call": "publish", "repo_id": f"{user}/m", "folder": str(self.tmp / user), "tag": "v1", "token": token}
        self.asked.append(asked)

    def run(self) -> "Bench":
        self.outcomes = dict(zip(self.cases, calls(self.hub, self.tmp, self.transport, self.asked, **self.options)))
        assert [fault for fault in self.hub.faults if not fault.occurred] == []
        return self


class LoadBench(Bench):
    def prepare(self, user: str, endpoint: str, fault: str) -> None:
        token = self.hub.add_user(user)
        if self.transport == "lfs":
            self.hub.add_repo(f"{user}/m", self.files[endpoint, fault])
        self.asked.append({"call": "load", "repo_id": f"{user}/m", "token": token})

    def upload(self) -> None:
        """Upload all models over Xet: only a client can make xorbs."""
        faults, self.hub.faults = self.hub.faults, []
        folders = [str(self.tmp / asked["repo_id"].split("/")[0]) for asked in self.asked]
        uploads = [asked | {"call": "publish", "folder": folder} for asked, folder in zip(self.asked, folders)]
        assert not [done for done in calls(self.hub, self.tmp, "xet", uploads) if "error" in done]
        self.hub.faults = faults
        self.hub.requests.clear()


def calls(hub: HubServer, tmp: Path, transport: str, asked: list[dict], **options: str) -> list[dict]:
    """Make calls concurrently, in a new process with an empty cache."""
    if transport == "lfs":
        options["HF_HUB_DISABLE_XET"] = "1"
    env = hub_environment(hub, tmp / f"home{len(list(tmp.glob('home*')))}", **options)
    return run_client(env, "calls", requests=asked)


TABLES = {
    "publish, lfs": PUBLISH | PUBLISH_LFS,
    "publish, xet": PUBLISH_XET | {"commit": PUBLISH["commit"]},
    "load, lfs": LOAD | LOAD_LFS,
    "load, xet": LOAD_XET,
}


@pytest.fixture(scope="module", params=["lfs", "xet"])
def published(request, tmp_path_factory):
    with HubServer() as hub:
        table = TABLES[f"publish, {request.param}"]
        yield Bench(hub, tmp_path_factory.mktemp("publish"), table, request.param).run()


def test_a_transient_fault_leaves_one_complete_upload(published):
    wrong = {}
    for i, case in enumerate(published.cases):
        outcome, repo = published.outcomes[case], published.hub.repo(f"u{i}/m")
        files = {name: data for name, data in repo.contents().items() if name != "README.md"}
        titles = [commit.title for commit in repo.history()]
        head = repo.at().oid
        if (
            outcome.get("commit") != head
            or files != published.files[case]
            or titles.count("Publish a model trained with ddpm_hf") != 1
            or repo.tags != {"v1": head}
            or case[0].startswith("old card") != (b"# By hand" in repo.contents()["README.md"])
        ):
            wrong[case] = outcome, titles, sorted(files), repo.tags
    assert wrong == {}


def test_weights_use_the_transport_under_test(published):
    asked = [request.path for request in published.hub.requests]
    assert any("/v1/xorbs/" in path for path in asked) == (published.transport == "xet")
    assert any("/info/lfs/" in path for path in asked) == (published.transport == "lfs")


@pytest.fixture(scope="module", params=["lfs", "xet"])
def loaded(request, tmp_path_factory):
    with HubServer() as hub:
        bench = LoadBench(hub, tmp_path_factory.mktemp("load"), TABLES[f"load, {request.param}"], request.param)
        if request.param == "xet":
            bench.upload()
        yield bench.run()


def test_a_transient_fault_leaves_every_download_intact(loaded):
    wrong = {}
    for case in loaded.cases:
        outcome, files = loaded.outcomes[case], loaded.files[case]
        folder = Path(outcome.get("folder", "/nowhere"))
        if {name for name in files if (folder / name).is_file() and (folder / name).read_bytes() == files[name]} != {
            *files
        }:
            wrong[case] = outcome
    assert wrong == {}
    assert any("/xorbs/" in request.path for request in loaded.hub.requests) == (loaded.transport == "xet")


def test_a_file_damaged_twice_is_named_and_not_kept(tmp_path):
    with HubServer() as hub:
        files = make_pipeline(tmp_path / "model", seed=1)
        token = hub.add_user("user")
        hub.add_repo("user/m", files)
        hub.faults.append(Fault(f"GET /{hashlib.sha256(files[WEIGHTS]).hexdigest()}", flips=True, times=100))
        asked = {"call": "load", "repo_id": "user/m", "token": token, "cache_dir": str(tmp_path / "cache")}
        (outcome,) = calls(hub, tmp_path, "lfs", [asked])
    assert WEIGHTS in outcome["error"] and "damaged in two downloads" in outcome["error"]
    contents = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert files["model_index.json"] in contents
    assert not any(len(content) == len(files[WEIGHTS]) for content in contents)


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Outcomes of loading from copies of a cache, by copy: first with the Hub, then with none, and what the Hub was asked.

    "plain" copies have no links, as on Windows, and are made by `cp -rL`.
    """
    tmp = tmp_path_factory.mktemp("copies")
    files = make_pipeline(tmp / "model", seed=1)
    with HubServer() as hub:
        common = {"call": "load", "repo_id": "user/m", "token": hub.add_user("user")}
        commit = hub.add_repo("user/m", files).at().oid
        assert "folder" in calls(hub, tmp, "lfs", [{**common, "cache_dir": str(tmp / "linked")}])[0]
        for name in ("plain", "plain, damaged", "plain, foreign file", "plain, gone", "plain, partly gone"):
            shutil.copytree(tmp / "linked", tmp / name, symlinks=False)
        shutil.copytree(tmp / "linked", tmp / "linked, damaged", symlinks=True)
        snapshot = Path("models--user--m/snapshots") / commit
        damage(tmp / "plain, damaged" / snapshot / WEIGHTS)
        (tmp / "plain, foreign file" / snapshot / "unet/other.safetensors").write_bytes(b"other")
        damage((tmp / "linked, damaged" / snapshot / WEIGHTS).resolve())
        online = ["plain", "plain, damaged", "plain, foreign file"]
        hub.requests.clear()
        outcomes = calls(hub, tmp, "lfs", [{**common, "cache_dir": str(tmp / name)} for name in online])
        found = {f"online, {name}": outcome for name, outcome in zip(online, outcomes)}
        asked = [request.path for request in hub.requests]
        # The Hub is gone as soon as the files, or some of them, are downloaded: nothing tells whether they are intact.
        (tmp / "plain, partly gone" / snapshot / WEIGHTS).unlink()
        hub.faults.append(Fault("POST .*/paths-info/", status=503, times=100))
        gone = ["empty", "plain, gone", "plain, partly gone"]
        loads = [{**common, "cache_dir": str(tmp / name)} for name in gone]
        outcomes = calls(hub, tmp, "lfs", loads, HF_HUB_DISABLE_SYMLINKS="1")
        found |= {name: outcome for name, outcome in zip(gone, outcomes)}
    stopped = {"plain": {}, "plain, by commit": {"revision": commit}, "linked": {}, "linked, damaged": {}}
    loads = [{**common, "cache_dir": str(tmp / name.split(", by")[0]), **more} for name, more in stopped.items()]
    return found | dict(zip(stopped, calls(hub, tmp, "lfs", loads))), asked, files


@pytest.mark.parametrize(
    "name", ["online, plain", "online, plain, damaged", "plain, gone", "plain", "plain, by commit"]
)
def test_cache_without_links_loads_with_and_without_a_network(copies, name):
    outcomes, _, files = copies
    folder = Path(outcomes[name].get("folder", str(outcomes[name])))
    assert {file: (folder / file).read_bytes() for file in files} == files
    links = [path.name for path in folder.rglob("*") if path.is_symlink()]
    assert links == ([Path(WEIGHTS).name] if "damaged" in name else [])  # downloaded again, where links are possible


def test_checksums_that_a_cache_does_not_know_are_one_request(copies):
    outcomes, asked, _ = copies
    assert sum("/paths-info/" in path for path in asked) == 3 and len(outcomes) == 10


@pytest.mark.parametrize("name", ["empty", "plain, partly gone"])
def test_download_whose_checksum_cannot_be_asked_is_refused(copies, name):
    assert "the Hub answered 503" in copies[0][name]["error"]


def test_damaged_file_of_a_cache_with_links_is_refused(copies):
    error = copies[0]["linked, damaged"]["error"]
    assert f"{WEIGHTS} of user/m is damaged in the cache (/" in error and "cannot be reached" in error
    assert "folder" in copies[0]["linked"]


def test_file_of_a_cache_that_the_hub_does_not_have_is_named(copies):
    error = copies[0]["online, plain, foreign file"]["error"]
    assert "unet/other.safetensors in the cache is not a file of user/m: delete /" in error


def test_concurrent_uploads_with_lost_responses_lose_no_commit(tmp_path):
    with HubServer() as hub:
        token = hub.add_user("user")
        folders = [str(tmp_path / f"model{i}") for i in range(3)]
        files = [make_pipeline(Path(folder), seed=i) for i, folder in enumerate(folders)]
        hub.faults += [Fault("POST .*/user/m/commit/", after_acting=True, times=2)]
        asked = [{"call": "publish", "repo_id": "user/m", "folder": folder, "token": token} for folder in folders]
        pull = [{**asked[0], "repo_id": "user/pulled", "create_pr": True}]
        hub.faults += [Fault("POST .*/user/pulled/commit/", after_acting=True)]
        outcomes = calls(hub, tmp_path, "lfs", asked + pull)
        repo = hub.repo("user/m")
        history = [commit.oid for commit in repo.history()]
        assert sorted(outcome["commit"] for outcome in outcomes[:3]) == sorted(history[:-1]) and len(history) == 4
        for outcome, own in zip(outcomes, files):
            assert own.items() <= repo.contents(outcome["commit"]).items()
        assert list(hub.repo("user/pulled").pull_requests) == ["refs/pr/1"]
        assert outcomes[3]["url"].endswith("/user/pulled/discussions/1")


def test_a_persistent_fault_is_one_sentence_and_leaves_no_files(tmp_path):
    faults = {
        "503": {"status": 503},
        "429": {"status": 429},
        "cut": {},
        "long wait": {"status": 429, "retry_after_seconds": 999},
    }
    with HubServer() as hub:
        asked = []
        for i, fault in enumerate(faults.values()):
            make_pipeline(tmp_path / f"f{i}", seed=i)
            hub.faults.append(Fault(f"POST .*/f{i}/m/commit/", times=100, **fault))
            token = hub.add_user(f"f{i}")
            asked.append({"call": "publish", "repo_id": f"f{i}/m", "folder": str(tmp_path / f"f{i}"), "token": token})
        outcomes = calls(hub, tmp_path, "xet", asked)
        for i, (outcome, word) in enumerate(zip(outcomes, ("503", "429", "closed the connection", "429"))):
            assert word in outcome["error"] and "\n" not in outcome["error"]
            assert hub.repo(f"f{i}/m").contents() == {}
        tries = [sum(f"/f{i}/m/commit/" in r.path for r in hub.requests) for i in range(4)]
        assert tries == [5, 5, 5, 1]


def test_a_request_without_an_answer_is_retried(tmp_path):
    with HubServer() as hub:
        hub.faults += [Fault("GET /api/models/user/m user", delay_seconds=3), Fault("POST .*/commit/", delay_seconds=3)]
        asked = {"call": "publish", "repo_id": "user/m", "folder": str(tmp_path / "m"), "token": hub.add_user("user")}
        make_pipeline(tmp_path / "m", seed=0)
        (outcome,) = calls(hub, tmp_path, "lfs", [asked], HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert outcome.get("commit") == hub.repo("user/m").at().oid, outcome
        assert sum("/commit/" in request.path for request in hub.requests) == 2
