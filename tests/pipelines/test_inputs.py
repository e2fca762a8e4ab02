"""Images and masks in any form."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data.decoding import ImageFormat, decode_image, to_signed
from ddpm_hf.pipelines.editing import image_to_image, inpaint, interpolate
from ddpm_hf.pipelines.inputs import to_images, to_mask
from ddpm_hf.pipelines.inversion import reconstruct


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def forms(pixels, tmp_path) -> dict:
    """The same two images in every form."""
    files = [tmp_path / f"{i}.png" for i in range(2)]
    pictures = [Image.fromarray(image) for image in pixels]
    for file, picture in zip(files, pictures):
        picture.save(file)
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2)) / 127.5 - 1
    return {
        "tensor": x,
        "double tensor": x.double(),
        "uint8 tensor": torch.from_numpy(pixels.transpose(0, 3, 1, 2)),
        "list of tensors": [x[0], x[1:]],
        "tuple of tensors": tuple(x),
        "array": pixels,
        "16-bit array": pixels.astype(np.uint16) * 257,
        "array of floats": pixels / 255,
        "list of arrays": [pixels[0], pixels[1:] / 255],
        "pictures": pictures,
        "files": files,
        "names": [str(file) for file in files],
        "mixed": [pictures[0], files[1]],
    }


def test_every_form_gives_the_same_tensor(tiny_pipeline, forms):
    for form, given in forms.items():
        found = to_images(tiny_pipeline, "images", given)
        torch.testing.assert_close(found.float(), forms["tensor"], rtol=0, atol=1e-6, msg=form)
    one = to_images(tiny_pipeline, "images", forms["pictures"][0])
    torch.testing.assert_close(one, forms["tensor"][:1], rtol=0, atol=1e-6)
    assert torch.equal(to_images(tiny_pipeline, "images", str(forms["files"][0])), one)


def test_all_editing_takes_pictures(tiny_pipeline, forms):
    x, pictures = forms["tensor"], forms["pictures"]
    calls = [
        lambda x: image_to_image(tiny_pipeline, x, 9, 3, seed=0, output_type="pt"),
        lambda x: interpolate(
            tiny_pipeline, x, x[::-1] if isinstance(x, list) else x.flip(0), 9, [0.3], 3, output_type="pt"
        )[0],
        lambda x: inpaint(tiny_pipeline, x, torch.ones(8, 8), 3, 1, 1, seed=0, output_type="pt"),
        lambda x: reconstruct(tiny_pipeline, x, 3, output_type="pt"),
    ]
    for call in calls:
        torch.testing.assert_close(call(pictures), call(x), rtol=0, atol=1e-5)


def test_samples_can_be_edited_again(tiny_pipeline):
    expected = to_images(tiny_pipeline, "images", 2 * tiny_pipeline(2, seed=0, output_type="pt").images - 1)
    for output_type, tolerance in (("np", 1e-6), ("pil", 1 / 255)):
        made = tiny_pipeline(2, seed=0, output_type=output_type).images
        torch.testing.assert_close(to_images(tiny_pipeline, "images", made), expected, rtol=0, atol=tolerance)


def test_pictures_are_converted_as_training_images_are(tiny_pipeline, tmp_path):
    """Rotated by EXIF, with another size and transparency."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    expected = to_signed(decode_image((tmp_path / "a.png").read_bytes(), ImageFormat((8, 8), 3)))[None]
    for given in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        assert torch.equal(to_images(tiny_pipeline, "images", given), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_pictures_of_any_mode_become_the_channels_of_the_model(tiny_pipeline, make_pipeline, mode):
    gray = Image.new("L", (8, 8), 255)
    picture = (
        Image.new("I;16", (8, 8), 65535)
        if mode == "I;16"
        else gray.convert("RGB").convert(mode)
        if mode != "1"
        else gray.convert("1")
    )
    for pipe, channels in ((tiny_pipeline, 3), (make_pipeline(in_channels=1, out_channels=1), 1)):
        found = to_images(pipe, "images", picture)
        torch.testing.assert_close(found, torch.ones(1, channels, 8, 8), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: (x.numpy() + 1) / 2, r"images must have shape \(B, 3, H, W\), got \(2, 8, 3, 8\)"),
        (lambda x: x.permute(0, 2, 3, 1).numpy(), r"lie in \[0, 1\], got -1 to .*tensors are in \[-1, 1\]"),
        (lambda x: x.permute(0, 2, 3, 1).numpy() * np.nan, r"lie in \[0, 1\], got nan"),
        (lambda x: np.zeros((2, 8, 8, 3), np.int64), "got int64"),
        (lambda x: np.zeros((0, 8, 8, 3)), r"\(0, 3, 8, 8\)"),
        (lambda x: np.zeros((8, 7, 3)), "multiples of 2"),
        (lambda x: (x + 1) * 127.5, r"\[-1, 1\], got 0 to 255. Values of 0 to 255 are x / 127.5 - 1"),
        (lambda x: [], "at least one item"),
        (lambda x: [[0.5]], "images must be a tensor .* got 0.5"),
        (lambda x: [x[0], np.zeros((4, 4, 3))], "images must have one shape"),
        (lambda x: None, "images must be a tensor .* got None"),
        (lambda x: "nowhere.png", "images 'nowhere.png' cannot be read: .*o such file"),
        (lambda x: __file__, "images '.*test_inputs.py' cannot be read"),
    ],
)
def test_wrong_images_are_named(tiny_pipeline, forms, change, named):
    x = forms["tensor"].clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1, 1
    with pytest.raises(ValueError, match=named):
        image_to_image(tiny_pipeline, change(x), 9, 3)


