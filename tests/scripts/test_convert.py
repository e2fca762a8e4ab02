"""The command `ddpm-convert`."""

import pytest
import torch
from ddpm_hf.scripts import convert

from ddpm_hf import DDPMPipelineCustom
from tests.convert.reference import PytorchDDPM, Reference


@pytest.fixture
def options(tmp_path):
    network = Reference(PytorchDDPM, (32, 64), (False, True))
    network(torch.zeros(1, 3, 8, 8, dtype=torch.float64), torch.zeros(1))
    torch.save({"net_model": network.weights, "ema_model": network.weights, "step": 1}, tmp_path / "ckpt.pt")
    where = ["--checkpoint", str(tmp_path / "ckpt.pt"), "--output_dir", str(tmp_path / "out"), "--resolution", "8"]
    return [*where, "--source", "pytorch-ddpm"]


def test_the_folder_is_a_pipeline_to_sample_and_to_start_from(options, tmp_path, capsys):
    convert.main(options)
    images = DDPMPipelineCustom.from_pretrained(tmp_path / "out")(2, seed=0, num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    printed = capsys.readouterr().out
    assert f"--model {tmp_path / 'out'}" in printed and f"--init_from {tmp_path / 'out'}" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--source", "ddpm-torch"], "is no checkpoint of ddpm-torch"),
        (["--checkpoint", "nothing.pt"], "nothing.pt is no file"),
        (["--num_heads", "2"], "num_heads = 2 is for"),
        (["--heads", "2"], "unknown option '--heads'"),
    ],
)
def test_errors_are_one_sentence_and_nothing_is_written(options, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=f"convert.py: error: .*{message}"):
        convert.main([*options, *changes])
    assert not (tmp_path / "out").exists()
