"""Sampling step by step, eval mode, and compiled steps."""

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ddpm_hf.pipelines.arguments import prepare_scheduler
from ddpm_hf.pipelines.guidance import mark_null_class
from tests.pipelines.helpers import ROUNDING, SCHEDULERS, SHORT, images, seeded

# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("scheduler", [None, SCHEDULERS["DDIM"], SCHEDULERS["Heun"]], ids=["own", "DDIM", "Heun"])
def test_denoise_yields_every_step_and_ends_like_a_call(make_pipeline, scheduler):
    pipe = make_pipeline(scheduler)
    steps = list(pipe.denoise(batch_size=2, generator=seeded(8), num_inference_steps=6))
    chain = prepare_scheduler(pipe.scheduler, 6, None, "cpu").timesteps
    assert [float(step.t) for step in steps] == chain.tolist()
    assert all(step.x.shape == (2, 3, 8, 8) and not step.x.requires_grad for step in steps)
    called = images(pipe, batch_size=2, generator=seeded(8), num_inference_steps=6)
    assert torch.equal((steps[-1].x / 2 + 0.5).clamp(0, 1), called)


def test_predicted_image_of_the_last_step_is_the_result(tiny_pipeline):
    *_, last = tiny_pipeline.denoise(generator=seeded(0))
    torch.testing.assert_close(last.x_0, last.x, rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------------- eval mode


def test_dropout_is_off_while_sampling_and_modes_are_restored(make_pipeline):
    pipe = make_pipeline(dropout=0.5)
    expected = images(pipe, generator=seeded(0), num_inference_steps=4)
    pipe.unet.train()
    pipe.unet.conv_in.eval()  # a frozen part
    modes = [m.training for m in pipe.unet.modules()]
    assert torch.equal(images(pipe, generator=seeded(0), num_inference_steps=4), expected)
    assert [m.training for m in pipe.unet.modules()] == modes
    for _ in pipe.denoise(num_inference_steps=2):
        assert [m.training for m in pipe.unet.modules()] == modes


def test_modes_are_restored_when_a_step_fails(make_pipeline):
    pipe = make_pipeline(sample_size=None)
    pipe.unet.train()
    with pytest.raises(ValueError, match="multiples of 2"):
        pipe(latents=torch.randn(1, 3, 7, 7))
    assert all(m.training for m in pipe.unet.modules())


# ---------------------------------------------------------------------- compiled


def test_step_is_one_graph_that_is_compiled_once(make_pipeline):
    pipe = make_pipeline(num_class_embeds=4)
    mark_null_class(pipe.unet)
    options = {"seed": 0, "num_inference_steps": 5, "output_type": "pt", "class_labels": 1, "guidance_scale": 2.0}
    expected = pipe(2, **options).images
    counter = CompileCounter()
    pipe.compile(backend=counter)
    torch.testing.assert_close(pipe(2, **options).images, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(pipe(2, **options).images, expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


def test_network_is_one_graph_with_a_diffusers_scheduler(make_pipeline):
    pipe = make_pipeline(diffusers.DPMSolverMultistepScheduler(**SHORT))
    expected = pipe(2, seed=0, num_inference_steps=5, output_type="pt").images
    counter = CompileCounter()
    pipe.compile(backend=counter)
    torch.testing.assert_close(
        pipe(2, seed=0, num_inference_steps=5, output_type="pt").images, expected, rtol=0, atol=1e-4
    )
    assert counter.frame_count == 1


def test_compiled_and_eager_sampling_draw_the_same_numbers(tiny_pipeline):
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    tiny_pipeline(1, generators[0], 3)
    tiny_pipeline.compile(backend="eager")
    tiny_pipeline(1, generators[1], 3)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
