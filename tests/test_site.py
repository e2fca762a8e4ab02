"""The documentation site: it builds without a network and without warnings, is complete, and loads nothing from elsewhere."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(package, reason="the extra 'docs' is not installed")

ROOT = Path(__file__).resolve().parent.parent
# MkDocs, in a process that cannot connect to anything.
OFFLINE = """
import socket, sys
def refuse(*_):
    raise OSError("the site must build without a network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_every_document_is_a_page(pages):
    documents = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages.keys() >= documents | {Path(page).with_suffix(".html").name for page in load_hooks().SOURCES}


def test_pages_load_nothing_from_elsewhere(site, pages):
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]*)"', page)
        loaded += re.findall(r'<link\b[^>]*\bhref="([^"]*)"', page)
        assert loaded and not [address for address in loaded if re.match(r"(\w+:)?//", address)], name
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert styles and not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", styles)


@pytest.mark.parametrize("name", ["derivation", "notebook"])
def test_every_formula_is_mathml(pages, name):
    source = (ROOT / "docs/derivation.md").read_text(encoding="utf-8") if name == "derivation" else ""
    page = pages[f"{name}.html"]
    assert page.count("<math") >= max(1, source.count("```math") + len(re.findall(r"(?<!`)\$[^$\n]+\$", source)))
    text = re.sub(r"<(pre|code)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert 'class="arithmatex"' not in page and not re.search(r"\$|\\(?:frac|bar|alpha|mathcal|qquad|\(|\[)", text)


def public_names(package: str) -> set[str]:
    """Documented functions and classes of a package's modules."""
    files = (ROOT / "ddpm_hf" / package).glob("[a-z]*.py")
    nodes = [(path.stem, node) for path in files for node in ast.parse(path.read_text(encoding="utf-8")).body]
    public = [(m, n) for m, n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name[0] != "_"]
    return {f"ddpm_hf.{package}.{module}.{node.name}" for module, node in public if ast.get_docstring(node)}


@pytest.mark.parametrize("package", load_hooks().API)
def test_the_api_has_every_documented_function_and_class(pages, package):
    anchors = set(re.findall(r'id="([\w.]+)"', pages[f"api/{package}.html"]))
    assert public_names(package) and public_names(package) <= anchors


def test_every_package_has_a_page_of_its_api():
    packages = {path.parent.name for path in ROOT.glob("ddpm_hf/*/__init__.py")}
    assert set(load_hooks().API) == packages - {"transfer"}  # the inside of hub


@pytest.mark.parametrize(
    ("target", "source", "page", "expected"),
    [
        ("docs/pipeline.md#ddim", "README.md", "index.md", "pipeline.md#ddim"),
        ("../benchmarks/README.md", "docs/training.md", "training.md", "benchmarks.md"),
        ("../README.md", "benchmarks/README.md", "benchmarks.md", "index.md"),
        ("samples.png", "model_cards/digits/README.md", "digits.md", "model_cards/digits/samples.png"),
        ("images/linear.png", "docs/derivation.md", "derivation.md", "images/linear.png"),
        ("LICENSE", "README.md", "index.md", "there/blob/main/LICENSE"),
        ("model_cards/digits/", "README.md", "index.md", "there/tree/main/model_cards/digits"),
        ("../derivation.md", "docs/notebooks/ddpm.ipynb", "notebook.md", "derivation.md"),
        ("https://example.org/a", "README.md", "index.md", "https://example.org/a"),
        ("#below", "README.md", "index.md", "#below"),
    ],
)
def test_links_lead_to_pages_and_else_to_the_repository(target, source, page, expected):
    assert load_hooks().site_link(target, source, page, "there") == expected


def test_a_link_to_a_file_that_does_not_exist_is_refused():
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match="README.md links to docs/none.md"):
        load_hooks().site_link("docs/none.md", "README.md", "index.md", "there")


def test_the_repository_has_one_address():
    """In mkdocs.yml, in the notebook's badge, and where the notebook clones."""
    (address,) = re.findall(r"^  repository: (\S+)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    notebook = (ROOT / "docs/notebooks/ddpm.ipynb").read_text(encoding="utf-8")
    path = address.removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{path}/blob/main/docs/notebooks/ddpm.ipynb" in notebook
    assert f"git clone -q {address}" in notebook
