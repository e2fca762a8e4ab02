"""`DDPMPipelineCustom`: seeds, schedulers, callbacks, outputs and devices."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm_hf import DDIMSchedulerCustom, DDPMPipelineCustom, DDPMSchedulerCustom, GaussianDiffusion
from ddpm_hf.schedulers.samplers import SAMPLERS, as_ddpm, make_sampler
from ddpm_hf.seeds import image_generators
from tests.gaussian_unet import MEAN, STD, gaussian_pipeline
from tests.pipelines.helpers import ROUNDING, SCHEDULERS, SHORT, images, seeded, stock_unet


@torch.no_grad()
def plain_loop(unet: UNet2DModel, scheduler, steps: int, shape: tuple, seed: int) -> torch.Tensor:
    """A sampling loop written with diffusers alone; returns the last x."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    generator = seeded(seed)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(x, t), t).sample
        try:
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        except TypeError:
            x = scheduler.step(output, t, x).prev_sample
    return x


# With T steps these visit a timestep twice, and most of them divide by the difference of the two noise levels.
BELOW_T = ("DPM-Solver++ 2M", "DPM-Solver++ 2M SDE", "DPM-Solver++ single step", "UniPC", "DEIS")


each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


# ---------------------------------------------------------------------- seeds


def test_images_are_determined_by_the_seed(tiny_pipeline):
    first, again, other = (images(tiny_pipeline, batch_size=2, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.05


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler(**SHORT)], ids=["own", "stock"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_images_with_their_own_generators_do_not_depend_on_the_batch(make_pipeline, scheduler, kind):
    pipe = make_pipeline(scheduler)
    together = images(pipe, batch_size=3, generator=kind(seeded(s) for s in (5, 6, 7)))
    for i, seed in enumerate((5, 6, 7)):
        alone = images(pipe, batch_size=1, generator=kind([seeded(seed)]))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=ROUNDING)


def test_latents_replace_the_noise_that_the_generator_would_draw(tiny_pipeline):
    drawn = images(tiny_pipeline, batch_size=2, generator=seeded(3))
    generator = seeded(3)
    latents = torch.randn(2, 3, 8, 8, generator=generator)
    before = latents.clone()
    assert torch.equal(images(tiny_pipeline, batch_size=2, generator=generator, latents=latents), drawn)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++sde", "unipc"])
def test_image_i_of_a_seed_is_the_same_in_any_batch(make_pipeline, name):
    pipe = make_pipeline()
    pipe.scheduler = make_sampler(name, pipe.scheduler)
    options = {"num_inference_steps": 5, "output_type": "pt"}
    together = pipe(5, seed=7, **options).images
    parts = [pipe(n, seed=7, first_index=i, **options).images for i, n in ((0, 2), (2, 1), (3, 2))]
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=ROUNDING)
    assert (pipe(5, seed=8, **options).images - together).abs().amax((1, 2, 3)).min() > 0.01


def test_seeds_give_image_0_of_each_seed(tiny_pipeline):
    images = tiny_pipeline(seeds=[4, 9, 4], output_type="pt").images
    assert images.shape[0] == 3 and (images[0] - images[1]).abs().mean() > 0.01
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=ROUNDING)
    for k, seed in enumerate((4, 9, 4)):
        torch.testing.assert_close(
            tiny_pipeline(seed=seed, output_type="pt").images[0], images[k], rtol=0, atol=ROUNDING
        )
    *_, last = tiny_pipeline.denoise(3, seeds=np.array([4, 9, 4]))
    assert torch.equal((last.x / 2 + 0.5).clamp(0, 1), images)


def test_seed_equals_its_image_generators(tiny_pipeline):
    by_seed = tiny_pipeline(2, seed=3, first_index=10, output_type="np").images
    assert np.array_equal(tiny_pipeline(2, image_generators(3, [10, 11]), output_type="np").images, by_seed)


# ---------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("steps", [5, 19])
@each_scheduler
def test_every_scheduler_matches_a_plain_diffusers_loop(make_pipeline, name, steps):
    pipe = make_pipeline(SCHEDULERS[name])
    expected = plain_loop(stock_unet(pipe.unet), SCHEDULERS[name], steps, (2, 3, 8, 8), seed=4)
    *_, last = pipe.denoise(batch_size=2, generator=seeded(4), num_inference_steps=steps)
    assert expected.isfinite().all() and expected.std() > 0.1
    # Float32 rounding, which the few steps of Heun amplify.
    torch.testing.assert_close(last.x, expected, rtol=1e-3, atol=1e-3)


@each_scheduler
def test_number_of_steps_defaults_to_the_models_own_T(make_pipeline, name):
    pipe = make_pipeline(SCHEDULERS[name])
    if name in BELOW_T:
        with pytest.raises(ValueError, match="num_inference_steps=20"):
            pipe()
        return
    default, full = (images(pipe, generator=seeded(0), num_inference_steps=n) for n in (None, 20))
    assert torch.equal(default, full)


