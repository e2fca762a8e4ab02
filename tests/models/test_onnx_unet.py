"""The backend onnxruntime: the same images, guidance and edits as PyTorch, without its network."""

import shutil
import sys

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from ddpm_hf import DDIMSchedulerCustom, DDPMPipelineCustom, UNet2DModelCustom
from ddpm_hf.models.onnx_unet import OnnxUNet, onnx_name
from tests.pipelines.helpers import ROUNDING, edits, images

LABELS = {"class_labels": [0, 2], "seed": 0}
CALLS = {
    "ancestral": LABELS,
    "guided": LABELS | {"guidance_scale": 2.5},
    "guided by a function": LABELS
    | {"guidance": lambda x_0, t: -(x_0**2).sum((1, 2, 3)), "guidance_gradient": "estimate"},
    "few steps": LABELS | {"num_inference_steps": 4},
    "one label": {"class_labels": 1, "batch_size": 2, "seed": 3},
}


@pytest.fixture
def folder(exports):
    return exports[1]


def load(folder, **options) -> DDPMPipelineCustom:
    pipe = DDPMPipelineCustom.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipes(folder) -> tuple[DDPMPipelineCustom, DDPMPipelineCustom]:
    return load(folder), load(folder, backend="onnxruntime")


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS.keys())
def test_images_are_those_of_the_network_in_pytorch(pipes, arguments):
    expected, got = (images(pipe, **{"batch_size": 2, **arguments}) for pipe in pipes)
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("cls", [DDIMSchedulerCustom, DPMSolverMultistepScheduler])
def test_other_schedulers_sample_from_it_too(pipes, cls):
    results = []
    for pipe in pipes:
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        results.append(images(pipe, batch_size=2, num_inference_steps=5, **LABELS))
    torch.testing.assert_close(*results, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", edits(10, 3, 3, (4, 2, 2)))
def test_edits_are_those_of_the_network_in_pytorch(pipes, photos, name):
    edit = edits(10, 3, 3, (4, 2, 2))[name]
    expected, got = (edit(pipe, photos, class_labels=[0, 1], output_type="pt") for pipe in pipes)
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8) * 1.6 - 0.8


def test_no_network_of_pytorch_is_in_memory(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network of PyTorch was built")

    monkeypatch.setattr(UNet2DModelCustom, "__init__", refuse)
    monkeypatch.setattr(UNet2DModelCustom, "from_pretrained", refuse)
    pipe = load(folder, backend="onnxruntime")
    assert not list(pipe.unet.parameters()) and not list(pipe.unet.buffers())
    assert pipe(1, class_labels=0, num_inference_steps=2).images[0].size == (8, 8)
    assert pipe.unet.config["_class_names"] == ["a", "b", "c"]


def test_a_folder_with_the_onnx_file_alone_is_enough(folder, tmp_path):
    (tmp_path / "onnx").mkdir()
    shutil.copy(folder / onnx_name("fp16"), tmp_path / "onnx")
    half = images(load(tmp_path, backend="onnxruntime", variant="fp16"), batch_size=2, **LABELS)
    exact = images(load(folder), batch_size=2, **LABELS)
    assert 0 < (half - exact).abs().max() < 0.02


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda pipe: pipe.compile(), "compile"),
        (lambda pipe: pipe.to_diffusers(), "conversion"),
        (lambda pipe: pipe.save_pretrained("never"), "save_pretrained"),
        (lambda pipe: pipe(2, **LABELS, guidance=lambda x, t: x.sum()), "guidance_gradient='network'"),
        (lambda pipe: pipe(2), "class_labels must be given"),
        (lambda pipe: pipe.unet(torch.zeros(1, 3, 8, 8), 0), "the network takes"),
        (lambda pipe: pipe.unet(torch.zeros(1, 2, 8, 8), 0, torch.zeros(1)), r"refuses inputs .*\(1, 2, 8, 8\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_weights_or_other_inputs_is_refused(pipes, what, message):
    with pytest.raises(ValueError, match=message):
        what(pipes[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "tensorrt"}, ValueError, "backend.*'tensorrt'"),
        ({"torch_dtype": torch.float16}, TypeError, "torch_dtype is for a network of PyTorch"),
        ({"unet": object()}, TypeError, "unet is for a network of PyTorch"),
    ],
)
def test_options_of_the_backend_are_checked(folder, options, error, message):
    with pytest.raises(error, match=message):
        DDPMPipelineCustom.from_pretrained(folder, **{"backend": "onnxruntime", **options})


def test_a_variant_that_was_not_exported_is_named(folder, tmp_path):
    (tmp_path / "onnx").mkdir()
    shutil.copy(folder / "onnx" / "model.onnx", tmp_path / "onnx")
    with pytest.raises(FileNotFoundError, match="model_int8.onnx does not exist.*ddpm-export"):
        DDPMPipelineCustom.from_pretrained(tmp_path, backend="onnxruntime", variant="int8")


def test_files_of_other_programs_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="damaged.onnx cannot be read"):
        OnnxUNet(tmp_path / "damaged.onnx")
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) { y = Identity (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="other.onnx must be a file that ddpm-export wrote"):
        OnnxUNet(tmp_path / "other.onnx")


def test_a_missing_package_is_named_with_its_installation(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install ddpm_hf\[export\]"):
        load(folder, backend="onnxruntime")
