"""The command `ddpm-demo`: wrong options are answered with a sentence. tests/demo/test_app.py asks the app that it opens."""

import sys

import pytest
from ddpm_hf.scripts.demo import main

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from tests.conftest import TINY_SCHEDULER, TINY_UNET


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model must be given"),
        (["{folder}"], "holds no pipeline"),
        (["{folder}", "--port", "70000"], "port must be .*70000"),
        (["{folder}", "--backend", "openvino"], "backend must be one of"),
    ],
)
def test_wrong_options_are_errors_before_any_work(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"demo.py: error: .*{message}"):
        main([word.format(folder=tmp_path) for word in arguments])


def test_without_gradio_the_error_says_what_to_install(tmp_path, monkeypatch):
    pipe = DDPMPipelineCustom(UNet2DModelCustom(**TINY_UNET), DDPMSchedulerCustom(**TINY_SCHEDULER))
    pipe.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"demo.py: error: .*pip install ddpm_hf\[demo\]"):
        main([str(tmp_path)])
