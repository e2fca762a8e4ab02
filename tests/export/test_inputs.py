"""Inputs that compare runtimes and calibrate: of the graph's types, at timesteps over the whole chain."""

import numpy as np
import pytest
import torch

from ddpm_hf.export.inputs import graph_inputs, noised_images, random_inputs, samples_of
from ddpm_hf.pipelines.guidance import mark_null_class


@pytest.mark.parametrize("changes", [{}, {"num_class_embeds": 3}, {"class_embed_type": "identity"}])
def test_random_inputs_fit_the_network(make_unet, changes):
    unet = make_unet(**changes)
    inputs = random_inputs(unet, 20, 4)
    assert unet(**inputs).sample.shape == (4, 3, 8, 8)
    assert all(torch.equal(value, inputs[name]) for name, value in random_inputs(unet, 20, 4).items())
    assert not torch.equal(random_inputs(unet, 20, 4, seed=1)["sample"], inputs["sample"])


def test_a_guidance_scale_is_given_to_networks_with_a_null_class(make_unet):
    unet = make_unet(num_class_embeds=3)
    assert "guidance_scale" not in graph_inputs(unet, random_inputs(unet, 20, 1), 2.0)
    mark_null_class(unet)
    scale = graph_inputs(unet, random_inputs(unet, 20, 1), 2.0)["guidance_scale"]
    assert (scale.dtype, scale.shape, float(scale)) == (np.float32, (), 2.0)


def test_calibration_noises_each_image_to_its_own_timestep(make_pipeline):
    pipe = make_pipeline(num_class_embeds=3)
    x_0, labels = torch.zeros(40, 3, 8, 8), torch.arange(40) % 3
    batches = noised_images(pipe, x_0, labels)
    assert [len(batch["sample"]) for batch in batches] == [16, 16, 8]
    t = np.concatenate([batch["timestep"] for batch in batches])
    assert np.array_equal(np.sort(t), np.repeat(np.arange(20), 2))
    assert np.array_equal(np.concatenate([batch["class_labels"] for batch in batches]), labels)
    # x_t of a black image is noise of variance 1 − ᾱ_t.
    spread = np.concatenate([batch["sample"] for batch in batches]).std((1, 2, 3))
    expected = pipe.scheduler.diffusion.sqrt_one_minus_alphas_cumprod[torch.as_tensor(t).long()]
    np.testing.assert_allclose(spread, expected, rtol=0.3)


def test_samples_for_calibration_have_the_classes_in_turn(make_pipeline):
    pipe = make_pipeline(num_class_embeds=3)
    mark_null_class(pipe.unet)
    images, labels = samples_of(pipe, 18)
    assert images.shape == (18, 3, 8, 8) and images.abs().max() <= 1
    assert labels.tolist() == [0, 1] * 9
