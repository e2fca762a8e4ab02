"""Wheel and source distribution: their contents, their dependencies, and the commands after an installation."""

import ast
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddpm_hf

ROOT = Path(__file__).resolve().parent.parent
GENERATED = (".git", ".venv*", "venv", "outputs", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
COMMANDS = ("train", "sample", "evaluate", "choose-ema", "publish", "convert", "distill", "export", "demo")
TINY_RUN = (
    *("--block_out_channels", "8", "16", "--layers_per_block", "1", "--attention_head_dim", "8"),
    *("--total_images", "64", "--batch_size", "16", "--sample_steps", "2", "--quality_samples", "0"),
    *("--report_to", "none", "--cpu_threads", "1"),
)


PACKAGES = importlib.metadata.packages_distributions()


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that has to succeed within two minutes, with nothing of the clone on Python's path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[zipfile.ZipFile, tarfile.TarFile]:
    """The wheel and the source distribution that it is built from."""
    folder = tmp_path_factory.mktemp("packaging")
    # setuptools writes into the folder that it builds: build a copy.
    source = shutil.copytree(ROOT, folder / "clone", ignore=shutil.ignore_patterns(*GENERATED))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return zipfile.ZipFile(wheel), tarfile.open(sdist)


@pytest.fixture(scope="module")
def bin_folder(distributions, tmp_path_factory) -> Path:
    """The commands of a virtual environment that has the wheel, and shares its dependencies with this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    (site_packages,) = run_python(bin_folder, "import site; print(site.getsitepackages()[0])").split()
    # .pth files inside a folder that is named by a .pth file are not read: an editable installation stays unseen.
    shared = (path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    Path(site_packages, "shared.pth").write_text("\n".join(shared))
    pip = (sys.executable, "-m", "pip", "--python", bin_folder / "python", "--disable-pip-version-check", "-q")
    run(*pip, "install", "--no-index", "--no-deps", distributions[0].filename, cwd=folder)
    return bin_folder


def run_python(bin_folder: Path, code: str) -> str:
    return run(bin_folder / "python", "-c", code, cwd=bin_folder)


def files_below(*folders: str) -> set[str]:
    """Files of the clone, as paths relative to it."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    kept = (p for p in paths if p.is_file() and p.suffix != ".pyc" and not p.name.startswith("."))
    return {str(path.relative_to(ROOT)) for path in kept}


def test_the_wheel_has_library_scripts_presets_and_templates(distributions):
    names = set(distributions[0].namelist())
    expected = files_below("ddpm_hf") | {f"ddpm_hf/scripts/{n.partition('/')[2]}" for n in files_below("training")}
    installed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert installed == expected
    assert {"ddpm_hf/py.typed", "ddpm_hf/hub/model_card_template.md", "ddpm_hf/evaluation/digits_card.md"} <= names
    assert {"ddpm_hf/scripts/train.py", "ddpm_hf/scripts/configs/digits.yaml"} <= names


def test_the_sdist_has_tests_benchmarks_docs_and_model_cards(distributions):
    names = {name.partition("/")[2] for name in distributions[1].getnames()}
    folders = files_below("ddpm_hf", "training", "tests", "benchmarks", "docs", "examples", "model_cards")
    root = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "setup.cfg"}
    assert names >= folders | root | {"pyproject.toml", "ruff.toml", "constraints.txt", ".ci/run", "tests/conftest.py"}


def requirements(wheel: zipfile.ZipFile, *extras: str) -> set[str]:
    """The distributions that an installation with these extras needs."""
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if name.split("/")[0].endswith(".dist-info")}
    lines = importlib.metadata.PathDistribution(zipfile.Path(wheel, f"{folder}/")).requires
    needed = (
        r for r in map(Requirement, lines) if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)
    )
    return {canonicalize_name(requirement.name) for requirement in needed}


@functools.cache
def distribution_of(package: str) -> str:
    """The distribution that an importable package belongs to: "PIL" is pillow's."""
    return canonicalize_name(PACKAGES.get(package, [package])[0])


def imported_distributions(tree: ast.AST, at_module_level: bool = False) -> set[str]:
    """The distributions whose packages a file imports; `at_module_level` leaves out imports inside functions, and for types."""

    def is_run(node: ast.AST) -> bool:
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        return not (for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))

    nodes = [tree]
    for node in nodes:
        if not at_module_level or is_run(node):
            nodes.extend(ast.iter_child_nodes(node))
    names = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    return {distribution_of(name) for name in names - set(sys.stdlib_module_names) - {"ddpm_hf"}}


