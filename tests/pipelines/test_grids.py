"""Grids of images, and animations."""

import io

import imageio.v3
import numpy as np
import pytest
import torch
from diffusers.utils import make_image_grid
from PIL import Image

import ddpm_hf
from ddpm_hf.pipelines.grids import animation_bytes, image_grid


def test_grid_is_that_of_diffusers(tiny_pipeline):
    images = tiny_pipeline(6, seed=0, num_inference_steps=2).images
    expected = make_image_grid(images, rows=2, cols=3, resize=None)
    assert np.array_equal(image_grid(images, 3), expected) and np.array_equal(image_grid(images), expected)
    assert ddpm_hf.image_grid is image_grid


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_all_that_a_call_returns_gives_one_grid(make_pipeline, channels):
    pipe = make_pipeline(in_channels=channels, out_channels=channels)
    types = ("np", "pt", *["pil"] * (channels in (1, 3, 4)))
    grids = [np.asarray(image_grid(pipe(5, seed=0, num_inference_steps=2, output_type=kind).images)) for kind in types]
    assert grids[0].shape[:2] == (16, 24)
    for grid in grids:
        assert abs(grid.astype(int) - grids[0]).max() <= 1
    assert (grids[0][8:, 16:] == 255).all()  # no sixth image


def test_scale_and_padding_place_every_pixel():
    images = np.random.default_rng(0).integers(0, 255, (3, 4, 6, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(images, 2, scale=2, padding=3))
    assert grid.shape == (2 * 8 + 3, 2 * 12 + 3, 3)
    assert np.array_equal(grid[11:, :12], images[2].repeat(2, 0).repeat(2, 1))
    assert (grid[8:11] == 255).all() and (grid[:, 12:15] == 255).all()


@pytest.mark.parametrize(
    ("images", "options", "named"),
    [
        ([], {}, "images must be a list of PIL images"),
        (None, {}, "images must be a list of PIL images"),
        (["a.png"], {}, "images must be PIL images"),
        (torch.zeros(3, 8, 8), {}, r"images must have shape .* got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8) - 0.5, {}, r"images must be in \[0, 1\], got -0.5 to -0.5: x / 2"),
        (np.full((1, 8, 8, 3), np.nan), {}, "got nan to nan"),
        (np.zeros((1, 8, 8, 3), int), {}, "uint8, got int64"),
        ([Image.new("L", (8, 8)), Image.new("L", (8, 9))], {}, "images must have one size"),
        (np.zeros((1, 8, 8, 3)), {"columns": 0}, "columns must be an integer of at least 1, got 0"),
        (np.zeros((1, 8, 8, 3)), {"scale": 0.5}, "scale must be an integer"),
    ],
)
def test_wrong_arguments_are_named(images, options, named):
    with pytest.raises(ValueError, match=named):
        image_grid(images, **options)


def test_a_video_has_its_frames_and_rests_at_the_last():
    frames = [Image.new("L", (15, 8), 60 * i) for i in range(5)]
    found = imageio.v3.imread(animation_bytes(frames, "MP4", seconds=1), extension=".mp4", plugin="pyav")
    assert found.shape == (5 + 2, 8, 16, 3)  # of even width, and half a second more at 5 frames per second
    levels = found[:, :6, :12].mean(axis=(1, 2, 3))
    assert levels == pytest.approx([0, 60, 120, 180, 240, 240, 240], abs=6)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animation_has_its_frames_and_rests_at_the_last(format):
    frames = [Image.new("L", (8, 8), 60 * i) for i in range(5)]
    with Image.open(io.BytesIO(animation_bytes(frames, format, seconds=1))) as found:
        assert found.format == format and found.n_frames == 5
        durations, levels = [], []
        for i in range(5):
            found.seek(i)
            found.load()
            durations.append(found.info["duration"])
            levels.append(np.asarray(found.convert("L")).mean())
    assert durations == [200] * 4 + [700]
    assert levels == pytest.approx([60 * i for i in range(5)], abs=3)
