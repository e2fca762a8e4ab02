"""Class labels, the null class and classifier-free guidance."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.pipelines.guidance import Denoiser, cycled_labels, mark_null_class, null_class_of
from tests.pipelines.helpers import ROUNDING

OPTIONS = {"num_inference_steps": 4, "output_type": "pt"}


@pytest.fixture
def conditional(make_pipeline) -> DDPMPipelineCustom:
    """A pipeline with three classes and a null class, the last label."""
    pipe = make_pipeline(num_class_embeds=4)
    torch.nn.init.normal_(pipe.unet.class_embedding.weight, std=3)
    mark_null_class(pipe.unet)
    return pipe


def test_labels_change_images_and_one_label_applies_to_all(conditional):
    one = conditional(2, seed=0, class_labels=1, **OPTIONS).images
    assert torch.equal(one, conditional(2, seed=0, class_labels=[1, 1], **OPTIONS).images)
    assert torch.equal(one, conditional(2, seed=0, class_labels=torch.tensor([1, 1]), **OPTIONS).images)
    mixed = conditional(2, seed=0, class_labels=[1, 2], **OPTIONS).images
    torch.testing.assert_close(mixed[0], one[0], rtol=0, atol=ROUNDING)
    assert (mixed[1] - one[1]).abs().mean() > 1e-3


def test_guidance_scale_1_is_none_and_0_is_the_null_class(conditional):
    plain = conditional(2, seed=0, class_labels=1, **OPTIONS).images
    assert torch.equal(conditional(2, seed=0, class_labels=1, guidance_scale=1, **OPTIONS).images, plain)
    null = conditional(2, seed=0, class_labels=3, **OPTIONS).images
    guided = {w: conditional(2, seed=0, class_labels=1, guidance_scale=w, **OPTIONS).images for w in (0, 1 + 1e-6, 4)}
    torch.testing.assert_close(guided[0], null, rtol=0, atol=1e-4)
    torch.testing.assert_close(guided[1 + 1e-6], plain, rtol=0, atol=1e-4)
    assert (guided[4] - plain).abs().mean() > 1e-3


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_guidance_matches_equation_6_for_every_prediction_type(conditional, kind):
    """Ho and Salimans 2022, equation 6, whatever the network predicts."""
    diffusion = DDPMSchedulerCustom(beta_schedule="squaredcos_cap_v2", num_train_timesteps=20, prediction_type=kind)
    diffusion, x, t, w = diffusion.diffusion, torch.randn(2, 3, 8, 8), torch.tensor(7), 2.5
    with torch.no_grad():
        outputs = [conditional.unet(x, t, class_labels=torch.tensor(labels)).sample for labels in ([0, 2], [3, 3])]
        guided = Denoiser(conditional.unet, 2, "cpu", [0, 2], w)(x, t)
    label, null = (diffusion.predict_epsilon(output, x, 7) for output in outputs)
    torch.testing.assert_close(diffusion.predict_epsilon(guided, x, 7), null + w * (label - null), rtol=1e-4, atol=1e-4)


def test_guidance_calls_the_network_once_per_step_on_twice_the_batch(conditional):
    batches = []
    conditional.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    conditional(3, seed=0, class_labels=0, guidance_scale=2.0, **OPTIONS)
    assert batches == [6] * 4


def test_learned_variance_is_that_of_the_label(make_pipeline, scheduler_config):
    pipe = make_pipeline(
        DDPMSchedulerCustom(**scheduler_config, variance_type="learned_range"), num_class_embeds=4, out_channels=6
    )
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(7)
    with torch.no_grad():
        guided = Denoiser(pipe.unet, 2, "cpu", 0, 5.0, null_class=3)(x, t)
        plain = Denoiser(pipe.unet, 2, "cpu", 0)(x, t)
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:], rtol=0, atol=ROUNDING)
    assert pipe(2, class_labels=0, guidance_scale=3.0, null_class=3, **OPTIONS).images.isfinite().all()


def test_null_class_survives_saving_and_diffusers_without_a_warning(conditional, tmp_path, diffusers_log):
    conditional.save_pretrained(tmp_path / "own")
    stock = DDPMPipeline.from_pretrained(tmp_path / "own")
    assert type(stock.unet) is UNet2DModel
    stock.save_pretrained(tmp_path / "stock")
    loaded = DDPMPipelineCustom.from_pretrained(tmp_path / "stock")
    assert diffusers_log.messages == []
    assert (
        null_class_of(loaded.unet) == 3 == json.loads((tmp_path / "stock/unet/config.json").read_text())["_null_class"]
    )
    loaded.set_progress_bar_config(disable=True)
    guided = {"seed": 0, "class_labels": 1, "guidance_scale": 2.0, **OPTIONS}
    torch.testing.assert_close(loaded(**guided).images, conditional(**guided).images, rtol=0, atol=ROUNDING)


def test_null_class_can_be_given_with_the_call(make_pipeline):
    pipe = make_pipeline(DDIMScheduler(num_train_timesteps=20, prediction_type="v_prediction"), num_class_embeds=4)
    given = pipe(seed=0, class_labels=1, guidance_scale=2.0, null_class=0, **OPTIONS).images
    mark_null_class(pipe.unet, 0)
    assert torch.equal(pipe(seed=0, class_labels=1, guidance_scale=2.0, **OPTIONS).images, given)


@pytest.mark.parametrize(
    ("given", "kind", "named"),
    [
        ({}, ValueError, r"class_labels must be given.*0\.\.3"),
        ({"class_labels": 4}, ValueError, r"class_labels.*0\.\.3.*4"),
        ({"class_labels": -1}, ValueError, r"class_labels.*0\.\.3.*-1"),
        ({"class_labels": [0, 1, 2]}, ValueError, r"class_labels.*2 \(one per image\).*\(3,\)"),
        ({"class_labels": "dog"}, TypeError, "class_labels.*dog"),
        ({"class_labels": 1.0}, TypeError, "class_labels.*float"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, ValueError, "guidance_scale.*nan"),
        ({"class_labels": 0, "guidance_scale": "2"}, ValueError, "guidance_scale.*'2'"),
        ({"class_labels": 0, "guidance_scale": 2.0}, ValueError, "guidance_scale=2 needs.*null class"),
        ({"class_labels": 0, "guidance_scale": 2.0, "null_class": 4}, ValueError, r"null_class.*0\.\.3.*4"),
    ],
)
def test_wrong_labels_and_guidance_are_refused_by_name(make_pipeline, given, kind, named):
    pipe = make_pipeline(num_class_embeds=4)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(kind, match=named):
        pipe(2, **given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"class_labels": 0}, "class_labels must be left out"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.*unconditional"),
        ({"null_class": 0}, "null_class"),
    ],
)
def test_unconditional_model_takes_neither_labels_nor_guidance(tiny_pipeline, given, named):
    with pytest.raises(ValueError, match=named):
        tiny_pipeline(**given)


def test_null_class_must_be_a_label(tiny_unet, make_unet):
    for unet, label in (
        (tiny_unet, None),
        (make_unet(num_class_embeds=4), 4),
        (make_unet(class_embed_type="timestep"), 0),
    ):
        with pytest.raises(ValueError, match="null_class"):
            mark_null_class(unet, label)


@pytest.mark.parametrize(("kind", "condition"), [("timestep", 2.5), ("identity", [0.5] * 32)])
def test_one_condition_is_that_of_every_image(make_pipeline, kind, condition):
    pipe = make_pipeline(class_embed_type=kind)
    one = pipe(2, seed=0, class_labels=condition, **OPTIONS).images
    assert torch.equal(one, pipe(2, seed=0, class_labels=torch.tensor([condition] * 2), **OPTIONS).images)
    other = pipe(2, seed=0, class_labels=(2 * torch.tensor(condition)), **OPTIONS).images
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("timestep", None, "class_labels must be given.*class_embed_type='timestep'"),
        ("timestep", [1.0, 2.0, 3.0], r"class_labels must be a number, or 2 \(one per image\), got shape \(3,\)"),
        ("timestep", [1.0, float("nan")], "class_labels must be finite, got an infinite number or NaN"),
        ("timestep", torch.ones(2, dtype=torch.complex64), "class_labels must be real numbers, got torch.complex64"),
        ("identity", [0.5] * 31, r"class_labels must be a vector of \(32,\) numbers, or 2 .*got shape \(31,\)"),
        ("identity", torch.zeros(2, 33), r"class_labels must be a vector of \(32,\) numbers, .*got shape \(2, 33\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_by_name(make_pipeline, kind, given, message):
    pipe = make_pipeline(class_embed_type=kind)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(2, class_labels=given, **OPTIONS)


def test_conditions_cycle_by_index(make_unet):
    unet, rows = make_unet(class_embed_type="timestep"), torch.tensor([5.0, 6.0, 7.0])
    assert cycled_labels(unet, [0, 4, 8], rows).tolist() == [5.0, 6.0, 7.0]
    assert cycled_labels(unet, [0]) is None and cycled_labels(make_unet(), [0], rows) is None


def test_timestep_embeddings_can_be_labels(make_pipeline):
    pipe = make_pipeline(class_embed_type="timestep")
    assert isinstance(pipe.unet, UNet2DModelCustom)
    assert pipe(2, class_labels=[3, 700], **OPTIONS).images.shape == (2, 3, 8, 8)
