"""`DDPMPipelineCustom`: sampling, and folders that go in and out of stock diffusers."""

import copy
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, GaussianDiffusion, UNet2DModelCustom
from ddpm_hf.pipelines.arguments import prepare_scheduler

# Images in [0, 1] that should be the same up to the order in which float32 sums were taken.
ROUNDING = 1e-5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe, **kwargs) -> torch.Tensor:
    result = pipe(**{"output_type": "pt", **kwargs}).images
    inside = ((result > 0) & (result < 1)).float().mean()
    assert inside > 0.05  # an image that is all clamped would hide differences
    return result


def stock_unet(unet: UNet2DModelCustom) -> UNet2DModel:
    """Stock's class with the same configuration and weights."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_") and k != "zero_init_output"}
    stock = UNet2DModel(**config).eval()
    stock.load_state_dict(unet.state_dict())
    return stock


@torch.no_grad()
def plain_loop(unet: UNet2DModel, scheduler, steps: int, shape: tuple, seed: int) -> torch.Tensor:
    """Sampling as a person writes it out of diffusers' parts; the last x."""
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


SHORT = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
SCHEDULERS = {
    "DDPM of this package": DDPMSchedulerCustom(**SHORT),
    "DDPM": DDPMScheduler(**SHORT),
    "DDIM": DDIMScheduler(**SHORT),
    "DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler(**SHORT),
    "DPM-Solver++ 2M SDE": diffusers.DPMSolverMultistepScheduler(**SHORT, algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++ single step": diffusers.DPMSolverSinglestepScheduler(**SHORT),
    "UniPC": diffusers.UniPCMultistepScheduler(**SHORT),
    "Euler": diffusers.EulerDiscreteScheduler(**SHORT),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(**SHORT),
    "Heun": diffusers.HeunDiscreteScheduler(**SHORT),
    "PNDM": diffusers.PNDMScheduler(**SHORT),
    "LMS": diffusers.LMSDiscreteScheduler(**SHORT),
    "DEIS": diffusers.DEISMultistepScheduler(**SHORT),
    "KDPM2": diffusers.KDPM2DiscreteScheduler(**SHORT),
}
# Asked for T steps, these visit a timestep twice, and most of them divide by the difference of its noise levels.
BELOW_T = ("DPM-Solver++ 2M", "DPM-Solver++ 2M SDE", "DPM-Solver++ single step", "UniPC", "DEIS")
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


# ------------------------------------------------------------------ seeds


def test_the_same_seed_gives_the_same_images_and_another_gives_others(tiny_pipeline):
    first, again, other = (images(tiny_pipeline, batch_size=2, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.05


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler(**SHORT)], ids=["own", "stock"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_with_a_generator_each_an_image_does_not_depend_on_its_batch(make_pipeline, scheduler, kind):
    pipe = make_pipeline(scheduler)
    together = images(pipe, batch_size=3, generator=kind(seeded(s) for s in (5, 6, 7)))
    for i, seed in enumerate((5, 6, 7)):
        alone = images(pipe, batch_size=1, generator=kind([seeded(seed)]))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=ROUNDING)


def test_latents_given_are_the_noise_that_a_generator_would_have_drawn(tiny_pipeline):
    drawn = images(tiny_pipeline, batch_size=2, generator=seeded(3))
    generator = seeded(3)
    latents = torch.randn(2, 3, 8, 8, generator=generator)
    before = latents.clone()
    assert torch.equal(images(tiny_pipeline, batch_size=2, generator=generator, latents=latents), drawn)
    assert torch.equal(latents, before)


# ------------------------------------------------------------------ schedulers


@pytest.mark.parametrize("steps", [5, 19])
@each_scheduler
def test_every_scheduler_gives_what_a_plain_loop_with_stocks_network_gives(make_pipeline, name, steps):
    pipe = make_pipeline(SCHEDULERS[name])
    expected = plain_loop(stock_unet(pipe.unet), SCHEDULERS[name], steps, (2, 3, 8, 8), seed=4)
    *_, last = pipe.denoise(batch_size=2, generator=seeded(4), num_inference_steps=steps)
    assert expected.isfinite().all() and expected.std() > 0.1
    torch.testing.assert_close(last.x, expected, rtol=1e-4, atol=1e-4)


@each_scheduler
def test_the_chain_is_the_models_own_when_no_length_is_given(make_pipeline, name):
    pipe = make_pipeline(SCHEDULERS[name])
    if name in BELOW_T:
        with pytest.raises(ValueError, match="num_inference_steps=20"):
            pipe()
        return
    default, full = (images(pipe, generator=seeded(0), num_inference_steps=n) for n in (None, 20))
    assert torch.equal(default, full)


@each_scheduler
def test_sampling_leaves_the_scheduler_as_it_was(make_pipeline, name):
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


def test_training_goes_on_with_the_scheduler_after_sampling(tiny_pipeline):
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


def test_timesteps_given_are_the_chain(tiny_pipeline):
    chain = [19, 11, 4, 0]
    steps = list(tiny_pipeline.denoise(timesteps=chain, generator=seeded(0)))
    assert [step.t for step in steps] == chain
    assert torch.equal(images(tiny_pipeline, timesteps=chain, generator=seeded(0)), (steps[-1].x / 2 + 0.5).clamp(0, 1))


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("scheduler", [None, SCHEDULERS["DDIM"], SCHEDULERS["Heun"]], ids=["own", "DDIM", "Heun"])
def test_denoise_yields_every_step_and_ends_where_a_call_ends(make_pipeline, scheduler):
    pipe = make_pipeline(scheduler)
    steps = list(pipe.denoise(batch_size=2, generator=seeded(8), num_inference_steps=6))
    chain = prepare_scheduler(pipe.scheduler, 6, None, "cpu").timesteps
    assert [float(step.t) for step in steps] == chain.tolist()
    assert all(step.x.shape == (2, 3, 8, 8) and not step.x.requires_grad for step in steps)
    called = images(pipe, batch_size=2, generator=seeded(8), num_inference_steps=6)
    assert torch.equal((steps[-1].x / 2 + 0.5).clamp(0, 1), called)


def test_the_predicted_image_of_the_last_step_is_the_result(tiny_pipeline):
    *_, last = tiny_pipeline.denoise(generator=seeded(0))
    torch.testing.assert_close(last.x_0, last.x, rtol=0, atol=ROUNDING)


def test_a_callback_sees_every_step_and_may_replace_the_latents(tiny_pipeline):
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


def test_the_process_goes_on_from_what_a_callback_or_a_caller_put_in_its_place(make_pipeline):
    pipe = make_pipeline(SCHEDULERS["DDIM"])  # draws no noise on the way
    other = torch.randn(1, 3, 8, 8)

    def replace(pipe, i, t, tensors):
        return {"latents": other} if i == 9 else {}

    called = [images(pipe, generator=seeded(s), callback_on_step_end=replace) for s in (1, 2)]
    assert torch.equal(*called)
    assert not torch.allclose(called[0], images(pipe, generator=seeded(1)), atol=0.05)
    for i, step in enumerate(pipe.denoise(generator=seeded(3))):
        step.x = other if i == 9 else step.x
    assert torch.equal((step.x / 2 + 0.5).clamp(0, 1), called[0])


def test_dropout_is_off_while_sampling_and_every_module_is_put_back(make_pipeline):
    pipe = make_pipeline(dropout=0.5)
    expected = images(pipe, generator=seeded(0), num_inference_steps=4)
    pipe.unet.train()
    pipe.unet.conv_in.eval()  # a frozen part
    modes = [m.training for m in pipe.unet.modules()]
    assert torch.equal(images(pipe, generator=seeded(0), num_inference_steps=4), expected)
    assert [m.training for m in pipe.unet.modules()] == modes
    for _ in pipe.denoise(num_inference_steps=2):
        assert [m.training for m in pipe.unet.modules()] == modes


def test_modes_are_put_back_when_a_step_fails(make_pipeline):
    pipe = make_pipeline(sample_size=None)
    pipe.unet.train()
    with pytest.raises(ValueError, match="multiples of 2"):
        pipe(latents=torch.randn(1, 3, 7, 7))
    assert all(m.training for m in pipe.unet.modules())


# ------------------------------------------------------------------ output


@pytest.mark.parametrize(
    ("channels", "size", "mode"),
    [(1, 8, "L"), (3, 8, "RGB"), (4, 8, "RGBA"), (1, (8, 16), "L"), (3, (16, 8), "RGB"), (4, (8, 4), "RGBA")],
)
def test_the_three_outputs_are_one_image(make_pipeline, channels, size, mode):
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
def test_the_networks_dtype_changes_images_only_by_its_rounding(make_pipeline, dtype, scheduler):
    pipe = make_pipeline(scheduler)
    expected = images(pipe, batch_size=2, generator=seeded(0))
    pipe.to(dtype)
    assert pipe.unet.dtype == dtype
    for kind in ("pil", "np", "pt"):
        result = pipe(batch_size=2, generator=seeded(0), output_type=kind).images
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=max(ROUNDING, 10 * torch.finfo(dtype).eps))


# ------------------------------------------------------------------ files


@pytest.fixture
def stock_pipeline(unet_config) -> DDPMPipeline:
    return DDPMPipeline(UNet2DModel(**unet_config).eval(), DDPMScheduler(**SHORT))


def write_flat(stock: DDPMPipeline, folder, kind: str) -> None:
    """The layout of google/ddpm-*: everything in the root."""
    stock.unet.save_pretrained(folder, safe_serialization=kind == "safetensors")
    stock.scheduler.save_pretrained(folder)
    stock.save_config(folder)


@pytest.mark.parametrize("layout", ["nested", "nested bin", "flat safetensors", "flat bin"])
def test_a_stock_repository_loads_as_this_packages_classes(stock_pipeline, tmp_path, diffusers_log, layout):
    if layout.startswith("nested"):
        stock_pipeline.save_pretrained(tmp_path, safe_serialization=not layout.endswith("bin"))
    else:
        write_flat(stock_pipeline, tmp_path, layout.split()[1])
    assert bool(list(tmp_path.rglob("*.bin"))) == layout.endswith("bin")
    diffusers_log.clear()
    pipe = DDPMPipelineCustom.from_pretrained(str(tmp_path) if layout == "nested" else tmp_path)
    assert diffusers_log.messages == []
    assert type(pipe.unet) is UNet2DModelCustom and type(pipe.scheduler) is DDPMSchedulerCustom
    assert not pipe.unet.training
    for stock_part, part in ((stock_pipeline.unet, pipe.unet), (stock_pipeline.scheduler, pipe.scheduler)):
        public = {k: v for k, v in stock_part.config.items() if not k.startswith("_")}
        assert public.items() <= {k: tuple(v) if isinstance(v, list) else v for k, v in part.config.items()}.items()
    stock_pipeline.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    # Stock's tables are float32, with relative errors of up to 1e-3 in the posterior.
    expected = images(stock_pipeline, batch_size=2, generator=seeded(0), num_inference_steps=20)
    torch.testing.assert_close(images(pipe, batch_size=2, generator=seeded(0)), expected, rtol=0, atol=2e-3)


def test_another_scheduler_loads_as_it_was_saved(make_pipeline, tmp_path):
    make_pipeline(DDIMScheduler(**SHORT, clip_sample=False)).save_pretrained(tmp_path)
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDIMScheduler and loaded.scheduler.config.clip_sample is False


def test_parts_passed_in_take_the_place_of_saved_ones(make_pipeline, make_unet, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    unet, scheduler = make_unet(), DDIMScheduler()
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, unet=unet, scheduler=scheduler)
    assert loaded.unet is unet and loaded.scheduler is scheduler
    with pytest.raises(TypeError, match="torch_dtype"):
        DDPMPipelineCustom.from_pretrained(tmp_path, unet=unet, torch_dtype=torch.bfloat16)


def test_loading_options_reach_the_network(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    assert len(list(tmp_path.glob("unet/*.ema-*.safetensors"))) > 2 or list(tmp_path.glob("unet/*ema*.safetensors"))
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, variant="ema", torch_dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    assert torch.equal(loaded.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight.bfloat16())


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler(**SHORT)], ids=["own", "stock"])
@pytest.mark.parametrize("network", ["own", "stock"])
def test_a_save_holds_safetensors_and_json_that_name_stock_classes_alone(make_pipeline, tmp_path, scheduler, network):
    pipe = make_pipeline(scheduler)
    if network == "stock":
        pipe = DDPMPipelineCustom(stock_unet(pipe.unet), pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if name != "_diffusers_version"} == {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    for path in tmp_path.rglob("*.json"):
        assert "ddpm_hf" not in path.read_text() and "Custom" not in path.read_text()


def test_saved_twice_the_second_is_whole_and_names_no_path_of_this_machine(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "a", max_shard_size="20KB")
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "a")
    assert not any(str(tmp_path) in path.read_text() for path in tmp_path.rglob("*.json"))
    weights = load_file(tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors")
    again = DDPMPipelineCustom.from_pretrained(tmp_path / "a")
    assert all(torch.equal(weights[key], value) for key, value in again.unet.state_dict().items())


def test_weights_are_never_written_as_pickle(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        tiny_pipeline.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


STOCK_ALONE = """
import importlib.abc, json, logging, sys, warnings

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddpm_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import numpy, torch, diffusers

records = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: records.append(record.getMessage())
for name in ("", "diffusers"):
    logging.getLogger(name).addHandler(handler)
folder, seed, steps, batch, out = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pipe = diffusers.DDPMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(int(seed))
    images = pipe(int(batch), generator, int(steps), output_type="np").images
numpy.save(out, images)
print(json.dumps({
    "log": records,
    "warnings": [str(w.message) for w in caught],
    "classes": [type(part).__module__ for part in (pipe, pipe.unet, pipe.scheduler)],
    "blocked": "ddpm_hf" not in sys.modules,
}))
"""


def test_stock_diffusers_with_this_package_absent_gives_the_same_images(make_pipeline, tmp_path):
    pipe = make_pipeline(num_class_embeds=None, dropout=0.1)
    pipe.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "11", "20", "3", str(tmp_path / "images.npy")]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_ALONE, *arguments], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["blocked"] and report["log"] == [] and report["warnings"] == []
    assert all(module.startswith("diffusers.") for module in report["classes"])
    mine = images(pipe, batch_size=3, generator=seeded(11)).permute(0, 2, 3, 1).numpy()
    # Stock's float32 tables allow no more; other noise would differ by 0.1 and more.
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), mine, rtol=0, atol=2e-3)


