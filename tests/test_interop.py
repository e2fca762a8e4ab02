"""What the package shows, what its files may know of each other, and how far its classes are diffusers' own."""

import ast
import inspect
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import diffusers
import pytest

import ddpm_hf
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom

LIBRARY = Path(ddpm_hf.__file__).parent
FILES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in LIBRARY.glob("*.py")}
# An import points to a lower floor. Files that are not named stand above all of these, in some order without a circle.
FLOORS = [
    {"interop", "schedules", "seeds", "timestep_samplers", "timesteps", "transfer"},
    {"gaussian", "layers"},
    {"analytic", "likelihood", "scheduler", "unet"},
    {"guidance", "loading", "losses", "sampling_arguments"},
    {"denoising"},
    {"pipeline"},
]
TOP = len(FLOORS)


def imports(name: str) -> tuple[set[str], set[str]]:
    """The files of this package that a file imports, and the packages outside; imports inside functions too."""
    inside, outside = set(), set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            inside |= {name if name in FILES else "__init__" for name in names}
    inside |= {module.split(".")[1] for module in outside if module.startswith("ddpm_hf.")}
    return inside, {module.split(".")[0] for module in outside} - {"ddpm_hf"}


def floor(name: str) -> int:
    return next((i for i, names in enumerate(FLOORS) if name in names), TOP)


@pytest.mark.parametrize("name", sorted(name for name in FILES if floor(name) < TOP))
def test_imports_point_down_the_floors(name):
    assert {other for other in imports(name)[0] if floor(other) >= floor(name)} == set()


def test_no_imports_go_in_a_circle():
    order = list(TopologicalSorter({name: imports(name)[0] for name in FILES}).static_order())
    assert set(order) == set(FILES)
    assert set().union(*FLOORS) <= set(FILES)  # a floor names files that are there


@pytest.mark.parametrize("name", ["schedules", "gaussian"])
def test_the_mathematics_knows_only_torch(name):
    assert imports(name)[1] <= {"torch", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_library_neither_prints_nor_parses_a_command_line_nor_imports_scripts(name):
    called = {
        node.func.id for node in ast.walk(FILES[name]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in called
    assert imports(name)[1].isdisjoint({"argparse", "training", "benchmarks", "tests"})


def test_every_public_name_is_importable():
    assert {"DDPMPipelineCustom", "DDPMSchedulerCustom", "UNet2DModelCustom", "GaussianDiffusion"} <= set(
        ddpm_hf.__all__
    )
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_constructors_take_stocks_arguments_in_stocks_order_with_stocks_defaults(tiny_pipeline, part):
    mine = getattr(tiny_pipeline, part)
    taken, stocks = (
        [(p.name, p.default) for p in inspect.signature(cls.__init__).parameters.values()]
        for cls in (type(mine), mine.stock_class)
    )
    assert taken[: len(stocks)] == stocks
    assert [name for name, _ in taken[len(stocks) :]] == list(mine.own_arguments)


@pytest.mark.parametrize(
    ("mine", "stock", "method"),
    [
        (UNet2DModelCustom, diffusers.UNet2DModel, "forward"),
        (UNet2DModelCustom, diffusers.UNet2DModel, "save_pretrained"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "step"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "set_timesteps"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "add_noise"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "get_velocity"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "scale_model_input"),
        (DDPMPipelineCustom, diffusers.DDPMPipeline, "__init__"),
        (DDPMPipelineCustom, diffusers.DDPMPipeline, "__call__"),
    ],
)
def test_a_call_written_for_stock_fits(mine, stock, method):
    def positional(cls) -> list[str]:
        parameters = inspect.signature(getattr(cls, method)).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    # use_flashpack is for another file format than safetensors.
    expected = [name for name in positional(stock) if name != "use_flashpack"]
    assert positional(mine)[: len(expected)] == expected


@pytest.mark.parametrize(
    "attribute",
    ["_supports_gradient_checkpointing", "_no_split_modules", "_repeated_blocks", "_skip_layerwise_casting_patterns"],
)
def test_the_network_tells_diffusers_tools_what_they_ask(tiny_unet, attribute):
    value = getattr(tiny_unet, attribute)
    assert value
    kinds = {type(module).__name__ for module in tiny_unet.modules()}
    if attribute in ("_no_split_modules", "_repeated_blocks"):
        assert set(value) <= kinds
