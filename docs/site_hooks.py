"""What MkDocs calls while it builds the site (`hooks` in mkdocs.yml).

The documents are written for GitHub, and stay as they are. Those outside docs/ become pages too, links lead to the page
of a document or else to the source file, formulas become MathML, and the API has a page per package.
"""

import html
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Documents outside docs/, and the pages that they become.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "model_cards/digits/README.md": "digits.md",
    "model_cards/mnist/README.md": "mnist.md",
    "model_cards/cifar10-small/README.md": "cifar10-small.md",
    "docs/notebooks/ddpm.ipynb": "notebook.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
API = [
    "pipelines",
    "schedulers",
    "models",
    "diffusion",
    "data",
    "training",
    "evaluation",
    "hub",
    "convert",
    "export",
    "demo",
]
LINK = re.compile(r"(\]\()([^)\s]+)")
BADGE = re.compile(r"\[!\[([^]]+)\]\(https?://[^)]+\)\]")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = notebook_page(text) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=content))
    for picture in sorted((ROOT / "model_cards").rglob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    for package in API:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    if name.startswith("api/"):
        return markdown
    source = SOURCES.get(name, f"docs/{name}")
    # Code is left as it is.
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)
    # A badge is a picture of another server: its link stays.
    parts[::2] = [BADGE.sub(r"[\1]", part) for part in parts[::2]]
    parts[::2] = [
        LINK.sub(lambda link: link[1] + site_link(link[2], source, name, config.extra["repository"]), part)
        for part in parts[::2]
    ]
    return "".join(parts)


def on_page_content(content, page, config, files):
    return FORMULA.sub(lambda formula: mathml(html.unescape(formula[2]), formula[1] == "div"), content)


def site_link(target: str, source: str, page: str, repository: str) -> str:
    """A link of the document `source` as one of its page: both are paths, in the repository and on the site.

    Raises PluginError if the target does not exist.
    """
    path, separator, anchor = target.partition("#")
    if not path or "://" in target:
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / path).exists():
        raise PluginError(f"{source} links to {target}, which does not exist.")
    if path in PAGES:
        place = PAGES[path]
    elif path.startswith("docs/") and path.endswith((".md", ".png")):
        place = path.removeprefix("docs/")
    elif path.endswith(".png"):
        place = path
    else:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{repository}/{kind}/main/{path}{separator}{anchor}"
    return posixpath.relpath(place, posixpath.dirname(page) or ".") + separator + anchor


def mathml(formula: str, is_block: bool) -> str:
    return convert(formula.strip(), display="block" if is_block else "inline")


def notebook_page(text: str) -> str:
    """A notebook's text and code."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)


def api_page(package: str) -> str:
    """The public functions and classes of a package's modules."""
    folder = ROOT / "ddpm_hf" / package
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    # Separate instructions, since a package has no contents of its own.
    return "\n\n".join([f"# ddpm_hf.{package}", *(f"::: ddpm_hf.{package}.{module}" for module in modules)])