@pytest.fixture(scope="module")
def trees(distributions) -> dict[str, ast.Module]:
    wheel = distributions[0]
    return {name: ast.parse(wheel.read(name)) for name in wheel.namelist() if name.endswith(".py")}


def test_imports_at_module_level_are_core_dependencies(distributions, trees):
    undeclared = {
        name: imported_distributions(tree, True) - requirements(distributions[0]) for name, tree in trees.items()
    }
    assert not {name: missing for name, missing in undeclared.items() if missing}


def test_imports_inside_functions_are_dependencies_or_extras(distributions, trees):
    declared = requirements(distributions[0], "train", "eval", "fid", "lora", "video", "export", "demo")
    undeclared = {name: imported_distributions(tree) - declared for name, tree in trees.items()}
    assert not {name: missing for name, missing in undeclared.items() if missing}


def test_core_dependencies_are_imported(distributions, trees):
    assert requirements(distributions[0]) <= set().union(*map(imported_distributions, trees.values()))


def test_tests_run_with_the_pinned_versions():
    """constraints.txt pins every dependency that setup.cfg declares, so that `make test` is repeatable."""
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    assert len(pinned) == len(lines)
    text = (ROOT / "setup.cfg").read_text()
    declared = {canonicalize_name(name) for name in re.findall(r"^    ([\w-]+)>=", text, flags=re.M)}
    assert declared - {"torch-fidelity"} <= pinned  # the extra "fid" is not part of "test"


def test_citation_and_changelog_have_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ddpm_hf.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"## [{ddpm_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(bin_folder, tmp_path_factory) -> Path:
    """A folder with a run of the installed package."""
    folder = tmp_path_factory.mktemp("trained")
    run(bin_folder / "ddpm-train", "--config", "digits", *TINY_RUN, "--output_dir", "run", cwd=folder)
    return folder


def test_an_installed_model_is_trained_sampled_and_loaded(bin_folder, trained):
    assert Path(run_python(bin_folder, "import ddpm_hf; print(ddpm_hf.__file__)").strip()).is_relative_to(
        bin_folder.parent
    )
    assert (trained / "run" / "README.md").is_file()
    sample = ("--model", "run", "--num_images", "2", "--steps", "2", "--output_dir", "samples")
    run(bin_folder / "ddpm-sample", *sample, cwd=trained)
    assert len(list((trained / "samples").glob("*.png"))) == 2
    code = (
        "from ddpm_hf import DDPMPipelineCustom as Pipeline\n"
        f"pipe = Pipeline.from_pretrained({str(trained / 'run')!r})\n"
        "print(pipe(2, seed=0, num_inference_steps=2, output_type='np').images.shape)"
    )
    assert run_python(bin_folder, code).strip() == "(2, 8, 8, 1)"


def test_an_installed_model_is_exported_and_shown(bin_folder, trained):
    model = str(trained / "run")
    run(bin_folder / "ddpm-export", model, cwd=trained)
    code = f"""
from ddpm_hf import DDPMPipelineCustom as Pipeline
from ddpm_hf.demo.app import make_app
from ddpm_hf.demo.gradio_space import gradio_files
from ddpm_hf.demo.site import site_files
pipe = Pipeline.from_pretrained({model!r}, backend="onnxruntime")
print(make_app(pipe, "digits").title)
print({{"index.html", "model.onnx"}} <= site_files({model!r}).keys())
print({{"app.py", "requirements.txt", "ddpm_hf/demo/app.py"}} <= gradio_files("user/digits").keys())
"""
    assert run_python(bin_folder, code).splitlines() == ["digits: a DDPM", "True", "True"]


def test_accelerate_launches_the_installed_training_module(bin_folder, tmp_path):
    launch = (bin_folder / "python", "-m", "accelerate.commands.launch")
    assert "--total_images" in run(*launch, "-m", "ddpm_hf.scripts.train", "--help", cwd=tmp_path)


def test_each_command_is_installed_and_can_be_imported(bin_folder):
    code = "from importlib.metadata import distribution as d; [e.load() for e in d('ddpm_hf').entry_points]"
    run_python(bin_folder, code)
    assert {path.stem for path in bin_folder.glob("ddpm-*")} == {f"ddpm-{name}" for name in COMMANDS}
