"""The house: which package may import which, and how large a file or a function may become."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ddpm_hf

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(ddpm_hf.__file__).parent
# Packages of one floor do not know each other; imports point to lower floors. The ground are the modules in no package.
FLOORS = [
    {"ground"},
    {"diffusion"},
    {"models", "schedulers"},
    {"pipelines"},
    {"data"},
    {"evaluation"},
    {"hub"},
    {"training"},
    {"scripts"},
]
PATHS = {
    ".".join(["ddpm_hf", *path.relative_to(LIBRARY).with_suffix("").parts]): path
    for path in LIBRARY.rglob("*.py")
    if path.name != "__init__.py"
}
PATHS |= {f"ddpm_hf.scripts.{p.stem}": p for p in (ROOT / "training").glob("*.py") if p.name != "__init__.py"}
FILES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else "ground"


def floor(module: str) -> int:
    return next(i for i, packages in enumerate(FLOORS) if package(module) in packages)


def imports(module: str) -> tuple[set[str], set[str]]:
    """The modules of this package that a module imports, and the packages outside; imports inside functions too."""
    names = set()
    for node in ast.walk(FILES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in FILES else node.module for a in node.names
            }
    inside = {name for name in names if name in FILES}
    return inside, {name.split(".")[0] for name in names} - {"ddpm_hf"}


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_to_lower_floors(module):
    allowed = {m for m in FILES if floor(m) < floor(module) or package(m) == package(module)}
    assert imports(module)[0] <= allowed


def test_no_imports_go_in_a_circle():
    order = list(TopologicalSorter({module: imports(module)[0] for module in FILES}).static_order())
    assert set(order) == set(FILES)


@pytest.mark.parametrize("module", sorted(m for m in FILES if package(m) == "diffusion"))
def test_the_mathematics_imports_only_torch(module):
    assert imports(module)[1] <= {"torch", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", sorted(m for m in FILES if package(m) not in ("training", "scripts")))
def test_the_library_neither_prints_nor_parses_a_command_line(module):
    calls = [n.func.id for n in ast.walk(FILES[module]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls and "argparse" not in imports(module)[1]
