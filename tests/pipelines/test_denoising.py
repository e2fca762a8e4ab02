"""Sampling step by step, samples that are not finite, eval mode, and compiled steps."""

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.pipelines.arguments import prepare_scheduler
from ddpm_hf.pipelines.denoising import NonFiniteSamples, RecordedSteps
from ddpm_hf.pipelines.guidance import mark_null_class
from tests.pipelines.helpers import ROUNDING, SCHEDULERS, SHORT, images, seeded, spoil
from tests.schedulers.test_ddpm import CopiesBetweenDevices

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


# ---------------------------------------------------------------------- samples that are not finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_error_names_the_step_and_the_image_that_became_nan(make_pipeline, is_compiled, output_type):
    pipe = make_pipeline()
    spoil(pipe.unet, NAN, from_timestep=7, images=(1,))
    if is_compiled:
        pipe.compile(backend="eager")
    message = r"in 1 of 3 images \(number 1 of the batch\), from step 13 of 20 on \(timestep 7\)\. Likely causes"
    with pytest.raises(ValueError, match=message):
        pipe(3, seed=0, output_type=output_type)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("scheduler", ["own", "DDIM", "Heun", "Euler"])
def test_infinite_values_are_found_with_every_kind_of_scheduler(make_pipeline, scheduler, value):
    unclipped = {**SHORT, "clip_sample": False}
    pipe = make_pipeline(DDPMSchedulerCustom(**unclipped) if scheduler == "own" else SCHEDULERS[scheduler])
    if scheduler == "DDIM":
        pipe.scheduler = diffusers.DDIMScheduler(**unclipped)
    timesteps = prepare_scheduler(pipe.scheduler, 6, None, "cpu").timesteps
    spoil(pipe.unet, value, from_timestep=timesteps[4])
    step = 1 + [t <= timesteps[4] for t in timesteps].index(True)
    message = f"in 2 of 2 images .*from step {step} of {len(timesteps)} on .timestep {float(timesteps[step - 1]):g}."
    with pytest.raises(NonFiniteSamples, match=message):
        pipe(2, seed=0, num_inference_steps=6)


def test_what_a_callback_leaves_is_what_counts(tiny_pipeline):
    def replace(values: dict[int, float]):
        return lambda pipe, i, t, tensors: {"latents": torch.full((1, 3, 8, 8), values[i])} if i in values else {}

    for output_type in ("pil", "np", "pt"):
        tiny_pipeline(output_type=output_type, callback_on_step_end=replace({2: NAN, 5: 0.5}))
    with pytest.raises(ValueError, match="from step 9 of 20 on"):
        tiny_pipeline(callback_on_step_end=replace({2: NAN, 5: 0.5, 8: INF}))
    with pytest.raises(ValueError, match="from step 20 of 20 on"):
        tiny_pipeline(callback_on_step_end=replace({19: -INF}))


def test_steps_may_be_inspected_though_they_are_not_finite(tiny_pipeline):
    spoil(tiny_pipeline.unet, NAN, from_timestep=7)
    finite = [bool(step.x.isfinite().all()) for step in tiny_pipeline.denoise(2, seed=0)]
    assert finite == [True] * 12 + [False] * 8


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_conversion_to_images_refuses_values_that_are_not_finite(tiny_pipeline, value):
    x = torch.zeros(12, 3, 8, 8)
    tiny_pipeline.to_images(x)
    x[4, 2, 7, 7] = value
    with pytest.raises(ValueError, match=r"in 1 of 12 images \(number 4 of the batch\)\. Likely"):
        tiny_pipeline.to_images(x)
    x[:11, 0] = value
    with pytest.raises(ValueError, match=r"in 11 of 12 images \(number 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. of"):
        tiny_pipeline.to_images(x, "np")


def test_recording_steps_on_a_device_reads_nothing_from_it():
    """On the meta device, where tensors have no values."""
    recorded = RecordedSteps()
    with CopiesBetweenDevices() as copies:
        for t in range(5):
            recorded.add(t, torch.empty(2, 3, 8, 8, device="meta"))
    assert copies.seen == []


def test_values_read_by_a_call_do_not_depend_on_the_steps(tiny_pipeline):
    seen = []
    for timesteps in ([19, 9], range(19, 0, -1)):
        with CopiesBetweenDevices() as copies:
            tiny_pipeline(2, seed=0, timesteps=list(timesteps))
        seen.append(copies.seen)
    assert seen[0] == seen[1]


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
