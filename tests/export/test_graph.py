"""The ONNX graph and the program of torch.export compute what the network does, for every kind of network."""

import json

import onnx
import pytest
import torch

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.export.graph import OPSET, to_onnx, to_program
from ddpm_hf.export.inputs import graph_inputs, random_inputs
from ddpm_hf.export.onnx_files import TOLERANCE, predictions
from ddpm_hf.models.onnx_unet import open_session
from ddpm_hf.pipelines.guidance import mark_class_names, mark_null_class
from tests.conftest import TINY_SCHEDULER
from tests.export.comparison import errors

T = TINY_SCHEDULER["num_train_timesteps"]
CLASSES = {"num_class_embeds": 5}
# Each has several kinds of layers, because an export takes seconds.
CONFIGURATIONS = {
    "three levels, padding 0, learned time embedding, class given as an embedding": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "time_embedding_type": "learned",
        "num_train_timesteps": T,
        "class_embed_type": "identity",
    },
    "resnet sampling, scale_shift, learned variance, not square, class as timestep": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "out_channels": 6,
        "sample_size": (8, 16),
        "class_embed_type": "timestep",
    },
    "fourier time embedding, classes without a null class": {"time_embedding_type": "fourier", **CLASSES},
}


def write(pipe: DDPMPipelineCustom, folder):
    file = folder / "model.onnx"
    onnx.save(to_onnx(pipe), file)
    return file


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_the_graph_computes_the_network_for_any_batch(make_pipeline, tmp_path, changes):
    pipe = make_pipeline(scheduler=None, **changes)
    batches = [graph_inputs(pipe.unet, random_inputs(pipe.unet, T, size, seed=size)) for size in (1, 2, 33)]
    assert errors(write(pipe, tmp_path), pipe, batches)[1] < TOLERANCE


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A class-conditional pipeline with a null class and a learned variance, and its ONNX file."""
    from ddpm_hf import UNet2DModelCustom
    from tests.conftest import TINY_UNET

    torch.manual_seed(0)
    unet = UNet2DModelCustom(**{**TINY_UNET, **CLASSES, "out_channels": 6}).eval()
    mark_null_class(unet)
    mark_class_names(unet, ["a", "b", "ç", "d"])
    scheduler = DDPMSchedulerCustom(**TINY_SCHEDULER | {"variance_type": "learned_range"})
    pipe = DDPMPipelineCustom(unet, scheduler)
    return pipe, write(pipe, tmp_path_factory.mktemp("guided"))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 2.5])
def test_guidance_in_the_graph_is_that_of_the_pipeline(guided, scale):
    pipe, file = guided
    batches = [graph_inputs(pipe.unet, random_inputs(pipe.unet, T, size, seed=size), scale) for size in (1, 4)]
    assert errors(file, pipe, batches)[1] < TOLERANCE


def test_one_timestep_and_label_serve_the_whole_batch(guided):
    pipe, file = guided
    inputs = graph_inputs(pipe.unet, random_inputs(pipe.unet, T, 3), 2.0)
    inputs["timestep"], inputs["class_labels"] = inputs["timestep"][:1], inputs["class_labels"][:1]
    single = open_session(file).run(None, inputs)[0]
    repeated = inputs | {name: inputs[name].repeat(3) for name in ("timestep", "class_labels")}
    assert abs(single - predictions(pipe.unet, repeated)).max() < 1e-5


def test_the_file_records_what_sampling_needs_to_know(guided):
    pipe, file = guided
    model = onnx.load(file)
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts["alphas_cumprod"] == pipe.scheduler.diffusion.alphas_cumprod.double().tolist()
    assert (facts["num_train_timesteps"], facts["prediction_type"]) == (T, "v_prediction")
    assert (facts["null_class"], facts["class_names"]) == (4, ["a", "b", "ç", "d"])
    assert (facts["channels"], facts["sample_size"], facts["clip_sample_range"]) == (3, [8, 8], 1.0)
    assert facts["scheduler_config"]["variance_type"] == "learned_range"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert shapes["sample"] == ["batch", 3, 8, 8] and shapes["guidance_scale"] == []


def test_a_network_without_a_size_takes_any_multiple(make_unet, tmp_path):
    pipe = DDPMPipelineCustom(make_unet(sample_size=None), DDPMSchedulerCustom(**TINY_SCHEDULER))
    file = write(pipe, tmp_path)
    for H, W in ((2, 4), (16, 16), (30, 12)):
        inputs = graph_inputs(pipe.unet, random_inputs(pipe.unet, T, 2) | {"sample": torch.randn(2, 3, H, W)})
        assert errors(file, pipe, [inputs])[1] < TOLERANCE


@pytest.mark.parametrize("changes", [{}, CLASSES], ids=["unconditional", "classes"])
def test_a_program_of_torch_export_takes_any_batch(make_unet, changes):
    unet = make_unet(**changes)
    program = to_program(unet, T).module()
    for size in (1, 2, 15, 16, 63, 64, 200):
        inputs = random_inputs(unet, T, size, seed=size)
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs), unet(**inputs).sample, rtol=0, atol=1e-5)
