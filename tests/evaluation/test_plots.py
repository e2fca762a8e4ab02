"""Figures show the right pixels and curves."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.diffusion.likelihood import VariationalBound
from ddpm_hf.evaluation.plots import (
    bound_by_timestep,
    closest_pairs,
    denoising_strip,
    figure_bytes,
    image_grid,
    length_curve,
    loss_curve,
)
from docs.make_figures import noised, schedule_curves


def shown(figure):
    """The arrays that a figure's axes show."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


def test_image_grid_shows_every_image_once_in_reading_order():
    images = np.random.default_rng(0).random((23, 8, 6, 1))
    figure = image_grid(images, columns=5)
    assert len(figure.axes) == 25 and len(shown(figure)) == 23
    assert all(np.array_equal(a, b[..., 0]) for a, b in zip(shown(figure), images))


@pytest.mark.parametrize("channels", [2, 5])
def test_other_numbers_of_channels_show_the_first_three_as_colors(channels):
    images = np.random.default_rng(0).random((3, 8, 6, channels))
    for cell, image in zip(shown(image_grid(images)), images, strict=True):
        assert np.array_equal(cell[..., :channels], image[..., :3]) and not cell[..., channels:].any()


def test_figure_bytes_are_a_png_file():
    image = Image.open(io.BytesIO(figure_bytes(image_grid(np.zeros((4, 8, 8, 3))))))
    assert image.format == "PNG" and min(image.size) > 20


def test_noised_images_go_from_the_image_to_noise():
    diffusion = DDPMSchedulerCustom().diffusion
    image = torch.linspace(-1, 1, 256).reshape(1, 16, 16)
    states = noised(diffusion, image).numpy()
    np.testing.assert_array_equal(states[0], image.numpy())
    correlation = [np.corrcoef(states[0].ravel(), state.ravel())[0, 1] for state in states]
    assert correlation[1] > 0.99 and abs(correlation[-1]) < 0.3 and correlation == sorted(correlation, reverse=True)


def test_denoising_strip_ends_with_the_pipelines_image(tiny_pipeline):
    figure = denoising_strip(tiny_pipeline, rows=2, steps=6, seed=5, columns=4)
    config = tiny_pipeline.unet.config
    latents = torch.randn(
        2, config.in_channels, config.sample_size, config.sample_size, generator=torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(6)
    images = tiny_pipeline(2, generator, 6, output_type="np", latents=latents).images
    cells = shown(figure)
    assert len(cells) == 8
    for row in range(2):
        np.testing.assert_allclose(cells[row * 4 + 3].reshape(images[row].shape), images[row], atol=1e-6)
    titles = [axis.get_title() for axis in figure.axes[:4]]
    assert titles[0] == "$x_T$" and titles[-1] == "$x_0$"


def test_loss_curve_shows_logged_and_smoothed_losses():
    losses = [1.0] * 50
    figure = loss_curve(range(50), losses)
    logged, smooth = (line.get_ydata() for line in figure.axes[0].lines)
    assert list(logged) == losses
    np.testing.assert_allclose(smooth, losses)  # no start-up bias


def test_loss_curve_shows_validation_losses():
    figure = loss_curve(range(5), [1.0] * 5, validation={"validation": ([2, 4], [1.2, 1.1])})
    line = figure.axes[0].lines[-1]
    assert (list(line.get_xdata()), list(line.get_ydata()), line.get_label()) == ([2, 4], [1.2, 1.1], "validation")


def test_length_curve_marks_the_best_length():
    axis = length_curve([0.05, 0.1, 0.2], [3.0, 1.0, 2.0], "loss", [0.1, 0.1, 0.1], best=1).axes[0]
    best = axis.lines[-1]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([0.1], [1.0]) and axis.get_ylabel() == "loss"
    assert list(axis.containers[0][0].get_ydata()) == [3.0, 1.0, 2.0]


def test_schedule_curves_show_the_tables():
    diffusions = {name: DDPMSchedulerCustom(beta_schedule=name).diffusion for name in ("linear", "squaredcos_cap_v2")}
    figure = schedule_curves(diffusions)
    for axis, table in zip(figure.axes, ("betas", "sqrt_alphas", "alphas_cumprod", "snr")):
        for line, diffusion in zip(axis.lines, diffusions.values()):
            np.testing.assert_array_equal(line.get_ydata(), getattr(diffusion, table).numpy())


def test_bound_is_drawn_over_the_papers_timesteps():
    bound = VariationalBound(4, 1, 3.5, 0.1, 0.5, [0, 9, 19], [2.0, 0.7, 0.3], [0.9, 0.1, 0.01], [0.01, 0.1, 0.9], [])
    figure = bound_by_timestep({"training": bound, "validation": bound})
    expected = (bound.terms, [2.0, 2.7, 3.0], bound.epsilon_mse, bound.x_0_mse)
    for axis, curve in zip(figure.axes, expected):
        for line in axis.lines:
            np.testing.assert_allclose(line.get_ydata(), curve)
            assert list(line.get_xdata()) == [1, 10, 20]  # the paper's t
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == ["training", "validation"]


def test_closest_pairs_are_drawn_one_above_the_other():
    samples, training = np.random.default_rng(0).random((2, 3, 4, 4, 1))
    figure = closest_pairs(samples, training, [0.1, 0.25, 0.5])
    assert all(np.array_equal(a, b[..., 0]) for a, b in zip(shown(figure), [*samples, *training]))
    assert [axis.get_title() for axis in figure.axes[:3]] == ["0.10", "0.25", "0.50"]
