"""Samples are read from every kind of file, with the pixels that the decoder of training images gives."""

import datasets
import numpy as np
import pytest
import torch
from ddpm_hf.scripts import sample as sample_script
from PIL import Image

from ddpm_hf.data.decoding import ImageFormat, decode_image
from ddpm_hf.evaluation.encoding import png_bytes, quantize
from ddpm_hf.evaluation.sample_files import read_samples

LEVELS = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 1))


@pytest.mark.parametrize("bits", [8, 16])
def test_samples_are_read_from_png_files_of_both_depths(tmp_path, bits):
    for i, image in enumerate(LEVELS):
        (tmp_path / f"{i}.png").write_bytes(png_bytes(quantize(image / 255, bits)))
    samples = read_samples(str(tmp_path), 2, (8, 6), 1)
    assert samples.dtype == torch.uint8 and np.array_equal(samples.permute(0, 2, 3, 1), LEVELS[:2])
    with pytest.raises(ValueError, match="holds 3 images, num_samples is 4"):
        read_samples(str(tmp_path), 4, (8, 6), 1)


@pytest.mark.parametrize(("format", "bits"), [("png", 8), ("npz", 8), ("npz", 16), ("parquet", 8), ("parquet", 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_the_sampling_script_hold_the_same_samples(make_pipeline, tmp_path, format, bits, channels):
    make_pipeline(in_channels=channels, out_channels=channels).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--steps=2", "--num_images=3"]
    sample_script.main([*options, "--format=png", f"--output_dir={tmp_path / 'png'}"])
    sample_script.main([*options, f"--format={format}", f"--bits={bits}", f"--output_dir={tmp_path / 'other'}"])
    other = tmp_path / "other"
    samples = read_samples(str(other if format == "png" else other / f"seed0-3.{format}"), 3, (8, 8), channels)
    expected = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "png").glob("*.png"))]
    difference = samples.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(expected).reshape(3, 8, 8, channels)
    assert samples.dtype == torch.uint8 and np.abs(difference).max() <= (1 if bits == 16 else 0)


def test_class_folders_are_read_and_hidden_files_are_not(tmp_path):
    for name in ("b/0.png", "a/1.png", "a/test.png", ".hidden.png", ".cache/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (6, 8), len(name)).save(tmp_path / name)
    (tmp_path / "seed0.json").write_text("{}")
    assert read_samples(str(tmp_path), 3, (8, 6), 1)[:, 0, 0, 0].tolist() == [7, 10, 7]
    with pytest.raises(ValueError, match="holds 3 images"):
        read_samples(str(tmp_path), 4, (8, 6), 1)


@pytest.mark.parametrize("kind", ["transparent", "turned", "palette", "gray16"])
def test_odd_pictures_are_decoded_as_training_images_are(tmp_path, kind):
    values = np.random.default_rng(1).integers(0, 256, (8, 6, 4), np.uint8)
    image, options = Image.fromarray(values), {}
    if kind == "turned":
        image, options = Image.fromarray(values[..., :3]).rotate(90, expand=True), {"exif": Image.Exif()}
        options["exif"][0x112] = 6
    elif kind == "palette":
        image = Image.fromarray(values[..., :3]).quantize(8)
    elif kind == "gray16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    image.save(tmp_path / "0.png", **options)
    expected = decode_image((tmp_path / "0.png").read_bytes(), ImageFormat((8, 6), 3, bits=8))
    assert torch.equal(read_samples(str(tmp_path), 1, (8, 6), 3)[0], expected)
    if kind == "gray16":
        assert np.array_equal(expected[0], values[..., 0])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 8, 6), np.uint8)}, r"uint8 or uint16 \(N, H, W, C\) .*got uint8 \(2, 8, 6\)"),
        ({"x": np.zeros((2, 8, 6, 1))}, r"got float64 \(2, 8, 6, 1\)"),
        ({"x": np.zeros(2), "y": np.zeros(2)}, r"got the arrays \['x', 'y'\]"),
        ({"arr_0": np.zeros((2, 9, 6, 1), np.uint8), "y": np.zeros(2)}, r"resolution \(8, 6\): image 0 is \(9, 6\)"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_samples(str(tmp_path / "samples.npz"), 2, (8, 6), 1)


def test_unknown_sources_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="samples must be a folder, a .npz or a .parquet file, got 'nowhere'"):
        read_samples("nowhere", 1, (8, 6), 1)
    with pytest.raises(ValueError, match="holds no image"):
        read_samples(str(tmp_path), 1, (8, 6), 1)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="a.npz' cannot be read"):
        read_samples(str(tmp_path / "a.npz"), 1, (8, 6), 1)
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "a.npz").unlink()
    with pytest.raises(ValueError, match="b.png cannot be read"):
        read_samples(str(tmp_path), 1, (8, 6), 1)


def test_null_in_a_table_is_named_by_its_row(tmp_path):
    column = [{"bytes": png_bytes(LEVELS[0].astype(np.uint8)), "path": None}, None]
    table = datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(tmp_path / "a.parquet")
    assert len(read_samples(str(tmp_path / "a.parquet"), 1, (8, 6), 1)) == 1
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        read_samples(str(tmp_path / "a.parquet"), 2, (8, 6), 1)
