"""The structure of the repository: which package imports which, how long files and functions are, where tests lie."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ddpm_hf

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(ddpm_hf.__file__).parent
# Imports point to lower floors; packages on the same floor do not import each other. "ground" is the modules outside packages.
FLOORS = [
    {"ground"},
    {"diffusion", "transfer"},
    {"models", "schedulers"},
    {"data"},
    {"pipelines"},
    {"convert"},
    {"evaluation"},
    {"hub"},
    {"training"},
    {"export"},
    {"demo"},
    {"scripts"},
]
PATHS = {
    ".".join(["ddpm_hf", *path.relative_to(LIBRARY).with_suffix("").parts]): path
    for path in LIBRARY.rglob("*.py")
    if path.name != "__init__.py"
}
PATHS |= {f"ddpm_hf.scripts.{p.stem}": p for p in (ROOT / "training").glob("*.py") if p.name != "__init__.py"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TEST_NAME = 350, 80, 69
# Modules with logic whose tests are in a file of another name, and the reason.
TESTED_ELSEWHERE: dict[str, str] = {
    "ddpm_hf.hub.commits": "test_publish, test_faults and test_spaces commit, with every fault",
}
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


def test_imports_have_no_cycles():
    order = list(TopologicalSorter({module: imports(module)[0] for module in FILES}).static_order())
    assert set(order) == set(FILES)


@pytest.mark.parametrize("module", sorted(m for m in FILES if package(m) == "diffusion"))
def test_the_diffusion_package_imports_only_torch_and_numpy(module):
    assert imports(module)[1] <= {"torch", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", sorted(m for m in FILES if package(m) not in ("training", "scripts")))
def test_the_library_neither_prints_nor_parses_a_command_line(module):
    calls = [n.func.id for n in ast.walk(FILES[module]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls and "argparse" not in imports(module)[1]


def functions(module: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(FILES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_no_file_is_longer_than_350_lines():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in PATHS.items()}
    long = {module: length for module, length in lengths.items() if length > MAX_FILE_LINES}
    assert not long, str(long)


def test_no_function_is_longer_than_80_lines():
    lengths = {f"{m}.{f.name}": f.end_lineno - f.lineno + 1 for m in FILES for f in functions(m)}
    long = {function: length for function, length in lengths.items() if length > MAX_FUNCTION_LINES}
    assert not long, str(long)


def test_each_module_with_functions_has_a_test_file_of_its_name():
    missing = []
    for module in sorted(FILES.keys() - TESTED_ELSEWHERE.keys()):
        *packages, name = module.split(".")[1:]
        if functions(module) and not (ROOT / "tests").joinpath(*packages, f"test_{name}.py").is_file():
            missing.append(module)
    assert not missing, "\n".join(missing)


def test_the_search_path_is_never_changed():
    folders = ("ddpm_hf", "training", "tests", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    changes = re.compile(r"sys\.path\.(insert|append|extend)|sys\.path\s*(\[.*\])?\s*\+?=[^=]")
    assert not [str(path) for path in files if changes.search(path.read_text(encoding="utf-8"))]


def test_test_names_are_short():
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    long = sorted(name for name in names if len(name) > MAX_TEST_NAME)
    assert not long, "\n".join(long)