def test_tensors_that_look_like_0_to_1_are_warned_of(tiny_pipeline, forms, caplog):
    with caplog.at_level(logging.WARNING):
        to_images(tiny_pipeline, "images", forms["tensor"])
        to_images(tiny_pipeline, "images", forms["array of floats"])
        assert not caplog.records
        to_images(tiny_pipeline, "photos", (forms["tensor"] + 1) / 2)
    assert "photos has no value below 0" in caplog.text and "2 * x - 1" in caplog.text


# ---------------------------------------------------------------------- masks


def test_every_form_of_a_mask_is_the_same(tmp_path):
    images, values = torch.zeros(2, 3, 8, 8), np.zeros((8, 8), np.uint8)
    values[2:5, 3:] = 1
    picture = Image.fromarray(values * 255)
    picture.save(tmp_path / "mask.png")
    noisy = Image.fromarray(np.where(values, 160, 90).astype(np.uint8))  # as a JPEG would have it
    large = picture.resize((32, 32), Image.Resampling.NEAREST)
    forms = [torch.from_numpy(values), torch.from_numpy(values)[None, None], values, values * 255, values == 1]
    forms += [values[None, ..., None], picture, noisy, large, picture.convert("1"), tmp_path / "mask.png"]
    forms += [[picture, values], [str(tmp_path / "mask.png"), torch.from_numpy(values).float()]]
    expected = torch.from_numpy(values == 1).expand(images.shape)
    for form in forms:
        assert torch.equal(to_mask(form, images).expand(images.shape), expected), type(form)


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (torch.full((8, 8), 0.5), "only 0"),
        (np.full((8, 8), 128, np.uint8), "only 0"),
        (torch.ones(4, 4), r"mask must have shape \(8, 8\)"),
        (np.ones((8, 8, 1, 1)), "mask must have shape"),
        ([torch.ones(8, 8)] * 3, "mask must have shape"),
        (None, "mask must be a tensor .* got None"),
        ("nowhere.png", "mask 'nowhere.png' cannot be read"),
        ([], "mask must be a list with at least one item"),
    ],
)
def test_wrong_masks_are_named(mask, named):
    with pytest.raises(ValueError, match=named):
        to_mask(mask, torch.zeros(2, 3, 8, 8))
