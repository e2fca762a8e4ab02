"""No published byte names a folder of this machine."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from ddpm_hf.hub.local_paths import is_local, public_config, public_name, without_local_paths
from ddpm_hf.hub.model_card import make_card
from ddpm_hf.hub.publish import training_state
from tests.hub.test_model_card import CONFIG, TRAINING


@pytest.mark.parametrize(
    "name, public",
    [
        ("/home/me/data/birds", "birds"),
        ("~/data/birds", "birds"),
        ("../birds", "birds"),
        ("./data/birds/", "birds"),
        ("data/mine/birds", "birds"),
        (r"C:\data\birds", "birds"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("digits", "digits"),
        ("", ""),
    ],
)
def test_public_name_is_the_last_part_of_a_path(name, public):
    assert public_name(name) == public
    assert is_local(name) == (name != public)


def test_a_data_set_beside_the_working_folder_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/birds").mkdir(parents=True)
    assert public_name("data/birds") == "birds"
    assert public_config({"dataset": "data/birds", "output_dir": ".", "seed": 0})["output_dir"] == tmp_path.name


def write_run(tmp_path: Path) -> dict[str, Path]:
    """Text files of a run on a local folder, in all of which the paths occur."""
    data, out = tmp_path / "a folder of data" / "birds", tmp_path / "out"
    data.mkdir(parents=True)
    (out / "unet").mkdir(parents=True)
    config = {"dataset": str(data), "output_dir": str(out), "hub_model_id": "user/name", "seed": 0}
    texts = {
        "config.yaml": yaml.safe_dump(config, sort_keys=False),
        "metrics.json": json.dumps({"evaluation": {"dataset": str(data), "samples": [f"{Path.home()}/x.npz"]}}),
        "README.md": f"# Mine\n\nTrained on {data}. See {out}.\n",
        "unet/config.json": json.dumps({"_name_or_path": str(out / "unet"), "sample_size": 8}),
    }
    for name, text in texts.items():
        (out / name).write_text(text)
    return {name: out / name for name in texts}


def test_published_texts_have_the_last_parts_of_paths(tmp_path):
    files = write_run(tmp_path)
    public = without_local_paths(files)
    assert public.keys() == files.keys()
    for content in public.values():
        assert not any(str(path).encode() in content for path in (tmp_path, Path.home()))
    assert yaml.safe_load(public["config.yaml"]) == {
        "dataset": "birds",
        "output_dir": "out",
        "hub_model_id": "user/name",
        "seed": 0,
    }
    assert json.loads(public["metrics.json"]) == {"evaluation": {"dataset": "birds", "samples": ["x.npz"]}}
    assert public["README.md"] == b"# Mine\n\nTrained on birds. See out.\n"


def test_texts_without_paths_stay_as_they_are(tmp_path):
    (tmp_path / "config.yaml").write_text("# mine\ndataset: digits   \n")
    (tmp_path / "README.md").write_text("Save it in /tmp/model, see https://x.org/a/b.\n")
    assert without_local_paths({file.name: file for file in tmp_path.iterdir()}) == {}


@pytest.mark.parametrize("name", ["x.png", "weights.safetensors"])
def test_a_path_that_cannot_be_replaced_is_refused(tmp_path, name):
    files = write_run(tmp_path)
    place = str(tmp_path / "out")
    if name == "x.png":
        (tmp_path / name).write_bytes(b"\x89PNG tEXt" + place.encode())
    else:
        save_file(
            load_file(Path("model_cards/digits/unet/diffusion_pytorch_model.safetensors")),
            tmp_path / name,
            {"from": place},
        )
    with pytest.raises(ValueError, match=rf"{name} must not name a folder of this machine.*{re.escape(place)}"):
        without_local_paths(files | {name: tmp_path / name})


def test_a_training_state_has_no_paths_and_keeps_its_checksums(tmp_path):
    write_run(tmp_path)
    out = tmp_path / "out"
    checkpoint = out / "checkpoints" / "checkpoint-00000001"
    checkpoint.mkdir(parents=True)
    state = json.dumps({"step": 1, "config": {"dataset": str(tmp_path / "birds"), "output_dir": str(out)}})
    (checkpoint / "state.json").write_text(state)
    (checkpoint / "SHA256SUMS").write_text(f"{hashlib.sha256(state.encode()).hexdigest()}  state.json\n")
    files = training_state(out, checkpoint)
    contents = {k: v if isinstance(v, bytes) else v.read_bytes() for k, v in files.items()}
    assert not any(str(tmp_path).encode() in content for content in contents.values())
    digest = hashlib.sha256(contents["checkpoints/checkpoint-00000001/state.json"]).hexdigest()
    assert contents["checkpoints/checkpoint-00000001/SHA256SUMS"].decode() == f"{digest}  state.json\n"


@pytest.mark.parametrize(
    "name, expected", [(None, "trained on birds with"), ("Birds of Wales", "trained on Birds of Wales with")]
)
def test_a_card_names_the_data_without_its_folder(tmp_path, name, expected):
    config = yaml.safe_load(CONFIG.to_yaml()) | {"dataset": str(tmp_path / "birds"), "dataset_name": name}
    config["output_dir"] = str(tmp_path / "out")
    card = make_card(yaml.safe_dump(config), {"training": TRAINING})
    assert expected in " ".join(str(card).split()) and str(tmp_path) not in str(card)
    assert card.data.datasets is None
