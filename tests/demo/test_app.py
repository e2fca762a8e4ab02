"""The Gradio app, asked by its own client: images of the pipeline, errors as messages, limits."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom, image_grid
from ddpm_hf.demo.app import Model
from ddpm_hf.export.onnx_files import export_onnx
from ddpm_hf.pipelines.guidance import mark_class_names, mark_null_class
from ddpm_hf.pipelines.inversion import interpolate_seeds
from ddpm_hf.schedulers.samplers import make_sampler
from tests.conftest import TINY_SCHEDULER, TINY_UNET

gradio_client = pytest.importorskip("gradio_client", reason="the extra 'demo' is not installed")

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "demo.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModelCustom(**{**TINY_UNET, "num_class_embeds": 4}).eval()
    mark_null_class(unet)
    mark_class_names(unet, ["cat", "dog", "owl"])
    folder = tmp_path_factory.mktemp("demo") / "animals"
    DDPMPipelineCustom(unet, DDPMSchedulerCustom(**TINY_SCHEDULER)).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder) -> DDPMPipelineCustom:
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def client(folder):
    """A client of the app, which runs in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log"
    with open(log, "w") as output:
        command = [sys.executable, str(SCRIPT), str(folder), "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
                break
            except Exception:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield client
    finally:
        server.kill()
        server.wait()


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def enlarged(images, **layout) -> np.ndarray:
    return np.asarray(image_grid(images, scale=16, padding=2, **layout)).astype(int)


def test_sampling_gives_the_images_of_the_pipeline_step_by_step(client, pipe):
    job = client.submit(3, "dog", 2.0, "ddim", 10, 5, api_name="/sample")
    picture, status = job.result(timeout=60)
    assert status == "3 images, seed 5, 10 steps of ddim"
    shown = job.outputs()
    assert all(text.startswith("step ") for _, text in shown[:-1]) and len(shown) >= 2
    pipe.scheduler = make_sampler("ddim", pipe.scheduler)
    expected = pipe(3, seed=5, num_inference_steps=10, class_labels=1, guidance_scale=2.0).images
    assert np.abs(pixels(picture) - enlarged(expected)).max() <= 1


def test_interpolation_gives_a_row_of_images(client, pipe):
    picture = client.predict(1, 2, 4, "owl", 1.0, 5, api_name="/interpolate")
    expected = interpolate_seeds(pipe, 1, 2, [0, 1 / 3, 2 / 3, 1], 5, class_labels=2)
    assert np.abs(pixels(picture) - enlarged(expected, columns=4)).max() <= 1


def test_calls_at_the_same_time_do_not_disturb_each_other(client):
    calls = [("/interpolate", (1, 2, 4, "owl", 1.0, steps)) for steps in (3, 7, 11)]
    alone = [client.predict(*arguments, api_name=name) for name, arguments in calls]
    jobs = [client.submit(*arguments, api_name=name) for name, arguments in calls]
    sampling = client.submit(8, "cat", 1.0, "ddpm", 20, 0, api_name="/sample")
    together = [job.result(timeout=60) for job in jobs]
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(alone, together, strict=True))
    assert sampling.result(timeout=60)[1] == "8 images, seed 0, 20 steps of ddpm"


@pytest.fixture
def editor(tmp_path):
    """What the image editor holds after the upper half of a gray image was painted over."""
    Image.new("RGBA", (64, 64), (90, 120, 150, 255)).save(tmp_path / "image.png")
    strokes = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    strokes.paste((255, 0, 0, 255), (0, 0, 64, 32))
    strokes.save(tmp_path / "strokes.png")
    files = {name: gradio_client.handle_file(str(tmp_path / f"{name}.png")) for name in ("image", "strokes")}
    return {"background": files["image"], "layers": [files["strokes"]], "composite": files["image"]}


def test_what_is_not_painted_over_stays_as_it_is(client, editor):
    picture = pixels(client.predict(editor, 10, "cat", 1.0, 1, 0, api_name="/inpaint"))
    assert picture.shape == (128, 128, 3)
    assert np.abs(picture[64:] - [90, 120, 150]).max() <= 1 and np.abs(picture[:64] - [90, 120, 150]).max() > 10


def test_image_to_image_changes_more_at_more_strength(client, editor):
    change = [
        np.abs(pixels(client.predict(editor, s, "cat", 1.0, 2, 0, api_name="/image_to_image")) - [90, 120, 150]).mean()
        for s in (0.05, 1.0)
    ]
    assert change[0] < change[1]


@pytest.mark.parametrize(
    ("arguments", "api_name", "message"),
    [
        ((2, "dog", 1.0, "ddpm", 5, -3), "/sample", "minimum|seed"),
        ((17, "dog", 1.0, "ddpm", 5, 0), "/sample", "16"),
        ((1, "horse", 1.0, "ddpm", 5, 0), "/sample", "horse"),
        ((None, 0.5, "dog", 1.0, 1, 0), "/image_to_image", "give an image first"),
    ],
)
def test_errors_are_messages(client, arguments, api_name, message):
    with pytest.raises(Exception, match=message):
        client.predict(*arguments, api_name=api_name)


def test_an_image_of_the_model_can_be_painted_on(client, pipe):
    given = client.predict("dog", 1.0, 4, api_name="/example")
    expected = DDPMPipelineCustom(pipe.unet, make_sampler("unipc", pipe.scheduler))
    expected.set_progress_bar_config(disable=True)
    image = expected(1, seed=4, num_inference_steps=20, class_labels=1).images
    assert np.abs(pixels(given["background"]) - np.asarray(image_grid(image, scale=16, padding=0))).max() <= 1


@pytest.mark.parametrize(
    ("unet", "message"),
    [({"class_embed_type": "timestep"}, "class_embed_type"), ({"sample_size": None}, "sample_size")],
)
def test_models_that_it_has_no_controls_for_are_refused(unet, message):
    pipe = DDPMPipelineCustom(UNet2DModelCustom(**{**TINY_UNET, **unet}), DDPMSchedulerCustom(**TINY_SCHEDULER))
    with pytest.raises(ValueError, match=message):
        Model(pipe)


def test_an_exported_model_gives_the_same_pictures(folder, pipe):
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    export_onnx(pipe, folder)
    other = DDPMPipelineCustom.from_pretrained(folder, backend="onnxruntime")
    *_, (expected, _), (got, _) = [[*Model(p).sample(2, "cat", 1.5, "ddim", 5, 0)][-1] for p in (pipe, other)]
    assert np.abs(np.asarray(got).astype(int) - np.asarray(expected)).max() <= 1


def test_painting_is_asked_for_before_filling_in(client, editor):
    with pytest.raises(Exception, match="paint over the part"):
        client.predict(editor | {"layers": []}, 10, "cat", 1.0, 1, 0, api_name="/inpaint")
