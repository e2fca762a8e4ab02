"""Seeds that address images, samplers that are right about Gaussian data, the step as one graph, offloading."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch._dynamo.testing import CompileCounter

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import mark_null_class
from ddpm_hf.schedulers.samplers import SAMPLERS, make_sampler
from ddpm_hf.seeds import image_generators
from tests.gaussian_unet import MEAN, STD, gaussian_pipeline

ROUNDING = 1e-5
SHORT = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}

# ------------------------------------------------------------------ seeds


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++sde", "unipc"])
def test_image_i_of_a_seed_is_the_same_in_any_batch(make_pipeline, name):
    pipe = make_pipeline()
    pipe.scheduler = make_sampler(name, pipe.scheduler)
    options = {"num_inference_steps": 5, "output_type": "pt"}
    together = pipe(5, seed=7, **options).images
    parts = [pipe(n, seed=7, first_index=i, **options).images for i, n in ((0, 2), (2, 1), (3, 2))]
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=ROUNDING)
    assert (pipe(5, seed=8, **options).images - together).abs().amax((1, 2, 3)).min() > 0.01


def test_seeds_are_one_image_each_the_first_of_its_seed(tiny_pipeline):
    images = tiny_pipeline(seeds=[4, 9, 4], output_type="pt").images
    assert images.shape[0] == 3 and (images[0] - images[1]).abs().mean() > 0.01
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=ROUNDING)
    for k, seed in enumerate((4, 9, 4)):
        torch.testing.assert_close(
            tiny_pipeline(seed=seed, output_type="pt").images[0], images[k], rtol=0, atol=ROUNDING
        )
    *_, last = tiny_pipeline.denoise(3, seeds=np.array([4, 9, 4]))
    assert torch.equal((last.x / 2 + 0.5).clamp(0, 1), images)


def test_a_seed_is_what_its_generators_give(tiny_pipeline):
    by_seed = tiny_pipeline(2, seed=3, first_index=10, output_type="np").images
    assert np.array_equal(tiny_pipeline(2, image_generators(3, [10, 11]), output_type="np").images, by_seed)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, -1]}, "seeds.*-1"),
        ({"seeds": [1.5]}, "seeds.*1.5"),
        ({"seeds": 3}, "seeds.*3"),
        ({"seed": -1}, "seed.*-1"),
        ({"seed": True}, "seed.*True"),
        ({"seed": 1, "first_index": -1}, "first_index.*-1"),
        ({"first_index": 2}, "first_index=2.*seed"),
        ({"seed": 1, "seeds": [1]}, "seeds and seed"),
        ({"seed": 1, "generator": torch.Generator()}, "generator and seed"),
        ({"seeds": [1, 2, 3], "batch_size": 2}, "batch_size=2 and seeds of 3"),
        ({"eta": 0.5}, "eta=0.5.*DDPMSchedulerCustom"),
        ({"eta": -1.0}, "eta.*-1.0"),
    ],
)
def test_seeds_and_eta_that_do_not_fit_are_refused_by_name(tiny_pipeline, given, named):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=named):
        tiny_pipeline(**given)


# ------------------------------------------------------------------ samplers


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_gives_gaussian_data_its_moments(name):
    """200 steps of T = 1000 with the exact network. The bounds are set by measurement: ancestral sampling, the farthest
    off, has 0.185 for a spread of 0.2 there, and comes nearer with more steps."""
    pipe = gaussian_pipeline()
    pipe.scheduler = make_sampler(name, pipe.scheduler)
    *_, last = pipe.denoise(4, seed=0, num_inference_steps=200)
    assert last.x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert last.x.std().item() == pytest.approx(STD, rel=0.09)


def test_eta_reaches_ddim(make_pipeline):
    """With η = 1 and fixed_small, DDIM is DDPM (Song et al. 2021, section 4.1)."""
    config = {**SHORT, "clip_sample": False, "timestep_spacing": "trailing"}
    tiny = make_pipeline(DDIMScheduler(**config))
    by = {eta: tiny(2, seed=0, num_inference_steps=10, eta=eta, output_type="pt").images for eta in (None, 0.0, 1.0)}
    assert torch.equal(by[None], by[0.0])
    pipe = gaussian_pipeline(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    *_, ddim = pipe.denoise(2, seed=0, num_inference_steps=20, eta=1.0)
    pipe.scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    *_, ddpm = pipe.denoise(2, seed=0, num_inference_steps=20)
    torch.testing.assert_close(ddim.x, ddpm.x, rtol=0, atol=2e-3)


def test_a_step_count_whose_spacing_runs_below_zero_is_refused():
    """diffusers' trailing spacing of 61 steps gives 62, the last one −1 (docs of the scheduler's peer defects)."""
    pipe = gaussian_pipeline(DDIMScheduler(timestep_spacing="trailing"))
    with pytest.raises(ValueError, match="num_inference_steps=61.*-1"):
        pipe(num_inference_steps=61)


# ------------------------------------------------------------------ compiled


def test_the_whole_step_is_one_graph_that_is_compiled_once(make_pipeline):
    pipe = make_pipeline(num_class_embeds=4)
    mark_null_class(pipe.unet)
    options = {"seed": 0, "num_inference_steps": 5, "output_type": "pt", "class_labels": 1, "guidance_scale": 2.0}
    expected = pipe(2, **options).images
    counter = CompileCounter()
    pipe.compile(backend=counter)
    torch.testing.assert_close(pipe(2, **options).images, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(pipe(2, **options).images, expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


def test_with_a_scheduler_of_diffusers_the_network_is_one_graph(make_pipeline):
    pipe = make_pipeline(diffusers.DPMSolverMultistepScheduler(**SHORT))
    expected = pipe(2, seed=0, num_inference_steps=5, output_type="pt").images
    counter = CompileCounter()
    pipe.compile(backend=counter)
    torch.testing.assert_close(
        pipe(2, seed=0, num_inference_steps=5, output_type="pt").images, expected, rtol=0, atol=1e-4
    )
    assert counter.frame_count == 1


def test_compiled_and_eager_chains_leave_a_generator_alike(tiny_pipeline):
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    tiny_pipeline(1, generators[0], 3)
    tiny_pipeline.compile(backend="eager")
    tiny_pipeline(1, generators[1], 3)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


# ------------------------------------------------------------------ devices


def test_with_offloading_the_images_are_the_same(make_pipeline, tmp_path):
    """There is no accelerator everywhere: offloaded "to" the CPU, the hooks are the same."""
    pipe = make_pipeline()
    expected = pipe(2, seed=0, output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(2, seed=0, output_type="pt").images, expected)
    assert pipe.unet.device.type == "cpu"


def test_a_dtype_given_when_loading_or_moving_is_the_networks_and_samples_stay_float32(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    moved = tiny_pipeline.to(torch.bfloat16)
    for pipe in (loaded, moved):
        pipe.set_progress_bar_config(disable=True)
        *_, last = pipe.denoise(1, seed=0, num_inference_steps=2)
        assert pipe.unet.dtype == torch.bfloat16 and last.x.dtype == torch.float32
        assert pipe(1, num_inference_steps=2)[0][0].size == (8, 8)
