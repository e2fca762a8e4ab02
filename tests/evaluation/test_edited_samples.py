"""Images made from pictures: each depends on its index, not on the batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.evaluation.edited_samples import check_edit, edited_images
from ddpm_hf.evaluation.sample_options import SampleArguments
from ddpm_hf.pipelines.editing import image_to_image, inpaint, interpolate


@pytest.fixture
def files(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return [str(tmp_path / name) for name in ("a.png", "b.png", "mask.png")]


def arguments(**options) -> SampleArguments:
    return SampleArguments(model=".", **{"num_images": 5, "steps": 4, "seed": 3, **options})


def test_images_are_those_of_editing_by_index(tiny_pipeline, files):
    one, other, mask = files
    whole = [one] * 5
    expected = {
        "image to image": image_to_image(
            tiny_pipeline, whole, strength=0.8, num_inference_steps=4, seed=3, output_type="np"
        ),
        "inpainting": inpaint(tiny_pipeline, whole, mask, 4, seed=3, output_type="np"),
        "interpolation": np.concatenate(
            interpolate(
                tiny_pipeline,
                one,
                other,
                None,
                np.linspace(0, 1, 5).tolist(),
                4,
                strength=0.5,
                seed=3,
                output_type="np",
            )
        ),
    }
    args = {
        "image to image": arguments(init_image=one),
        "inpainting": arguments(init_image=one, mask=mask),
        "interpolation": arguments(interpolate=[one, other], strength=0.5),
    }
    for name, images in expected.items():
        parts = [edited_images(tiny_pipeline, args[name], batch) for batch in (range(2), range(2, 5))]
        np.testing.assert_allclose(np.concatenate(parts), images, atol=1e-5, err_msg=name)
        assert abs(images[0] - images[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"init_image": "nowhere.png"}, "init_image 'nowhere.png' cannot be read"),
        ({"interpolate": ["{0}", "nowhere.png"]}, "interpolate 'nowhere.png' cannot be read"),
        ({"init_image": "{0}", "mask": "nowhere.png"}, "mask 'nowhere.png' cannot be read"),
        ({"init_image": "{0}", "strength": 0.1}, "strength must leave a step to run"),
    ],
)
def test_what_cannot_be_edited_is_named(tiny_pipeline, files, change, named):
    fill = lambda value: value.format(*files) if isinstance(value, str) else value  # noqa: E731
    change = {k: [fill(x) for x in v] if isinstance(v, list) else fill(v) for k, v in change.items()}
    with pytest.raises(ValueError, match=named):
        check_edit(tiny_pipeline, arguments(**change), False)


def test_interpolation_needs_one_class(tiny_pipeline, files):
    with pytest.raises(ValueError, match="interpolate needs a class_label"):
        check_edit(tiny_pipeline, arguments(interpolate=files[:2]), True)
    check_edit(tiny_pipeline, arguments(interpolate=files[:2], class_label="1"), True)
    assert torch.is_grad_enabled()
