"""The notebook runs from a fresh kernel, as a person would run it, and publishes to a Hub on loopback."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.hub import HubServer, hub_environment

nbformat = pytest.importorskip("nbformat", reason="the extra 'docs' is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra 'docs' is not installed")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "ddpm.ipynb"
REPO_ID = "ada/ddpm-digits"


def test_the_notebook_is_stored_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs, and the files that it published. The kernel runs in the folder of the notebook."""
    home = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("REPO_ID = None", f"REPO_ID = {REPO_ID!r}")
    # A kernel of this environment, whatever kernels the user has installed.
    kernel = home / "share" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    kernel.joinpath("kernel.json").write_text(f'{{"argv": {argv}, "display_name": "Python 3", "language": "python"}}')
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        token = hub.add_user("ada")
        changes = {"JUPYTER_PATH": str(home / "share"), "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}
        environment = hub_environment(hub, home, HF_TOKEN=token, HF_HUB_OFFLINE="0", **changes)
        patch.setattr(os, "environ", environment)
        nbclient.NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
        ).execute(env=environment)
        yield notebook, hub


def test_every_picture_of_the_notebook_is_drawn(executed):
    for cell in executed[0].cells:
        asked = len(re.findall(r"\bdisplay\(|plt\.show\(", cell.source))
        assert sum("image/png" in output.get("data", {}) for output in cell.get("outputs", [])) == asked


def test_the_notebook_publishes_a_model_that_loads(executed, tmp_path):
    from ddpm_hf import DDPMPipelineCustom

    for name, data in executed[1].repo(REPO_ID).contents().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    pipe = DDPMPipelineCustom.from_pretrained(tmp_path)
    assert pipe(2, seed=0, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
