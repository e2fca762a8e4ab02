"""The sampling script, and the benchmark of the digits' quality."""

import json
import pickle
import re
import subprocess
import sys

import datasets
import imageio.v3
import numpy as np
import pytest
import torch
from ddpm_hf.scripts import sample as sample_script
from PIL import Image

from benchmarks import digits_quality
from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.evaluation.encoding import quantize
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.pipelines.guidance import mark_class_names, mark_null_class
from ddpm_hf.schedulers.samplers import make_sampler


def pixels(folder):
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def test_more_images_are_added_to_those_that_exist(model, tmp_path, capsys):
    arguments = ["--model", str(model), "--steps", "3", "--output_dir"]
    sample_script.main([*arguments, str(tmp_path / "all"), "--num_images", "5"])
    sample_script.main([*arguments, str(tmp_path / "parts"), "--num_images", "2"])
    sample_script.main([*arguments, str(tmp_path / "parts"), "--num_images", "5"])
    assert "3 images written" in capsys.readouterr().out
    whole, parts = pixels(tmp_path / "all"), pixels(tmp_path / "parts")
    assert list(whole) == [f"seed0-{i:06d}.png" for i in range(5)] == list(parts)
    assert all(np.abs(whole[n].astype(int) - parts[n]).max() <= 1 and whole[n].shape == (8, 8) for n in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--model", "./nowhere"], "nowhere"), (["--num_images", "0"], "num_images must be an integer of at least 1")],
)
def test_wrong_model_or_number_is_one_sentence(model, options, message):
    with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}"):
        sample_script.main(["--model", str(model), *options])


DRIVER = """
from ddpm_hf.scripts import sample

for format in {formats}:
    sample.main([*{options}, "--format", format, "--output_dir", {folder!r} + "/" + format])
"""


