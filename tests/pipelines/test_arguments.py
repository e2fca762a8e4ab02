"""Arguments that do not fit are refused by name before the first step."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.schedulers.samplers import make_sampler
from tests.pipelines.helpers import SCHEDULERS, SHORT, images, seeded


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
def test_wrong_arguments_are_refused_by_name_before_the_first_step(tiny_pipeline, given, kind, named):
    ran = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(kind) as error:
        tiny_pipeline(**given)
    assert all(part in str(error.value) for part in named), error.value
    assert ran == []


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
def test_wrong_seeds_and_eta_are_refused_by_name(tiny_pipeline, given, named):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=named):
        tiny_pipeline(**given)


@pytest.mark.parametrize("method", ["__call__", "denoise", "check_inputs"])
def test_unknown_keyword_is_refused_by_name_before_the_first_step(tiny_pipeline, method):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(TypeError, match="sead"):
        getattr(tiny_pipeline, method)(2, sead=0)


def test_check_inputs_raises_what_a_call_raises_and_samples_nothing(tiny_pipeline):
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    generator = seeded(0)
    before = generator.get_state(), tiny_pipeline.scheduler.timesteps
    assert tiny_pipeline.check_inputs(2, generator, 5, output_type="np", guidance_scale=1.0) is None
    assert torch.equal(generator.get_state(), before[0]) and torch.equal(tiny_pipeline.scheduler.timesteps, before[1])
    for given in ({"output_type": "jpeg"}, {"num_inference_steps": 21}, {"class_labels": 1}, {"eta": 0.5}):
        with pytest.raises(ValueError, match=next(iter(given))) as checked:
            tiny_pipeline.check_inputs(**given)
        with pytest.raises(ValueError) as called:
            tiny_pipeline(**given)
        assert str(checked.value) == str(called.value)


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"generator": [seeded(0)] * 2}, {"num_inference_steps": 21}])
def test_denoise_raises_when_called_not_when_first_iterated(tiny_pipeline, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        tiny_pipeline.denoise(**given)


@pytest.mark.parametrize(
    ("changes", "scheduler", "given", "named"),
    [
        ({"sample_size": None}, None, {}, ["sample_size", "latents"]),
        ({"in_channels": 2, "out_channels": 2}, None, {}, ["pil", "2"]),
        ({"out_channels": 6}, None, {}, ["variance_type", "fixed_small", "3 output channels", "6"]),
        ({"out_channels": 5}, SCHEDULERS["DDIM"], {}, ["3 or 6 output channels", "5"]),
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
def test_arguments_that_the_model_does_not_support_are_refused(make_pipeline, changes, scheduler, given, named):
    with pytest.raises(ValueError) as error:
        make_pipeline(scheduler, **changes)(**given)
    assert all(part in str(error.value) for part in named), error.value


def test_number_of_steps_that_is_wrong_is_refused_before_the_first_step(tiny_pipeline):
    tiny_pipeline.scheduler = make_sampler("pndm", tiny_pipeline.scheduler)
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    for call in (tiny_pipeline, tiny_pipeline.check_inputs):
        with pytest.raises(
            ValueError, match="num_inference_steps=7 does not work with PNDMScheduler.*Use 5 or 10 steps"
        ):
            call(num_inference_steps=7)


def test_scheduler_of_another_process_is_refused(tiny_pipeline):
    euler = diffusers.FlowMatchEulerDiscreteScheduler(20)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot sample from a DDPM"):
        DDPMPipelineCustom(tiny_pipeline.unet, euler)
    tiny_pipeline.scheduler = euler
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot sample from a DDPM"):
        tiny_pipeline()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_network_that_needs_more_than_x_t_and_t_is_refused(tiny_pipeline, is_compiled):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet = torch.compile(unet, backend="eager") if is_compiled else unet
    with pytest.raises(ValueError, match=r"UNet2DConditionModel needs \['encoder_hidden_states'\] too"):
        DDPMPipelineCustom(unet, tiny_pipeline.scheduler)


@pytest.mark.parametrize("options", [{}, {"beta_schedule": "scaled_linear"}, {"trained_betas": [0.3] * 20}])
def test_scheduler_with_other_betas_is_refused_before_the_first_step(tiny_pipeline, options):
    tiny_pipeline.scheduler = DDIMScheduler(20, **options)
    with pytest.raises(ValueError, match="DDIMScheduler has other betas than the model was trained with.*from_config"):
        tiny_pipeline(num_inference_steps=5)
    # A new pipeline takes the scheduler's word for it.
    assert images(DDPMPipelineCustom(tiny_pipeline.unet, tiny_pipeline.scheduler), num_inference_steps=5).shape[0] == 1


@pytest.mark.parametrize("steps", [5, np.int64(5), np.int32(5)])
def test_numbers_of_numpy_are_numbers(tiny_pipeline, steps):
    two = tiny_pipeline(
        np.int64(2), seed=np.int64(3), num_inference_steps=steps, first_index=np.int8(1), output_type="pt"
    )
    expected = tiny_pipeline(2, seed=3, num_inference_steps=5, first_index=1, output_type="pt")
    assert torch.equal(two.images, expected.images)


def test_latents_give_the_size_when_the_configuration_has_none(make_pipeline):
    pipe = make_pipeline(sample_size=None)
    assert images(pipe, latents=torch.randn(1, 3, 4, 12), num_inference_steps=2).shape == (1, 3, 4, 12)


def test_scheduler_with_another_T_is_refused_before_the_first_step(tiny_pipeline, make_unet, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    swapped = DDPMPipelineCustom.from_pretrained(tmp_path)
    swapped.scheduler = DDIMScheduler()
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path, scheduler=DDIMScheduler())
    told = DDPMPipelineCustom(make_unet(time_embedding_type="learned", num_train_timesteps=20), DDIMScheduler())
    for pipe in (swapped, loaded, told):
        pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
        with pytest.raises(ValueError, match="DDIMScheduler.*num_train_timesteps=1000.*trained on 20"):
            pipe(num_inference_steps=5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_scheduler_made_from_the_models_own_has_its_T(tiny_pipeline, name):
    tiny_pipeline.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config)
    assert tiny_pipeline(num_inference_steps=5, output_type="np").images.shape == (1, 8, 8, 3)


def test_exchanged_parts_and_classes_are_refused_by_name(tiny_pipeline):
    unet, scheduler = tiny_pipeline.unet, tiny_pipeline.scheduler
    for given, message in [
        ((scheduler, unet), "unet must be a network such as a UNet2DModelCustom, got a DDPMSchedulerCustom"),
        ((unet, unet), "scheduler must be one of this package or of diffusers, got a UNet2DModelCustom"),
        ((type(unet), scheduler), "unet must be .* got the class UNet2DModelCustom"),
        ((unet, type(scheduler)), "scheduler must be .* got the class DDPMSchedulerCustom"),
        ((torch.nn.Linear(2, 2), scheduler), "unet must be .* got a Linear"),
        ((None, scheduler), "unet must be .* got a NoneType"),
    ]:
        with pytest.raises(TypeError, match=message):
            DDPMPipelineCustom(*given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused_before_the_first_step(tiny_pipeline, bad):
    latents, ran = torch.zeros(1, 3, 8, 8), []
    latents[0, 1, 2, 3] = bad
    tiny_pipeline.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="latents must be finite, got NaN or infinite values"):
        tiny_pipeline(latents=latents)
    assert ran == []


@pytest.mark.parametrize(
    "returned, message",
    [
        (
            {"latents": torch.zeros(1, 3, 4, 4)},
            r"latents that callback_on_step_end returns must have shape \(1, 3, 8, 8\), got",
        ),
        ({"latents": torch.zeros(3, 8, 8)}, "must have shape"),
        ({"latents": torch.zeros(1, 3, 8, 8, dtype=torch.int64)}, "must be a floating-point tensor"),
        ({"latents": None}, "must be a floating-point tensor, got a NoneType"),
        ({"x": torch.zeros(1, 3, 8, 8)}, r"callback_on_step_end must return None or \{'latents': x\}"),
        (torch.zeros(1, 3, 8, 8), "callback_on_step_end must return None"),
        (False, "callback_on_step_end must return None or .* got False"),
    ],
)
def test_what_a_callback_may_not_return_is_refused_after_one_step(tiny_pipeline, returned, message):
    called = []
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(callback_on_step_end=lambda *_: called.append(1) or returned)
    assert called == [1]


@pytest.mark.parametrize(
    "given",
    [{"callback_on_step_end": 5}, {"callback_on_step_end_tensor_inputs": "latents"},
     {"callback_on_step_end_tensor_inputs": None}],
)  # fmt: skip
def test_a_callback_that_is_no_function_is_refused_by_name(tiny_pipeline, given):
    with pytest.raises(TypeError, match=f"^{next(iter(given))} must be"):
        tiny_pipeline(**given)


def test_an_iterator_refuses_an_x_of_another_shape(tiny_pipeline):
    steps = tiny_pipeline.denoise(num_inference_steps=3)
    next(steps).x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="x of a DenoisingStep must have shape"):
        next(steps)
