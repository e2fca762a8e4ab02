"""Checkpoints are whole or absent, and a damaged one is rejected with the name of the damaged file."""

import errno
import hashlib
import json
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from ddpm_hf.files import atomic_file, lock_folder
from ddpm_hf.training.checkpoints import (
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from tests.training.helpers import write_sums


@pytest.fixture
def saved(tmp_path):
    tensors = {"model": {"weight": torch.randn(3, 4)}, "ema": {"weight": torch.randn(3, 4)}}
    return save_checkpoint(tmp_path, 12, tensors, {"config": {"seed": 1}}), tensors


def test_a_saved_checkpoint_loads_unchanged(saved):
    folder, tensors = saved
    loaded, state = load_checkpoint(folder)
    assert state["step"] == 12 and state["config"] == {"seed": 1}
    assert all(torch.equal(loaded[name]["weight"], group["weight"]) for name, group in tensors.items())


def test_a_checkpoint_holds_no_pickle(saved):
    assert {file.suffix or file.name for file in saved[0].iterdir()} == {".safetensors", ".json", "SHA256SUMS"}


def test_checksums_are_those_of_sha256sum_and_cover_all_other_files(saved):
    folder, _ = saved
    lines = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert lines == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name != "SHA256SUMS"
    }


def test_a_checkpoint_records_the_package_versions(saved):
    versions = load_checkpoint(saved[0])[1]["versions"]
    assert (
        versions["torch"] == torch.__version__ and {"ddpm_hf", "diffusers", "accelerate", "python"} <= versions.keys()
    )


def test_a_failed_save_leaves_earlier_checkpoints_and_no_files(saved, tmp_path):
    with resource_limit(resource.RLIMIT_FSIZE, 100_000):
        with pytest.raises(OSError) as failure:
            save_checkpoint(tmp_path, 13, {"model": {"weight": torch.zeros(100_000)}}, {})
        assert failure.value.errno == errno.EFBIG  # with its number: training makes room on a full disk only
        with pytest.raises(OSError):
            atomic_file(tmp_path / "samples.png", bytes(200_000))
    assert list(tmp_path.iterdir()) == [saved[0]]
    load_checkpoint(saved[0])


@contextmanager
def resource_limit(kind, value):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.parametrize("damage", ["flip a byte", "cut short", "lose a file", "garble the state", "lose the state"])
def test_a_damaged_checkpoint_is_rejected_by_name(saved, damage):
    folder, _ = saved
    file = folder / ("state.json" if "state" in damage else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip a byte":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut short":
        file.write_bytes(content[:-5])
    elif damage == "garble the state":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"{folder.name} is damaged: .*{file.name}"):
        load_checkpoint(folder)


