"""The Gradio Space: its files run the app with the versions that are installed here."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

pytest.importorskip("gradio", reason="the extra 'demo' is not installed")

from ddpm_hf.demo.gradio_space import gradio_files, requirements


@pytest.fixture
def space(tmp_path) -> Path:
    for name, content in gradio_files("user/model").items():
        file = tmp_path / "space" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return tmp_path / "space"


def test_the_card_says_what_the_hub_has_to_run(space):
    card = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["user/model"])
    assert card["sdk_version"] == importlib.metadata.version("gradio")


def test_requirements_are_pinned_to_the_versions_installed_here():
    pinned = {r.name: r for r in map(Requirement, requirements())}
    assert {"torch", "diffusers", "numpy"} <= pinned.keys()
    assert all(r.specifier.contains(importlib.metadata.version(name).split("+")[0]) for name, r in pinned.items())


def test_the_app_of_the_space_opens_with_the_files_of_the_space_alone(space, make_pipeline):
    make_pipeline().save_pretrained(space / "user" / "model")
    code = "import app, ddpm_hf; print(ddpm_hf.__file__); print(app.app.title)"
    environment = os.environ | {"PYTHONPATH": str(space)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [str(space / "ddpm_hf" / "__init__.py"), "user/model: a DDPM"]
    assert not (space / "ddpm_hf" / "scripts").exists() and ast.parse((space / "app.py").read_text())