def test_from_pipe_takes_a_stock_pipelines_parts(stock_pipeline, diffusers_log):
    mine = DDPMPipelineCustom.from_pipe(stock_pipeline)
    assert mine.unet is stock_pipeline.unet and mine.scheduler is stock_pipeline.scheduler
    assert not any("not switched over" in message for message in diffusers_log.messages)
    mine.set_progress_bar_config(disable=True)
    assert images(mine, num_inference_steps=2).shape == (1, 3, 8, 8)


def test_stocks_from_pipe_takes_this_packages_parts(tiny_pipeline):
    # Stock looks at the exact class of a network that it is not handed by name.
    stock = DDPMPipeline.from_pipe(tiny_pipeline, unet=tiny_pipeline.unet)
    assert stock.unet is tiny_pipeline.unet and stock.scheduler is tiny_pipeline.scheduler
    stock.set_progress_bar_config(disable=True)
    mine, theirs = (images(p, generator=seeded(0), num_inference_steps=20) for p in (tiny_pipeline, stock))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("given", "kind", "named"),
    [
        ({"batch_size": 0}, ValueError, ["batch_size", "0"]),
        ({"batch_size": True}, ValueError, ["batch_size", "True"]),
        ({"batch_size": 2.0}, ValueError, ["batch_size", "2.0"]),
        ({"output_type": "foo"}, ValueError, ["output_type", "foo", "'pil', 'np', 'pt'"]),
        ({"output_type": None}, ValueError, ["output_type", "None"]),
        ({"latents": torch.zeros(2, 3, 8, 8)}, ValueError, ["latents", "(1, 3, 8, 8)", "(2, 3, 8, 8)"]),
        ({"latents": torch.zeros(3, 8, 8)}, ValueError, ["latents", "(1, 3, 8, 8)", "(3, 8, 8)"]),
        ({"generator": [seeded(0)] * 2}, ValueError, ["generator", "1", "2"]),
        ({"batch_size": 2, "generator": [seeded(0)]}, ValueError, ["generator", "2", "1"]),
        ({"generator": 7}, TypeError, ["generator", "7"]),
        ({"num_inference_steps": 3, "timesteps": [5, 0]}, ValueError, ["num_inference_steps", "timesteps"]),
        ({"num_inference_steps": 0}, ValueError, ["num_inference_steps", "0"]),
        ({"num_inference_steps": 21}, ValueError, ["num_inference_steps", "1..20", "21"]),
        ({"num_inference_steps": 2.5}, ValueError, ["num_inference_steps", "2.5"]),
        ({"timesteps": [0, 5]}, ValueError, ["timesteps", "descending"]),
        ({"timesteps": [20, 5]}, ValueError, ["20"]),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, ValueError, ["callback_on_step_end_tensor_inputs", "x"]),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_by_name_before_the_first_step(tiny_pipeline, given, kind, named):
    ran = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(kind) as error:
        tiny_pipeline(**given)
    assert all(part in str(error.value) for part in named), error.value
    assert ran == []


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"generator": [seeded(0)] * 2}, {"num_inference_steps": 21}])
def test_denoise_refuses_when_called_not_when_first_iterated(tiny_pipeline, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        tiny_pipeline.denoise(**given)


@pytest.mark.parametrize(
    ("changes", "scheduler", "given", "named"),
    [
        ({"sample_size": None}, None, {}, ["sample_size", "latents"]),
        ({"in_channels": 2, "out_channels": 2}, None, {}, ["pil", "2"]),
        ({"out_channels": 6}, None, {}, ["variance_type", "fixed_small", "3 output channels", "6"]),
        ({"out_channels": 6}, SCHEDULERS["DDIM"], {}, ["3 output channels", "6"]),
        (
            {},
            DDPMSchedulerCustom(**SHORT, variance_type="learned_range"),
            {},
            ["learned_range", "6 output channels", "3"],
        ),
        ({}, SCHEDULERS["DDIM"], {"timesteps": [5, 0]}, ["DDIMScheduler", "timesteps"]),
        ({}, SCHEDULERS["DDIM"], {"num_inference_steps": 0}, ["num_inference_steps", "0"]),
    ],
)
def test_a_model_that_cannot_do_what_is_asked_says_so(make_pipeline, changes, scheduler, given, named):
    with pytest.raises(ValueError) as error:
        make_pipeline(scheduler, **changes)(**given)
    assert all(part in str(error.value) for part in named), error.value


def test_latents_give_the_size_that_a_configuration_leaves_open(make_pipeline):
    pipe = make_pipeline(sample_size=None)
    assert images(pipe, latents=torch.randn(1, 3, 4, 12), num_inference_steps=2).shape == (1, 3, 4, 12)


def test_a_missing_folder_a_bare_one_and_one_without_weights_are_named(tiny_pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DDPMPipelineCustom.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as error:
        DDPMPipelineCustom.from_pretrained("outputs/nowhere")  # could be a folder or a repository
    assert any("outputs/nowhere" in note for note in [str(error.value), *error.value.__notes__])
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        DDPMPipelineCustom.from_pretrained(tmp_path)
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        DDPMPipelineCustom.from_pretrained(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="unet/config.json"):
        DDPMPipelineCustom.from_pretrained(tmp_path)


def test_a_scheduler_that_nobody_knows_is_named(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "MyScheduler"}))
    with pytest.raises(ValueError, match="MyScheduler"):
        DDPMPipelineCustom.from_pretrained(tmp_path)


def test_the_progress_bar_counts_the_steps(tiny_pipeline, capfd):
    tiny_pipeline.set_progress_bar_config(disable=False)
    tiny_pipeline(num_inference_steps=4)
    assert "4/4" in capfd.readouterr().err
