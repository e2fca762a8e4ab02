"""Write docs/options.md, the list of the options of the scripts, from the tables that the scripts use."""

from dataclasses import MISSING, fields
from pathlib import Path

from ddpm_hf.scripts.choose_ema import EMAArguments
from ddpm_hf.scripts.demo import DemoArguments
from ddpm_hf.scripts.distill import DistillOptions
from ddpm_hf.scripts.publish import PublishArguments
from ddpm_hf.scripts.sample import SampleArguments

from ddpm_hf.convert.options import ConvertOptions
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.export.options import ExportOptions
from ddpm_hf.options import accepted, default_of
from ddpm_hf.training.config import TrainingConfig

TABLES = {
    "train": TrainingConfig,
    "sample": SampleArguments,
    "evaluate": EvaluationOptions,
    "choose_ema": EMAArguments,
    "publish": PublishArguments,
    "convert": ConvertOptions,
    "distill": DistillOptions,
    "export": ExportOptions,
    "demo": DemoArguments,
}
INTRODUCTION = """# Options

Every option of the scripts: its name, what it accepts, its default, and what it is for. `python docs/make_options.py` writes this
page. `--config` of `train.py` takes a preset or a YAML file (JSON too) with these names as keys. The same checks hold for files and
command lines. A square bracket includes the end of a range. The value `None` removes one that the preset gives.
"""


def text() -> str:
    """The content of docs/options.md."""
    parts = [INTRODUCTION]
    for script, table in TABLES.items():
        head = ["| option | accepts | default | |", "|---|---|---|---|"]
        rows = [f"\n## training/{script}.py\n", *head]
        for spec in fields(table):
            if group := spec.metadata["group"]:
                rows = rows[:-2] if rows[-2:] == head else [*rows, ""]
                rows += [f"### {group}\n", *head]
            default = "" if default_of(spec) is MISSING else f"`{default_of(spec)!r}`"
            cells = (f"`--{spec.name}`", accepted(table, spec), default, spec.metadata["help"])
            rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        parts.append("\n".join(rows) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "options.md").write_text(text(), encoding="utf-8")
