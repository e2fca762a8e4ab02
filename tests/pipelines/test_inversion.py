"""DDIM encoding and decoding, with the exact network of Gaussian data, and interpolation between seeds."""

import pytest
import torch
from diffusers import DDIMScheduler

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.pipelines.inversion import decode, encode, interpolate_seeds, reconstruct, slerp
from ddpm_hf.seeds import image_generators, seed_generators
from tests.gaussian_unet import gaussian_pipeline
from tests.pipelines.helpers import ROUNDING


@pytest.mark.parametrize(("iterations", "bound"), [(1, 0.2), (5, 2e-3)])
def test_decoding_the_encoded_image_returns_it(gaussian_images, iterations, bound):
    """Bounds of the largest pixel error at 50 steps, for the usual inversion and for five iterations."""
    back = reconstruct(gaussian_pipeline(), gaussian_images, 50, iterations=iterations, output_type="pt")
    assert (2 * back - 1 - gaussian_images).abs().max() < bound


def test_images_of_the_data_are_encoded_as_gaussian_noise(gaussian_images):
    """With the exact network and many steps, DDIM maps N(mean, std²) close to N(0, 1)."""
    x_T = encode(gaussian_pipeline(), gaussian_images, 200)
    assert x_T.mean().item() == pytest.approx(0, abs=0.05) and x_T.std().item() == pytest.approx(1, rel=0.1)


def test_decoding_equals_the_ddim_of_diffusers(make_pipeline, scheduler_config):
    pipe = make_pipeline(DDIMScheduler(**scheduler_config, clip_sample=False, timestep_spacing="trailing"))
    latents = torch.randn(2, 3, 8, 8)
    expected = pipe(2, latents=latents, num_inference_steps=5, eta=0.0, output_type="pt").images
    torch.testing.assert_close(decode(pipe, latents, 5, "pt"), expected, rtol=0, atol=2e-4)


def test_zero_terminal_snr_can_be_inverted(make_pipeline, scheduler_config, photos):
    pipe = make_pipeline(DDPMSchedulerCustom(**scheduler_config, rescale_betas_zero_snr=True))
    assert encode(pipe, photos, 20).isfinite().all()


def test_seed_interpolation_ends_at_the_images_of_the_seeds(tiny_pipeline):
    images = interpolate_seeds(tiny_pipeline, 3, 8, [0.0, 0.5, 1.0], 5, "pt")
    for image, generator in ((images[0], seed_generators([3])[0]), (images[2], seed_generators([8])[0])):
        alone = decode(tiny_pipeline, torch.randn(1, 3, 8, 8, generator=generator), 5, "pt")
        torch.testing.assert_close(image, alone[0], rtol=0, atol=ROUNDING)
    assert min((images[1] - images[k]).abs().mean() for k in (0, 2)) > 0.01


def test_slerp_keeps_the_norm_of_noise():
    x, y = (torch.randn(1, 3, 64, 64, generator=g) for g in image_generators(0, range(2)))
    for weight in (0.25, 0.5, 0.75):
        assert slerp(x, y, weight).std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(slerp(x, x, 0.3), x) or torch.allclose(slerp(x, x, 0.3), x)


def test_images_of_another_size_can_be_encoded_and_decoded(tiny_pipeline, photos):
    large = photos.repeat(1, 1, 2, 1)
    assert reconstruct(tiny_pipeline, large, 3, output_type="pt").shape == (2, 3, 16, 8)
