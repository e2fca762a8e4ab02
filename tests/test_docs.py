"""The documents: their Python code runs, and the commands, options, files and names that they mention exist."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.pipelines.guidance import mark_null_class

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [path for folder in ("", "docs", "benchmarks") for path in sorted((ROOT / folder).glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
del TEXTS["CHANGELOG.md"]  # names what earlier versions had
SCRIPTS = ("train", "sample", "evaluate", "choose_ema", "publish", "convert", "distill", "export", "demo")
MAX_SENTENCE_WORDS = 35
# Files that a run writes, and placeholders.
WRITTEN = ("outputs/", "path/to", "<name>")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every command of a document's shell blocks, continued lines joined and comments left out."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := line.split("#")[0].split())]


def code(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def pipes(make_unet) -> dict[bool, DDPMPipelineCustom]:
    """Untrained pipelines of T = 1000, by whether they are class-conditional."""
    torch.set_num_threads(1)
    sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1}
    made = {
        has_classes: DDPMPipelineCustom(
            make_unet(**sizes, num_class_embeds=11 if has_classes else None), DDPMSchedulerCustom()
        )
        for has_classes in (False, True)
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    mark_null_class(made[True].unet)
    return made


@pytest.mark.parametrize("name", ["README.md", "docs/pipeline.md", "docs/fewer-steps.md"])
def test_python_blocks_run(name, pipes, monkeypatch):
    x, others, noisy = torch.rand(3, 2, 1, 8, 8) * 2 - 1
    namespace = {"x": x, "others": others, "noisy": noisy, "mask": torch.ones(1, 1, 8, 8)}
    for block in blocks(TEXTS[name], "python"):
        fitting = pipes["class_labels" in block]
        monkeypatch.setattr(DDPMPipelineCustom, "from_pretrained", lambda *_, pipe=fitting, **__: pipe)
        if "pipe" in namespace:
            namespace["pipe"] = fitting
        exec(compile(block, name, "exec"), namespace)


@pytest.mark.parametrize("name", TEXTS)
def test_python_imports_exist(name):
    for module, names in re.findall(r"^from (\S+) import (.+)$", "\n".join(blocks(TEXTS[name], "python")), flags=re.M):
        for imported in names.split(", "):
            assert hasattr(importlib.import_module(module), imported), f"{module} has no {imported}"


@pytest.mark.parametrize("name", TEXTS)
def test_names_of_modules_and_their_contents_exist(name):
    for dotted in {match for text in code(TEXTS[name]) for match in re.findall(r"\bddpm_hf(?:\.\w+)+", text)}:
        module, _, attribute = dotted.rpartition(".")
        try:
            importlib.import_module(dotted)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), f"{dotted} does not exist"


@pytest.mark.parametrize("name", TEXTS)
def test_linked_and_named_files_exist(name):
    links = re.findall(r"\]\(([^)#]+)\)", TEXTS[name])
    missing = [link for link in links if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()]
    pattern = re.compile(r"(?:ddpm_hf|training|tests|docs|benchmarks|model_cards|\.ci)/[\w./-]*")
    words = code(TEXTS[name]) + [word for command in commands(TEXTS[name]) for word in command]
    for word in words:
        if not any(part in word for part in WRITTEN):
            missing += [path for path in pattern.findall(word) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_named_tests_exist(name):
    """Such as `test_eq_1_…`, the beginning of a test's name."""
    files = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = {test for text in files for test in re.findall(r"def (test_\w+)", text)}
    starts = {start for text in code(TEXTS[name]) for start in re.findall(r"\b(test_\w+)…", text)}
    assert not {start for start in starts if not any(test.startswith(start) for test in tests)}


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of each script, as its `--help` prints them."""
    found = {}
    for script in SCRIPTS:
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
            importlib.import_module(f"ddpm_hf.scripts.{script}").main(["--help"])
        found[script] = set(re.findall(r"--\w+", output.getvalue()))
    return found


def launcher_options() -> set[str]:
    """The options of `accelerate launch` and of `torchrun`, which take "-" and "_" alike."""
    parsers = (launch_command_parser(), get_args_parser())
    strings = {string for parser in parsers for action in parser._actions for string in action.option_strings}
    return {"--" + string.strip("-").replace("-", "_") for string in strings}


@pytest.mark.parametrize("name", TEXTS)
def test_commands_have_the_options_that_they_are_given(name, options):
    for command in commands(TEXTS[name]):
        given = {word for word in command if word.startswith("--")}
        for script in SCRIPTS:
            names = (f"training/{script}.py", f"ddpm_hf.scripts.{script}", f"ddpm-{script.replace('_', '-')}")
            if set(names) & set(command):
                known = options[script] | (options["train"] if script == "distill" else set())
                assert given <= known | launcher_options(), " ".join(command)


@pytest.mark.parametrize("name", TEXTS)
def test_options_in_the_text_exist(name, options):
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    of_benchmarks = {
        f"--{option}" for pair in re.findall(r"^    (\w+): |\"--(\w+)\"", benchmarks, re.M) for option in pair
    }
    # Of other programs, shown in a script of the document.
    others = set(re.findall(r"--\w+", "".join(blocks(TEXTS[name], "bash"))))
    named = {option for text in code(TEXTS[name]) for option in re.findall(r"(?<!\S)--\w+", text)}
    assert named <= set().union(launcher_options(), of_benchmarks, others, *options.values())


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_sentences_are_short(name):
    text = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "!["))]
    paragraphs = re.split(r"\n\s*\n|\n- |\n\d\. ", "\n".join(lines))
    plain = (re.sub(r"\]\([^)]*\)", "]", paragraph) for paragraph in paragraphs)
    sentences = [sentence for paragraph in plain for sentence in re.split(r"(?<=[.?!])[\s*]+(?=[A-Z`\[])", paragraph)]
    assert not [sentence for sentence in sentences if len(sentence.split()) > MAX_SENTENCE_WORDS]