def test_an_unfinished_checkpoint_is_not_listed_and_is_deleted(saved, tmp_path):
    (tmp_path / ".checkpoint-00000020.unfinished").mkdir()
    assert list_checkpoints(tmp_path) == [saved[0]]
    prune_checkpoints(tmp_path, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [saved[0].name]


def test_pruning_keeps_the_newest_checkpoints(tmp_path):
    for step in (5, 10, 100, 20):
        save_checkpoint(tmp_path, step, {}, {})
    prune_checkpoints(tmp_path, keep=2)
    assert [json.loads((f / "state.json").read_text())["step"] for f in list_checkpoints(tmp_path)] == [20, 100]


def test_pruning_unlinks_a_linked_checkpoint_and_keeps_its_target(tmp_path):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    saved = save_checkpoint(elsewhere, 5, {}, {})
    newest = save_checkpoint(root, 10, {}, {})
    (root / saved.name).symlink_to(saved)
    assert list_checkpoints(root) == [root / saved.name, newest]
    prune_checkpoints(root, keep=1)
    assert list(root.iterdir()) == [newest] and load_checkpoint(saved)[1]["step"] == 5


def test_saving_a_linked_step_again_leaves_the_target_of_the_link(tmp_path):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    saved = save_checkpoint(elsewhere, 5, {}, {"of": "another run"})
    root.mkdir()
    (root / saved.name).symlink_to(saved)
    again = save_checkpoint(root, 5, {}, {})
    assert not again.is_symlink() and load_checkpoint(saved)[1]["of"] == "another run"


def test_checkpoints_on_another_disk_are_saved_and_pruned_there(tmp_path, other_disk):
    (tmp_path / "checkpoints").symlink_to(other_disk)
    for step in (5, 5, 10, 15):
        save_checkpoint(tmp_path / "checkpoints", step, {"model": {"weight": torch.ones(2)}}, {})
    prune_checkpoints(tmp_path / "checkpoints", keep=1)
    assert [path.name for path in other_disk.iterdir()] == ["checkpoint-00000015"]
    assert (tmp_path / "checkpoints").is_symlink()


def test_only_folders_named_by_a_step_count_as_checkpoints(tmp_path):
    for step in (5, 10, 10**9):
        save_checkpoint(tmp_path, step, {}, {})
    for name in ("checkpoint-best", "checkpoint-00000010 (copy)", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-00000007").touch()
    assert [checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == [5, 10, 10**9]
    # That of step 10⁹ is not one that this run resumes from: it must not push out those that it saves.
    prune_checkpoints(tmp_path, keep=1, last_step=10)
    assert [checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == [10, 10**9]
    assert (tmp_path / "checkpoint-best").is_dir()


def test_what_cannot_be_deleted_does_not_keep_others_from_being_pruned(tmp_path, mount):
    root = tmp_path / "checkpoints"
    root.mkdir()
    mount("checkpoints/checkpoint-00000005")  # cannot be deleted while it is mounted
    for step in (10, 15):
        save_checkpoint(root, step, {}, {})
    with pytest.raises(OSError, match="checkpoint-00000005"):
        prune_checkpoints(root, keep=1)
    assert [checkpoint_step(folder) for folder in list_checkpoints(root)] == [5, 15]


@pytest.mark.parametrize("content", ["[1, 2]", "null", "{", "", "\xff"])
def test_a_state_that_is_no_state_is_rejected_despite_its_checksum(saved, content):
    folder, _ = saved
    (folder / "state.json").write_bytes(content.encode("latin-1"))
    write_sums(folder)
    with pytest.raises(ValueError, match=f"{folder.name} is damaged: state.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"<html>", bytes(100), b"\xff" * 8 + b"{}"])
def test_weights_that_are_no_safetensors_are_rejected_despite_checksums(saved, content):
    folder, _ = saved
    (folder / "ema.safetensors").write_bytes(content)
    write_sums(folder)
    with pytest.raises(ValueError, match=f"{folder.name} is damaged: ema.safetensors cannot be read"):
        load_checkpoint(folder)


def test_saving_a_step_again_replaces_it(saved, tmp_path):
    save_checkpoint(tmp_path, 12, {"model": {"weight": torch.zeros(2)}}, {})
    tensors, _ = load_checkpoint(saved[0])
    assert tensors.keys() == {"model"} and torch.equal(tensors["model"]["weight"], torch.zeros(2))


@pytest.mark.parametrize("fused", [False, True])
def test_a_loaded_optimizer_continues_bit_identically(fused):
    """With channels-last weights, from tensors saved in contiguous format."""
    torch.manual_seed(0)
    inputs = torch.randn(6, 4, 2, 5, 5)

    def model_and_optimizer():
        torch.manual_seed(1)
        model = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)

    def steps(model, optimizer, batches):
        for batch in batches:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, optimizer = model_and_optimizer()
    steps(straight, optimizer, inputs)

    model, optimizer = model_and_optimizer()
    steps(model, optimizer, inputs[:3])
    weights = {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    moments = {
        k: v.clone(memory_format=torch.contiguous_format) for k, v in optimizer_tensors(optimizer, model).items()
    }
    resumed, optimizer = model_and_optimizer()
    resumed.load_state_dict(weights)
    load_optimizer_tensors(optimizer, resumed, moments)
    steps(resumed, optimizer, inputs[3:])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "card.md"
    atomic_file(file, "one")
    atomic_file(file, b"two")
    assert file.read_text() == "two" and list(tmp_path.iterdir()) == [file]


HOLD = """
import sys, time
from pathlib import Path
from ddpm_hf.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_run_s_until_that_run_ends_or_is_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another run is writing to"), lock_folder(tmp_path, wait_seconds=0.3):
        pass
    other.kill()
    other.wait()
    for _ in range(2):
        with lock_folder(tmp_path, wait_seconds=5):
            pass


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "/tmp/x", 5])
def test_a_name_that_leads_out_of_the_checkpoint_is_refused(tmp_path, name):
    root = tmp_path / "checkpoints"
    with pytest.raises(ValueError, match="the names of tensors must be words"):
        save_checkpoint(root, 1, {name: {"w": torch.zeros(1)}}, {})
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("step", ["../x", -1, 1.0, None])
def test_a_step_that_is_no_number_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match="step must be an integer of at least 0"):
        save_checkpoint(tmp_path, step, {}, {})
    assert list(tmp_path.rglob("*")) == []
