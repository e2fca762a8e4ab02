"""Checkpoints whose checksums fit are still compared with the run that resumes from them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_hf.training import resume
from ddpm_hf.training.build import build_unet
from ddpm_hf.training.checkpoint_content import check_content, layouts
from ddpm_hf.training.checkpoints import list_checkpoints, load_checkpoint
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.resume import last_checkpoint
from tests.training.helpers import assert_bit_identical, checkpoint, copied, write_sums

OPTIONS = ["--ema_snapshot_every_images", "96", "--timestep_sampler", "loss_second_moment", "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def finished(trainer, tmp_path_factory):
    """A run with every kind of file in its checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    codes, output = trainer.run(folder, *OPTIONS)
    assert codes == [0], output
    return folder


def change_tensors(change):
    def damage(folder, file):
        tensors = {name: value.clone() for name, value in load_file(folder / f"{file}.safetensors").items()}
        change(tensors, next(name for name in tensors if "conv_out.weight" in name or file == "timestep_sampler"))
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})

    return damage


def change_state(folder, change):
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))


def fill(value):
    return change_tensors(lambda tensors, name: tensors[name].fill_(value))


DAMAGES = {
    "lost file": lambda folder, file: (folder / f"{file}.safetensors").unlink(),
    "empty": change_tensors(lambda tensors, _: tensors.clear()),
    "lost tensor": change_tensors(lambda tensors, name: tensors.pop(name)),
    "extra tensor": change_tensors(lambda tensors, _: tensors.update(more=torch.zeros(2))),
    "other shape": change_tensors(lambda tensors, name: tensors.update({name: torch.zeros(2, 3)})),
    "other type": change_tensors(lambda tensors, name: tensors.update({name: tensors[name].to(torch.float16)})),
    "NaN": fill(math.nan),
}


def check(folder):
    tensors, state = load_checkpoint(folder)
    config = parse_config(["--config", str(folder.parents[1] / "config.yaml")])
    check_content(folder, tensors, state, config, build_unet(config))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model", "ema", "power_ema", "optimizer", "timestep_sampler"])
def test_other_tensors_than_the_run_writes_are_refused(finished, tmp_path, file, damage):
    if (file, damage) == ("timestep_sampler", "NaN"):
        pytest.skip("counts of timesteps are integers")
    folder = list_checkpoints(copied(finished, tmp_path / "run", 12) / "checkpoints")[-1]
    check(folder)
    DAMAGES[damage](folder, file)
    write_sums(folder)
    with pytest.raises(ValueError, match=f"{folder.name} cannot be used: {file}.safetensors "):
        check(folder)


@pytest.mark.parametrize(("entry", "value"), [("exp_avg_sq", -1.0), ("step", 13.0), ("step", -1.0)])
def test_values_that_adam_cannot_have_are_refused(finished, tmp_path, entry, value):
    folder = list_checkpoints(copied(finished, tmp_path / "run", 12) / "checkpoints")[-1]
    change_tensors(lambda tensors, _: tensors[f"conv_out.weight/{entry}"].fill_(value))(folder, "optimizer")
    write_sums(folder)
    with pytest.raises(ValueError, match=f"optimizer.safetensors holds .*conv_out.weight/{entry}"):
        check(folder)


STATES = {
    "step": [None, -1, "12", 12.0, True, 11, 10**9],
    "config": [None, [], "x"],
    "versions": [None, []],
    "data": [None, [], {"examples": 64}, {"examples": 64, "stream": {"lanes": [{}]}}, {"examples": 1, "stream": 5}],
    "records": [None, {}, {"seconds": 1.0, "steps": 0, "sums": [1, 2]}, {"seconds": "x", "steps": 0, "sums": [0] * 11}],
    "images_at_a_time": [None, "16"],
    "nonfinite_steps": [None, -1],
    "nonfinite_steps_in_a_row": [None, {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in STATES.items() for value in values])
def test_a_state_that_a_run_does_not_write_is_refused_by_entry(finished, tmp_path, name, value):
    folder = list_checkpoints(copied(finished, tmp_path / "run", 12) / "checkpoints")[-1]
    change_state(folder, lambda state: state.pop(name) if value is None else state.update({name: value}))
    write_sums(folder)
    with pytest.raises(ValueError, match=f"{folder.name} cannot be used: .*{name}"):
        check(folder)


def test_a_step_after_the_end_of_the_run_is_refused(finished, tmp_path):
    folder = list_checkpoints(copied(finished, tmp_path / "run", 12) / "checkpoints")[-1]
    far = folder.with_name("checkpoint-1000000000")
    folder.rename(far)
    change_state(far, lambda state: state.update(step=10**9))
    write_sums(far)
    with pytest.raises(ValueError, match="step 1000000000 comes after the end of this run, which has 12 steps"):
        check(far)


def test_layouts_are_those_of_the_files_that_a_run_writes(finished):
    tensors, _ = load_checkpoint(list_checkpoints(finished / "checkpoints")[0])
    config = parse_config(["--config", str(finished / "config.yaml")])
    expected = layouts(config, build_unet(config))
    assert {*expected, "optimizer"} == tensors.keys()
    for file, layout in expected.items():
        assert {name: (tuple(value.shape), value.dtype) for name, value in tensors[file].items()} == layout


def test_a_run_reports_what_it_cannot_use_and_takes_the_one_before(trainer, finished, tmp_path):
    folder = copied(finished, tmp_path / "run", 12)
    first, second, third = list_checkpoints(folder / "checkpoints")
    change_state(third, lambda state: state.update(step=10**9))
    fill(math.nan)(second, "ema")
    for damaged in (second, third):
        write_sums(damaged)
    codes, output = trainer.run(folder, *OPTIONS, "--keep_checkpoints", "2")
    assert codes == [0], output
    assert "checkpoint-00000012 cannot be used: state.json says that it is of step 1000000000" in output
    assert "checkpoint-00000008 cannot be used: ema.safetensors holds NaN or infinity" in output
    assert "Resuming from step 4 of 12" in output and "Traceback" not in output
    assert_bit_identical(checkpoint(folder, 12), checkpoint(finished, 12))


def test_a_run_none_of_whose_checkpoints_can_be_used_does_not_start_again(trainer, finished, tmp_path):
    folder = copied(finished, tmp_path / "run", 4)
    (saved,) = list_checkpoints(folder / "checkpoints")
    (saved / "model.safetensors").write_bytes(b"")
    before = (folder / "log.jsonl").read_text()
    codes, output = trainer.run(folder, *OPTIONS)
    assert codes == [1] and "no checkpoint in" in output and "--overwrite to start again" in output
    assert (folder / "log.jsonl").read_text() == before
    assert trainer.run(folder, *OPTIONS, "--overwrite")[0] == [0]


def test_processes_that_see_other_checkpoints_are_refused(finished, monkeypatch):
    """Machines whose output_dir is on a disk of their own. The answer of the other machine is made up."""
    config = parse_config(["--config", str(finished / "config.yaml")])
    unet = build_unet(config)
    assert last_checkpoint(config, finished / "checkpoints", unet)[1]["step"] == 12
    monkeypatch.setattr(resume, "gather_object", lambda mine: [*mine, None])
    with pytest.raises(ValueError, match=r"checkpoints of different steps: \[12, None\]. output_dir must be on a file"):
        last_checkpoint(config, finished / "checkpoints", unet)