@each_scheduler
def test_sampling_does_not_change_the_scheduler(make_pipeline, name):
    before = SCHEDULERS[name]
    pipe = make_pipeline(copy.deepcopy(before))
    images(pipe, num_inference_steps=5)
    assert pipe.scheduler.__dict__.keys() == before.__dict__.keys()
    for key, value in before.__dict__.items():
        now = pipe.scheduler.__dict__[key]
        if isinstance(value, (torch.Tensor, np.ndarray)):
            assert np.array_equal(now, value, equal_nan=True), key
        elif not isinstance(value, GaussianDiffusion):  # compared by what it computes, below
            assert now == value, key


def test_scheduler_can_be_used_for_training_after_sampling(tiny_pipeline):
    scheduler = tiny_pipeline.scheduler
    x, noise, t = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([0, 7, 19])
    calls = (
        lambda: scheduler.add_noise(x, noise, t),
        lambda: scheduler.get_velocity(x, noise, t),
        lambda: scheduler.step(noise, t, x, generator=seeded(1)).prev_sample,  # 7 is not on the chain of 3
    )
    before = [call() for call in calls]
    images(tiny_pipeline, num_inference_steps=3)
    assert all(torch.equal(call(), then) for call, then in zip(calls, before, strict=True))


def test_given_timesteps_are_the_ones_visited(tiny_pipeline):
    chain = [19, 11, 4, 0]
    steps = list(tiny_pipeline.denoise(timesteps=chain, generator=seeded(0)))
    assert [step.t for step in steps] == chain
    assert torch.equal(images(tiny_pipeline, timesteps=chain, generator=seeded(0)), (steps[-1].x / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_gaussian_data_its_moments(name):
    """200 steps of T = 1000 with the exact network. The bounds are measured: the largest error is that of ancestral
    sampling, a standard deviation of 0.185 instead of 0.2, and decreases with more steps."""
    pipe = gaussian_pipeline()
    pipe.scheduler = make_sampler(name, pipe.scheduler)
    *_, last = pipe.denoise(4, seed=0, num_inference_steps=200)
    assert last.x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert last.x.std().item() == pytest.approx(STD, rel=0.09)


def test_samplers_share_the_betas_of_the_models_scheduler(scheduler_config):
    own = DDPMSchedulerCustom(**scheduler_config)
    assert make_sampler("ddpm", own) is own
    for name in SAMPLERS:
        made = make_sampler(name, own)
        assert made.config.num_train_timesteps == 20 and made.config.prediction_type == "v_prediction"
        back = as_ddpm(made).diffusion.betas
        torch.testing.assert_close(back, own.diffusion.betas)
    with pytest.raises(ValueError, match="dpmsolver"):
        make_sampler("dpm", own)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMSchedulerCustom])
