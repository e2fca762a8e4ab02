"""The command `ddpm-publish`, as far as it needs no Hub (tests/hub/test_publish.py has one)."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from ddpm_hf.scripts.publish import PublishArguments, main, parse

SCRIPT = str(Path(__file__).resolve().parents[2] / "training" / "publish.py")


def test_help_is_printed_without_importing_torch():
    code = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"--{field.name}" in done.stdout for field in dataclasses.fields(PublishArguments))


def test_every_option_has_a_help_text():
    assert all(field.metadata["help"] for field in dataclasses.fields(PublishArguments))


def test_the_folder_may_be_given_first_or_by_name(tmp_path):
    for arguments in ([str(tmp_path)], ["--model", str(tmp_path)]):
        args = parse([*arguments, "--repo_id", "user/name"])
        assert (args.model, args.repo_id) == (str(tmp_path), "user/name")


def test_the_repository_defaults_to_that_of_the_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("hub_model_id: user/configured\n")
    assert parse([str(tmp_path)]).repo_id == "user/configured"
    assert parse([str(tmp_path), "--repo_id", "user/given"]).repo_id == "user/given"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "publish.py: error: model must be the folder of a trained model"),
        (["{folder}"], "publish.py: error: repo_id must be user/name, got None, and .*config.yaml has no hub_model_id"),
        (["--gradio_space=a/b"], "publish.py: error: model must be the folder of a trained model"),
        (["{folder}", "--gradio_space=a/b"], "publish.py: error: repo_id must be user/name, got None"),
        (
            ["{folder}", "--repo_id=a/b", "--first_wait_seconds=-1"],
            "publish.py: error: first_wait_seconds must be .*-1",
        ),
        (["{folder}", "--repo_id=a/b", "--create_pr", "--tag=v1"], "publish.py: error: create_pr cannot be combined"),
        (
            ["{folder}", "--repo_id=a/b", "--with_training_state"],
            "publish.py: error: with_training_state needs a check",
        ),
    ],
)
def test_invalid_options_are_errors_that_name_them(tiny_pipeline, tmp_path, arguments, message):
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main([argument.format(folder=tmp_path) for argument in arguments])