def test_two_processes_write_the_files_of_one(model, tmp_path):
    formats = ("png", "npz", "parquet")
    options = ["--model", str(model), "--steps", "3", "--num_images", "5", "--batch_size", "2"]
    options += ["--scheduler", "dpmsolver++", "--device", "cpu"]
    for format in formats:
        sample_script.main([*options, "--format", format, "--output_dir", str(tmp_path / "one" / format)])
    # All formats in one launch: most of its time is the import of torch.
    (tmp_path / "driver.py").write_text(DRIVER.format(folder=str(tmp_path / "two"), formats=formats, options=options))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29637"]
    ran = subprocess.run([*command, str(tmp_path / "driver.py")], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "process 1 of 2" in ran.stderr and ran.stdout.count("images written") == 3
    for format in formats:
        one, two = ({f.name: f.read_bytes() for f in (tmp_path / n / format).iterdir()} for n in ("one", "two"))
        assert len(one) == (6 if format == "png" else 2) and one == two


@pytest.fixture
def options_of_nan_for_class_1(make_pipeline, tmp_path) -> list[str]:
    """Options for a model that makes NaN of class 1. Image i has class i modulo 4, so that of three batches of one image
    the second is bad."""
    pipe = make_pipeline(num_class_embeds=4)
    with torch.no_grad():
        pipe.unet.class_embedding.weight[1] = 1e38  # overflows in the network
    pipe.save_pretrained(tmp_path / "nan")
    options = ["--model", str(tmp_path / "nan"), "--steps", "3", "--num_images", "3", "--batch_size", "1"]
    return [*options, "--device", "cpu", "--output_dir", str(tmp_path / "out")]


NAN_MESSAGE = (
    "sample.py: error: in the batch of images 1 to 1, samples must be finite, got NaN or infinite values in 1 of 1 images "
    "(number 0 of the batch), from step 1 of 3 on (timestep 12). Likely causes: "
)


@pytest.mark.parametrize("format, written", [("png", "seed0-000000.png"), ("npz", "000000-000001.npy")])
def test_bad_batch_is_one_sentence_and_is_not_written(options_of_nan_for_class_1, tmp_path, format, written):
    with pytest.raises(SystemExit, match=re.escape(NAN_MESSAGE)):
        sample_script.main([*options_of_nan_for_class_1, "--format", format])
    assert [f.name for f in (tmp_path / "out").rglob("*") if f.suffix in (".png", ".npy", ".npz")] == [written]


def test_bad_batch_of_the_second_process_is_said_by_the_first(options_of_nan_for_class_1, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29638"]
    command += ["-m", "ddpm_hf.scripts.sample", *options_of_nan_for_class_1]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 1 and ran.stderr.count(NAN_MESSAGE) == 1, ran.stderr[-3000:]
    assert "images written" not in ran.stdout
    assert list(pixels(tmp_path / "out")) == ["seed0-000000.png", "seed0-000002.png"]


def test_stopped_run_is_resumed_and_ends_with_the_same_file(model, tmp_path, monkeypatch):
    options = ["--model", str(model), "--steps", "3", "--num_images", "5", "--batch_size", "2", "--format", "npz"]
    sample_script.main([*options, "--output_dir", str(tmp_path / "whole")])
    make, made = sample_script.make_batch, []

    def stopped(pipe, args, batch):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(batch)
        return make(pipe, args, batch)

    monkeypatch.setattr(sample_script, "make_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample_script.main([*options, "--output_dir", str(tmp_path / "parts")])
    assert not list((tmp_path / "parts").glob("*.npz"))
    made.pop()
    sample_script.main([*options, "--output_dir", str(tmp_path / "parts")])
    assert [b.start for b in made] == [0, 4]  # not the second batch, which existed
    one, two = (np.load(tmp_path / n / "seed0-5.npz")["arr_0"] for n in ("whole", "parts"))
    assert one.shape == (5, 8, 8, 1) and one.dtype == np.uint8 and np.array_equal(one, two)


def test_all_formats_hold_the_same_pixels_and_16_bits_refine_8(model, tmp_path):
    arrays = {}
    for format, bits in (("png", 8), ("png", 16), ("npz", 8), ("npz", 16), ("parquet", 8)):
        folder = tmp_path / f"{format}{bits}"
        sample_script.main(
            ["--model", str(model), "--steps", "3", "--num_images", "3", "--format", format]
            + ["--bits", str(bits), "--output_dir", str(folder)]
        )
        if format == "png":
            arrays[format, bits] = np.stack(list(pixels(folder).values()))[..., None]
        elif format == "npz":
            arrays[format, bits] = np.load(folder / "seed0-3.npz")["arr_0"]
        else:
            rows = datasets.Dataset.from_parquet(str(folder / "seed0-3.parquet"), cache_dir=str(tmp_path / "cache"))
            arrays[format, bits] = np.stack([np.asarray(row["image"]) for row in rows])[..., None]
    assert np.array_equal(arrays["png", 8], arrays["npz", 8]) and np.array_equal(arrays["png", 8], arrays["parquet", 8])
    assert np.array_equal(arrays["png", 16], arrays["npz", 16]) and arrays["npz", 16].dtype == np.uint16
    assert np.abs(arrays["png", 16] / 257 - arrays["png", 8]).max() <= 0.5 + 1e-6
    assert len(np.unique(arrays["png", 16])) > len(np.unique(arrays["png", 8]))


@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_color_of_16_bits_is_read_back_exactly(make_pipeline, tmp_path, format):
    make_pipeline().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--steps", "2", "--num_images", "2", "--bits", "16"]
    sample_script.main([*options, "--format", format, "--output_dir", str(tmp_path / format)])
    if format == "npz":
        images = np.load(tmp_path / format / "seed0-2.npz")["arr_0"]
    else:
        file = str(tmp_path / format / "seed0-2.parquet")
        rows = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
        images = rows.with_format("numpy", dtype=np.uint16)["image"][:]
    expected = quantize(sample_images(DDPMPipelineCustom.from_pretrained(tmp_path / "model"), range(2), 2, 0, 2), 16)
    assert images.dtype == np.uint16 and images.shape == (2, 8, 8, 3) and np.array_equal(images, expected)


def test_color_of_16_bits_as_png_raises_naming_other_formats(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="format='png' with bits=16 is for gray images.*use npz or parquet"):
        sample_script.main(["--model", str(tmp_path / "model"), "--bits", "16", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_classes_cycle_by_index_without_the_null_class(make_pipeline, tmp_path):
    pipe = make_pipeline(num_class_embeds=4)
    mark_null_class(pipe.unet)
    pipe.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--steps", "2", "--num_images", "5", "--guidance_scale", "2"]
    sample_script.main([*options, "--format", "npz", "--output_dir", str(tmp_path / "out")])
    arrays = np.load(tmp_path / "out" / "seed0-5.npz")
    assert arrays["arr_0"].shape == (5, 8, 8, 3) and arrays["arr_1"].tolist() == [0, 1, 2, 0, 1]


def test_images_of_other_options_are_not_mixed_into_a_folder(model, tmp_path):
    options = ["--model", str(model), "--num_images", "2", "--output_dir", str(tmp_path / "out")]
    sample_script.main([*options, "--steps", "2"])
    with pytest.raises(SystemExit, match="steps 2, now 3"):
        sample_script.main([*options, "--steps", "3"])


@pytest.fixture
def with_table(model):
    """The model with a table of best timesteps."""
    metrics = json.loads((model / "metrics.json").read_text())
    table = {"variance_type": "fixed_small", "rows": [{"steps": 3, "timesteps": [19, 4, 0]}]}
    (model / "metrics.json").write_text(json.dumps(metrics | {"evaluation": {"best_timesteps": table}}))
    return model


def test_best_timesteps_are_those_of_the_model_and_are_recorded(with_table, tmp_path):
    options = ["--model", str(with_table), "--num_images", "2", "--format", "npz", "--output_dir"]
    best, folder = ["--timesteps", "best", "--steps", "3"], tmp_path / "best"
    sample_script.main([*options, str(folder), *best])
    sample_script.main([*options, str(tmp_path / "list"), "--timesteps", "19, 4,0"])
    sample_script.main([*options, str(tmp_path / "even"), "--steps", "3"])
    made, listed, even = (np.load(tmp_path / n / "seed0-2.npz")["arr_0"] for n in ("best", "list", "even"))
    pipe = DDPMPipelineCustom.from_pretrained(with_table)
    expected = quantize(sample_images(pipe, range(2), None, 0, 2, timesteps=[19, 4, 0]), 8)
    assert np.array_equal(made, expected) and np.array_equal(listed, expected) and not np.array_equal(even, expected)
    record = json.loads((folder / "seed0.json").read_text())
    assert record["timesteps"] == "19,4,0" and record["steps"] is None
    sample_script.main([*options, str(folder), *best])  # resumed: the same images
    with pytest.raises(SystemExit, match="made with other options .*timesteps '19,4,0', now '19,3,0'"):
        sample_script.main([*options, str(folder), "--timesteps", "19,3,0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["best"], "steps must be an integer in 2..20, with timesteps='best', got None"),
        (["best", "--steps", "4"], "steps must be one of 3, .*got 4"),
        (["best", "--steps", "3", "--scheduler", "ddim"], "timesteps='best' is for scheduler='ddpm', got 'ddim'"),
        (["19,4,0", "--steps", "3"], "steps=3 and a list of timesteps exclude each other"),
        (["19,4,0", "--scheduler", "lms"], "timesteps cannot be given to LMSDiscreteScheduler"),
        (["0,4,19"], "timesteps must be a descending list in 0..T−1 = 19, or 'ddimN', got '0,4,19'"),
        (["19,4,4,0"], "descending list in 0..T−1 = 19, or 'ddimN', got '19,4,4,0'"),
        (["20,4,0", "--scheduler", "dpmsolver++"], "descending list in 0..T−1 = 19, or 'ddimN', got '20,4,0'"),
        (["4,-1"], "descending list in 0..T−1 = 19, or 'ddimN', got '4,-1'"),
        (["good"], "descending list in 0..T−1 = 19, or 'ddimN', got 'good'"),
    ],
)
def test_timesteps_that_cannot_be_sampled_are_refused(with_table, tmp_path, options, message):
    arguments = ["--model", str(with_table), "--output_dir", str(tmp_path / "out"), "--timesteps", *options]
    with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}"):
        sample_script.main(arguments)
    assert not (tmp_path / "out").exists()


def test_best_timesteps_of_a_model_without_them_are_refused(model, tmp_path):
    options = ["--model", str(model), "--steps", "3", "--timesteps", "best", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="model must be a folder whose metrics.json has a table of best timesteps"):
        sample_script.main(options)


def test_folder_of_an_earlier_version_is_continued(model, tmp_path):
    options = ["--model", str(model), "--steps", "2", "--output_dir", str(tmp_path / "out"), "--num_images"]
    sample_script.main([*options, "1"])
    file = tmp_path / "out" / "seed0.json"
    earlier = {name: value for name, value in json.loads(file.read_text()).items() if name != "timesteps"}
    file.write_text(json.dumps(earlier))
    sample_script.main([*options, "2"])
    assert len(pixels(tmp_path / "out")) == 2


def test_class_can_be_given_by_its_name(make_pipeline, tmp_path):
    pipe = make_pipeline(in_channels=1, out_channels=1, num_class_embeds=3)
    mark_class_names(pipe.unet, ["cat", "dog", "1"])
    pipe.save_pretrained(tmp_path / "model")
    made = {}
    for label in ("dog", "1", "2"):
        options = ["--model", str(tmp_path / "model"), "--num_images", "2", "--steps", "2", "--class_label", label]
        sample_script.main([*options, "--output_dir", str(tmp_path / label)])
        made[label] = [file.read_bytes() for file in sorted((tmp_path / label).glob("*.png"))]
        number = {"dog": "1", "1": "2", "2": "2"}[label]
        assert json.loads((tmp_path / label / "seed0.json").read_text())["class_label"] == int(number)
    assert made["1"] == made["2"] != made["dog"]  # a name goes before a number
    with pytest.raises(
        SystemExit, match="class_label must be a class of the model, a number or a .npy file, got 'cow'"
    ):
        sample_script.main(["--model", str(tmp_path / "model"), "--class_label", "cow"])


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Files of two digits and a mask, as a user has them: larger than the model's images, and in color."""
    for name, level in (("a", 40), ("b", 220), ("mask", 255)):
        picture = Image.new("RGB", (32, 32), (level, level, level))
        if name == "mask":
            picture.paste((0, 0, 0), (0, 0, 32, 16))
        picture.save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in ("a", "b", "mask")]


def test_pictures_are_edited_and_resumed(model, tmp_path, pictures):
    one, other, mask = pictures
    edits = {
        "image": ["--init_image", one, "--strength", "0.5"],
        "inpainting": ["--init_image", one, "--mask", mask],
        "interpolation": ["--interpolate", one, other],
    }
    for name, edit in edits.items():
        options = ["--model", str(model), "--steps", "4", "--num_images", "3", "--batch_size", "2", *edit]
        sample_script.main([*options, "--output_dir", str(tmp_path / name)])
        made = pixels(tmp_path / name)
        assert len(made) == 3 and all(image.shape == (8, 8) for image in made.values())
        if name == "inpainting":
            assert all((image[:4] == 40).all() and (image[4:] != 40).any() for image in made.values())
        (tmp_path / name / "seed0-000002.png").unlink()
        sample_script.main([*options, "--output_dir", str(tmp_path / name)])
        for file, image in pixels(tmp_path / name).items():
            assert np.array_equal(image, made[file])
    with pytest.raises(SystemExit, match="made with other options .*init_image"):
        options[-3:] = ["--init_image", one]
        sample_script.main([*options, "--output_dir", str(tmp_path / "interpolation")])
    with pytest.raises(SystemExit, match="made with other options .*num_images 3, now 4"):
        options[-2:] = edits["interpolation"]
        sample_script.main([*options, "--num_images", "4", "--output_dir", str(tmp_path / "interpolation")])


@pytest.mark.parametrize("format", ["png", "npz", "parquet"])
def test_grid_and_animation_show_the_images(model, tmp_path, capsys, format):
    options = ["--model", str(model), "--steps", "4", "--num_images", "4", "--format", format]
    options += ["--grid", str(tmp_path / "grid.png"), "--gif", str(tmp_path / "denoising.webp")]
    sample_script.main([*options, "--output_dir", str(tmp_path / "out")])
    pipe = DDPMPipelineCustom.from_pretrained(model)
    expected = quantize(sample_images(pipe, range(4), 4, 0, 4), 8)[..., 0]
    expected = expected.repeat(8, 1).repeat(8, 2)  # small images are enlarged to 64 pixels
    expected = np.pad(expected, [(0, 0), (0, 2), (0, 2)], constant_values=255)  # white lines between them
    expected = np.concatenate([np.concatenate(row, axis=1) for row in expected.reshape(2, 2, 66, 66)])[:-2, :-2]
    assert abs(np.asarray(Image.open(tmp_path / "grid.png")).astype(int) - expected).max() <= 1
    with Image.open(tmp_path / "denoising.webp") as animation:
        assert animation.n_frames >= 4 and animation.size == (130, 130)
    printed = capsys.readouterr().out
    assert "Grid of 4 images" in printed and "Animation of 4 images" in printed


def test_long_animations_are_thinned_out(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_script, "MAX_FRAMES", 4)
    options = ["--model", str(model), "--num_images", "1", "--gif", str(tmp_path / "a.gif")]
    sample_script.main([*options, "--output_dir", str(tmp_path / "out")])  # 20 steps
    with Image.open(tmp_path / "a.gif") as animation:
        assert 4 <= animation.n_frames <= 9


def test_a_video_needs_its_libraries_before_any_image_is_made(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    options = ["--model", str(model), "--num_images", "1", "--gif", str(tmp_path / "a.MP4")]
    with pytest.raises(SystemExit, match="an MP4 file needs imageio and PyAV: pip install"):
        sample_script.main([*options, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    sample_script.main([*options, "--output_dir", str(tmp_path / "out"), "--steps", "4"])
    assert imageio.v3.improps(tmp_path / "a.MP4", plugin="pyav").shape[1:] == (64, 64, 3)


def test_eta_and_spacing_are_those_of_the_scheduler(model, tmp_path):
    options = ["--model", str(model), "--steps", "3", "--num_images", "2", "--format", "npz", "--output_dir"]
    pipe = DDPMPipelineCustom.from_pretrained(model)
    for flags, scheduler, eta in (
        (
            ["--scheduler", "ddim", "--eta", "0.7", "--spacing", "leading"],
            make_sampler("ddim", pipe.scheduler, "leading"),
            0.7,
        ),
        (["--spacing", "linspace"], make_sampler("ddpm", pipe.scheduler, "linspace"), None),
    ):
        folder = tmp_path / "-".join(flags[:2])
        sample_script.main([*options, str(folder), *flags])
        pipe.scheduler = scheduler
        expected = quantize(sample_images(pipe, range(2), 3, 0, 2, eta=eta), 8)
        assert np.array_equal(np.load(folder / "seed0-2.npz")["arr_0"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init_image", "nowhere.png"], "init_image 'nowhere.png' cannot be read"),
        (["--interpolate", "a.png"], "interpolate must be the files of two pictures"),
        (["--mask", "a.png"], "mask='a.png' needs --init_image"),
        (["--eta", "0.5"], "eta=0.5 needs a scheduler such as DDIMSchedulerCustom"),
        (["--gif", "a.avi"], "gif must be a file named .gif or .webp or .mp4"),
        (["--grid", "{out}/grid.png"], "grid must be outside of '.*out', which holds samples alone"),
        (["--gif", "/dev/null/a.gif"], "gif must be a folder that can be written to"),
        (["--scheduler", "dpm"], "scheduler must be one of.*'dpm'"),
        (["--steps", "0"], "steps must be an integer of at least 1, got 0"),
        (["--steps", "99"], "num_inference_steps.*99"),
        (["--format", "gif"], "format.*gif"),
        (["--bits", "12"], "bits.*12"),
        (["--batch_size", "0"], "batch_size.*0"),
        (["--class_label", "1"], "class_labels must be left out"),
        (["--guidance_scale", "2"], "guidance_scale=2"),
        (["--seed", "-1"], "seed.*-1"),
        (["--seed", "one"], "seed must be an integer of at least 0, got 'one'"),
        (["--device", "foo"], "device must be a device of this machine, such as 'cpu', got 'foo'"),
        (["--device", "meta"], "device must be a device of this machine, .*got 'meta'"),
        (["--guidance_scale", "nan"], r"guidance_scale must be a finite number in \(-inf, inf\), got nan"),
        (["--class_label", "nowhere.npy"], "class_label 'nowhere.npy' cannot be read"),
        (["--class_label", ""], "class_label must be text that is not empty"),
        (["--numimages", "3"], "unknown option --numimages"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(model, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}"):
        options = [option.format(out=tmp_path / "out") for option in options]
        sample_script.main(["--model", str(model), "--output_dir", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no array", pickle.dumps([1])])
def test_class_label_file_that_is_no_array_is_named(make_pipeline, tmp_path, content):
    make_pipeline(num_class_embeds=3).save_pretrained(tmp_path / "model")
    (tmp_path / "labels.npy").write_bytes(content)
    with pytest.raises(SystemExit, match="sample.py: error: class_label '.*labels.npy' cannot be read as an array"):
        sample_script.main(["--model", str(tmp_path / "model"), "--class_label", str(tmp_path / "labels.npy")])


@pytest.mark.parametrize("format", ["png", "npz"])
@pytest.mark.parametrize("place", ["/dev/null", "{folder}/file", "{folder}/link", "{folder}/file/below"])
def test_output_that_is_no_folder_is_one_sentence(model, tmp_path, format, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    options = ["--format", format, "--output_dir", place.format(folder=tmp_path)]
    with pytest.raises(SystemExit, match="sample.py: error: output_dir must be a folder"):
        sample_script.main(["--model", str(model), *options])


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_record_that_is_damaged_is_named(model, tmp_path, content):
    (tmp_path / "seed0.json").write_text(content)
    with pytest.raises(SystemExit, match="sample.py: error: output_dir .* holds seed0.json, which is no record"):
        sample_script.main(["--model", str(model), "--steps", "2", "--output_dir", str(tmp_path)])


def test_digits_quality_prints_metrics_and_updates_the_card(model, capsys):
    assert digits_quality.main(["--model", str(model), "--num_samples", "30", "--steps", "2"]) == 1
    printed = capsys.readouterr().out
    quality = json.loads((model / "metrics.json").read_text())["quality"]
    assert quality["num_samples"] == 30 and quality["sample_steps"] == 2
    assert f"{quality['recognized_validation']:.1%}" in printed and "MISSED" in printed
    assert "30 samples (2 steps, seed 0" in (model / "README.md").read_text()
    samples = sample_images(DDPMPipelineCustom.from_pretrained(model), range(30), 2, 0, batch_size=30)
    again = digits_quality.judge(samples, 2, 0)
    assert again["recognized"] == pytest.approx(quality["recognized"], abs=0.05)
    assert again["nearest_distance_quantiles"] == pytest.approx(quality["nearest_distance_quantiles"], abs=1e-2)


def test_digits_quality_needs_the_folder_of_a_run(tmp_path):
    with pytest.raises(SystemExit, match="holds no metrics.json"):
        digits_quality.main(["--model", str(tmp_path)])


def test_a_model_of_ddpm_is_sampled_as_recommended_by_default(model, tmp_path):
    options = ["--model", str(model), "--num_images", "2", "--format", "npz", "--output_dir"]

    def images(folder, *more):
        sample_script.main([*options, str(tmp_path / folder), *more])
        with np.load(tmp_path / folder / "seed0-2.npz") as arrays:
            return arrays["arr_0"]

    recommended = images("a")
    assert (recommended == images("b", "--scheduler", "unipc", "--steps", "20")).all()
    assert (recommended != images("c", "--scheduler", "ddpm")).any()  # all T steps, as `pipe()` takes
    record = json.loads((tmp_path / "a" / "seed0.json").read_text())
    assert (record["scheduler"], record["steps"]) == ("unipc", 20)
