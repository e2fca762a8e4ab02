"""The scripts answer --help without importing torch, and every option has a help text."""

import dataclasses
import subprocess
import sys

import pytest
from ddpm_hf.scripts import choose_ema, convert, demo, distill, evaluate, export, publish, sample

OPTIONS = {
    "choose_ema": choose_ema.EMAArguments,
    "publish": publish.PublishArguments,
    "evaluate": evaluate.EvaluationOptions,
    "sample": sample.SampleArguments,
    "convert": convert.ConvertOptions,
    "distill": distill.DistillOptions,
    "export": export.ExportOptions,
    "demo": demo.DemoArguments,
}
CODE = """
import sys
from ddpm_hf.scripts import {script}
try:
    {script}.main(["--help"])
except SystemExit as end:
    assert not end.code
assert not {{"torch", "diffusers", "accelerate", "datasets"}} & sys.modules.keys()
"""


@pytest.mark.parametrize("script", OPTIONS)
def test_help_is_printed_without_importing_torch(script):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(script=script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"--{field.name}" in done.stdout for field in dataclasses.fields(OPTIONS[script]))


@pytest.mark.parametrize("script", OPTIONS)
def test_every_option_has_a_help_text(script):
    assert all(field.metadata.get("help") for field in dataclasses.fields(OPTIONS[script]))