def test_eta_reaches_ddim(make_pipeline, cls):
    """With η = 1 and fixed_small, DDIM is DDPM (Song et al. 2021, section 4.1)."""
    config = {**SHORT, "clip_sample": False, "timestep_spacing": "trailing"}
    tiny = make_pipeline(cls(**config))
    by = {eta: tiny(2, seed=0, num_inference_steps=10, eta=eta, output_type="pt").images for eta in (None, 0.0, 1.0)}
    assert torch.equal(by[None], by[0.0])
    pipe = gaussian_pipeline(cls(clip_sample=False, timestep_spacing="trailing"))
    *_, ddim = pipe.denoise(2, seed=0, num_inference_steps=20, eta=1.0)
    pipe.scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    *_, ddpm = pipe.denoise(2, seed=0, num_inference_steps=20)
    torch.testing.assert_close(ddim.x, ddpm.x, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_a_network_with_a_learned_variance(make_pipeline, name):
    """Only ancestral sampling uses it; for the others the result is that of the network without these channels."""
    learned = make_pipeline(DDPMSchedulerCustom(**SHORT, variance_type="learned_range"), out_channels=6)
    learned.scheduler = make_sampler(name, learned.scheduler)
    result = images(learned, batch_size=2, seed=0, num_inference_steps=20)
    if name != "ddpm":
        plain = make_pipeline(DDPMSchedulerCustom(**SHORT), out_channels=3)
        weights = learned.unet.state_dict()
        for key in ("conv_out.weight", "conv_out.bias"):
            weights[key] = weights[key][:3]
        plain.unet.load_state_dict(weights)
        plain.scheduler = make_sampler(name, plain.scheduler)
        expected = images(plain, batch_size=2, seed=0, num_inference_steps=20)
        torch.testing.assert_close(result, expected, rtol=0, atol=ROUNDING)


# ---------------------------------------------------------------------- callbacks


def test_callback_sees_every_step_and_may_replace_the_latents(tiny_pipeline):
    seen = []

    def halve(pipe, i, t, tensors):
        assert pipe is tiny_pipeline
        seen.append((i, t, tensors["latents"].clone()))
        return {"latents": tensors["latents"] / 2}

    called = images(tiny_pipeline, generator=seeded(2), callback_on_step_end=halve)
    steps = []
    for step in tiny_pipeline.denoise(generator=seeded(2)):
        steps.append(step.x)
        step.x = step.x / 2
    assert [(i, t) for i, t, _ in seen] == [(i, 19 - i) for i in range(20)]
    assert all(torch.equal(x, y) for (_, _, x), y in zip(seen, steps, strict=True))
    assert torch.equal(called, (steps[-1] / 2 / 2 + 0.5).clamp(0, 1))
    untouched = images(tiny_pipeline, generator=seeded(2), callback_on_step_end=lambda *_: None)
    assert torch.equal(untouched, images(tiny_pipeline, generator=seeded(2)))
    assert not torch.allclose(untouched, called, atol=0.05)


def test_next_step_starts_from_replaced_latents(make_pipeline):
    pipe = make_pipeline(SCHEDULERS["DDIM"])  # draws no noise during sampling
    other = torch.randn(1, 3, 8, 8)

    def replace(pipe, i, t, tensors):
        return {"latents": other} if i == 9 else {}

    called = [images(pipe, generator=seeded(s), callback_on_step_end=replace) for s in (1, 2)]
    assert torch.equal(*called)
    assert not torch.allclose(called[0], images(pipe, generator=seeded(1)), atol=0.05)
    for i, step in enumerate(pipe.denoise(generator=seeded(3))):
        step.x = other if i == 9 else step.x
    assert torch.equal((step.x / 2 + 0.5).clamp(0, 1), called[0])


def test_progress_bar_counts_the_steps(tiny_pipeline, capfd):
    tiny_pipeline.set_progress_bar_config(disable=False)
    tiny_pipeline(num_inference_steps=4)
    assert "4/4" in capfd.readouterr().err


# ---------------------------------------------------------------------- output


@pytest.mark.parametrize(
    ("channels", "size", "mode"),
    [(1, 8, "L"), (3, 8, "RGB"), (4, 8, "RGBA"), (1, (8, 16), "L"), (3, (16, 8), "RGB"), (4, (8, 4), "RGBA")],
)
def test_all_output_types_hold_the_same_image(make_pipeline, channels, size, mode):
    pipe = make_pipeline(in_channels=channels, out_channels=channels, sample_size=size)
    pt, array, pil = (pipe(2, seeded(0), 3, output_type=kind).images for kind in ("pt", "np", "pil"))
    height, width = size if isinstance(size, tuple) else (size, size)
    assert pt.shape == (2, channels, height, width) and array.shape == (2, height, width, channels)
    assert array.min() >= 0 and array.max() <= 1
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    for image, expected in zip(pil, array, strict=True):
        assert isinstance(image, Image.Image) and image.mode == mode and image.size == (width, height)
        assert np.array_equal(np.asarray(image).reshape(expected.shape), (expected * 255).round().astype(np.uint8))


def test_without_return_dict_the_result_is_a_tuple(tiny_pipeline):
    (result,) = tiny_pipeline(1, seeded(0), 2, "pt", False)
    assert torch.equal(result, images(tiny_pipeline, generator=seeded(0), num_inference_steps=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheduler", [None, SCHEDULERS["DDIM"]], ids=["own", "DDIM"])
def test_dtype_of_the_network_changes_images_only_by_rounding(make_pipeline, dtype, scheduler):
    pipe = make_pipeline(scheduler)
    expected = images(pipe, batch_size=2, generator=seeded(0))
    pipe.to(dtype)
    assert pipe.unet.dtype == dtype
    for kind in ("pil", "np", "pt"):
        result = pipe(batch_size=2, generator=seeded(0), output_type=kind).images
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=max(ROUNDING, 10 * torch.finfo(dtype).eps))


def test_samples_stay_float32_when_the_network_has_another_dtype(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    moved = tiny_pipeline.to(torch.bfloat16)
    for pipe in (loaded, moved):
        pipe.set_progress_bar_config(disable=True)
        *_, last = pipe.denoise(1, seed=0, num_inference_steps=2)
        assert pipe.unet.dtype == torch.bfloat16 and last.x.dtype == torch.float32
        assert pipe(1, num_inference_steps=2)[0][0].size == (8, 8)


def test_offloading_does_not_change_the_images(make_pipeline, tmp_path):
    """Offloading to the CPU uses the same hooks and needs no accelerator."""
    pipe = make_pipeline()
    expected = pipe(2, seed=0, output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(2, seed=0, output_type="pt").images, expected)
    assert pipe.unet.device.type == "cpu"
