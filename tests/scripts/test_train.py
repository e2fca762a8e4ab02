"""The training script itself: real processes, real data, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ddpm_hf.scripts import train
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from torch._dynamo.testing import CompileCounterWithBackend

from ddpm_hf import DDPMPipelineCustom, UNet2DModelCustom
from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.training.build import build
from ddpm_hf.training.checkpoints import list_checkpoints
from ddpm_hf.training.config import parse_config
from ddpm_hf.training.step import training_step
from ddpm_hf.training.step_randomness import draw_randomness
from tests.conftest import TINY_TRAINING, flags

ROOT = Path(__file__).resolve().parents[2]
TINY = flags(
    **TINY_TRAINING,
    total_images=192,
    checkpoint_every_steps=4,
    keep_checkpoints=10,
    log_every_steps=4,
    sample_steps=4,
    seed=3,
)


def run(output_dir, *options):
    train.main([*TINY, "--output_dir", str(output_dir), *options])
    return checkpoint(output_dir, 12)


def checkpoint(output_dir, step):
    folder = output_dir / "checkpoints" / f"checkpoint-{step:08d}"
    return {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


def tensors(saved):
    return {f"{name}/{key}": value for name, group in saved.items() for key, value in group.items()}


def rows(output_dir):
    """The log, without what depends on the clock."""
    lines = (output_dir / "log.jsonl").read_text().splitlines()
    clock = ("seconds", "images_per_second")
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def assert_bit_identical(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_same_run(a, b):
    """Equal but for the order of additions. Adam divides by a gradient's size, which blows rounding up where the
    gradient is nearly nothing; hence a bound on the whole and not on each number."""
    a, b = tensors(a), tensors(b)
    for key in a:
        if key.startswith(("model", "ema")):
            assert (a[key] - b[key]).norm() <= 1e-4 * (1e-2 + a[key].norm()), key


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder)


def test_a_run_leaves_everything_a_person_needs(straight):
    folder, _ = straight
    for file in ("model_index.json", "samples.png", "denoising.png", "loss.png", "config.yaml", "README.md"):
        assert (folder / file).stat().st_size > 0, file
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["training"]["images_seen"] == 192 and metrics["training"]["train_examples"] == 1437
    assert parse_config(["--config", str(folder / "config.yaml")]).seed == 3
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".unfinished")]


def test_what_is_published_is_the_average_of_the_weights(straight):
    folder, saved = straight
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    weights = pipe.unet.state_dict()
    assert all(torch.equal(weights[name], average) for name, average in saved["ema"].items())
    assert any(not torch.equal(weights[name], saved["model"][name]) for name in weights)


def test_the_first_loss_of_a_zero_initialized_network_is_one(straight):
    folder, _ = straight
    config = parse_config([*TINY, "--config", str(folder / "config.yaml")])
    unet, scheduler = build(config)
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.0)
    images, _ = train.load_images(config)
    batches = [images[list(range(i * 16, i * 16 + 16))] for i in range(8)]
    accelerator = Accelerator()
    losses = [
        training_step(accelerator, unet, optimizer, scheduler.diffusion, config, step, [batch]).losses.mean().item()
        for step, batch in enumerate(batches)
    ]
    # The network gives 0, so each loss is the mean square of its noise; the rate is 0, so it stays so.
    assert sum(losses) / 8 == pytest.approx(1.0, abs=4 * (2 / (8 * 16 * 64)) ** 0.5)


def test_resuming_is_bit_identical_to_not_stopping(straight, tmp_path):
    folder, expected = straight
    run(tmp_path)
    for stale in list_checkpoints(tmp_path / "checkpoints")[1:]:
        for file in stale.iterdir():
            file.unlink()
        stale.rmdir()
    assert_bit_identical(run(tmp_path), expected)
    assert rows(tmp_path) == rows(folder)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(straight, tmp_path, caplog):
    run(tmp_path)
    damaged = tmp_path / "checkpoints" / "checkpoint-00000012" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 255
    damaged.write_bytes(content)
    assert_bit_identical(run(tmp_path), straight[1])
    assert "model.safetensors does not have the checksum" in caplog.text


def test_micro_batches_make_the_same_run(straight, tmp_path):
    assert_same_run(run(tmp_path, "--micro_batch_size", "4"), straight[1])


def test_a_checkpoint_of_another_configuration_is_refused_before_any_training(straight):
    folder, saved = straight
    with pytest.raises(SystemExit, match="made under another configuration:(.|\n)*seed: 3 there, 4 asked for"):
        run(folder, "--seed", "4")
    assert_bit_identical(checkpoint(folder, 12), saved)


def test_overwrite_starts_again(straight, tmp_path):
    run(tmp_path, "--seed", "4")
    assert_bit_identical(run(tmp_path, "--overwrite"), straight[1])


def drop_checkpoints_after(folder, first):
    for stale in list_checkpoints(folder / "checkpoints")[first:]:
        shutil.rmtree(stale)


def test_a_streamed_run_resumes_bit_identically_and_goes_on_on_two_processes(tmp_path):
    options = ["--streaming", "--shuffle_buffer", "50", "--stream_lanes", "2", "--num_workers", "1"]
    options += ["--validation_fraction", "0.1"]
    expected = run(tmp_path, *options)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["training"]
    assert 100 <= metrics["validation_examples"] <= 190
    drop_checkpoints_after(tmp_path, 1)
    assert_bit_identical(run(tmp_path, *options), expected)
    drop_checkpoints_after(tmp_path, 1)
    output, _ = (process := launch(tmp_path, *options, processes=2)).communicate(timeout=200)
    assert process.returncode == 0, output
    assert_same_run(checkpoint(tmp_path, 12), expected)


def test_a_broken_image_of_a_stream_ends_the_run_in_one_sentence(photos, tmp_path):
    (photos / "07.jpg").write_bytes((photos / "07.jpg").read_bytes()[:1000])
    with pytest.raises(SystemExit, match="train.py: error: an image of the stream cannot be read: .*07.jpg"):
        run(tmp_path / "out", *photo_options(photos), "--streaming")


def test_a_data_set_that_has_grown_is_not_gone_on_with(photos, tmp_path):
    run(tmp_path / "out", *photo_options(photos))
    drop_checkpoints_after(tmp_path / "out", 1)
    (photos / "07.jpg").unlink()
    with pytest.raises(SystemExit, match="the data set has 19 images; the checkpoint was trained on 20"):
        run(tmp_path / "out", *photo_options(photos))


@pytest.fixture
def accelerators():
    """Accelerators of any precision: the library keeps one state for a process."""
    yield lambda **options: (AcceleratorState._reset_state(True), Accelerator(cpu=True, **options))[1]
    AcceleratorState._reset_state(True)


def reports(accelerator, config, backend=None, steps=3):
    """Losses and gradient norms of some steps from one start."""
    torch.manual_seed(0)
    unet, scheduler = build(config)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(torch.compile(unet, backend=backend) if backend else unet, optimizer)
    images, _ = train.load_images(config)
    parts = config.micro_batches(1)
    batches = MicroBatches(images, config.batch_size, 0, 0, steps, micro_batches=parts)
    return [
        training_step(accelerator, model, optimizer, scheduler.diffusion, config, step, batches.step())
        for step in range(steps)
    ]


def test_a_compiled_network_is_trained_as_the_eager_one_with_accumulation(accelerators):
    backend = CompileCounterWithBackend("aot_eager")
    config = parse_config([*TINY, "--block_out_channels", "8", "8", "--micro_batch_size", "8"])
    eager, compiled = (reports(accelerators(), config, b) for b in (None, backend))
    assert backend.frame_count == 1  # one graph: nothing breaks it, and steps and parts do not compile again
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=1e-5)


def test_noise_and_noised_images_are_float32_in_mixed_precision_and_so_is_the_loss(accelerators):
    config, seen = parse_config([*TINY, "--mixed_precision", "bf16"]), {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0].dtype, output)})

    accelerator = accelerators(mixed_precision="bf16")
    unet, scheduler = build(config)
    unet.register_forward_hook(keep("network"))
    unet.conv_in.register_forward_hook(keep("convolution"))
    model, optimizer = accelerator.prepare(unet, torch.optim.Adam(unet.parameters()))
    images, _ = train.load_images(config)
    report = training_step(accelerator, model, optimizer, scheduler.diffusion, config, 0, [images[list(range(16))]])
    assert seen["network"][0] == torch.float32  # x_t, made of noise in float32
    assert seen["convolution"][1].dtype == torch.bfloat16  # and yet it is bf16 that is computed in
    assert report.losses.dtype == torch.float32
    assert draw_randomness(config, 0, range(16), torch.device("cpu")).noise.dtype == torch.float32


def test_the_benchmark_of_training_runs_and_both_sides_train_alike(capsys):
    from benchmarks import training as benchmark

    benchmark.main(["--presets", "digits", "--rounds", "1", "--steps", "1", "--batch_size", "8"])
    printed = capsys.readouterr().out
    assert "losses of the same draws differ by" in printed and printed.count("images/s") == 2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_benchmark_of_sampling_runs_and_both_sides_give_the_same_images(capsys, precision):
    from benchmarks import pipeline as benchmark

    sizes = ["--network", "tiny", "--batch_size", "2", "--steps", "2", "--rounds", "1"]
    benchmark.main([*sizes, "--mixed_precision", precision])
    printed = capsys.readouterr().out
    assert "largest difference" in printed and printed.count("images/s") == 2


def test_a_run_never_computes_more_images_at_once_than_it_is_told_to(tmp_path, monkeypatch):
    """Not for its pictures either: at the end of a long run is no time to find that they do not fit."""
    forward, sizes = UNet2DModelCustom.forward, []

    def recorded(self, sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DModelCustom, "forward", recorded)
    run(tmp_path, "--micro_batch_size", "8", "--sample_every_steps", "6", "--validate_every_steps", "6")
    assert max(sizes) == 8


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(20):
        photo = load_sample_image("china.jpg" if i % 2 else "flower.jpg")
        Image.fromarray(photo[i * 10 : i * 10 + 200, i * 20 : i * 20 + 200]).save(tmp_path / "photos" / f"{i:02d}.jpg")
    return tmp_path / "photos"


def photo_options(photos):
    return ["--dataset", str(photos), "--resolution", "16", "24", "--channels", "3", "--random_flip"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_color_photographs_trains_at_a_size_that_is_not_square(photos, tmp_path, in_memory):
    limit = [] if in_memory else ["--memory_limit_bytes", "0", "--num_workers", "1"]
    run(tmp_path / "out", *photo_options(photos), *limit)
    images = DDPMPipelineCustom.from_pretrained(tmp_path / "out")(2, num_inference_steps=2).images
    assert [(image.size, image.mode) for image in images] == [((24, 16), "RGB")] * 2


def test_a_broken_image_stops_the_run_before_training_and_may_be_left_out(photos, tmp_path, caplog):
    (photos / "07.jpg").write_bytes((photos / "07.jpg").read_bytes()[:1000])
    with pytest.raises(SystemExit, match="1 of 20 images cannot be read:\n.*07.jpg(.|\n)*--skip_broken_images"):
        run(tmp_path / "out", *photo_options(photos))
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", *photo_options(photos), "--skip_broken_images")
    assert "07.jpg" in caplog.text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["training"]["train_examples"] == 19


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "nothing"], "'nothing' is neither a preset"),
        (["--dataset", "./nowhere"], "neither 'digits' nor 'photos', nor a folder"),
        (["--resolution", "7"], "cannot be halved"),
        (["--batch_size", "16", "--micro_batch_size", "5"], "must be a multiple of"),
        (["--block_out_channels", "6", "12"], "norm_num_groups"),
        (["--down_block_types", "DownBlock2D", "SkipDownBlock2D"], "SkipDownBlock2D.*supported are"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_and_no_traceback(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"train.py: error: .*{message}"):
        run(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_an_error_in_two_processes_is_said_once_and_without_a_traceback(tmp_path):
    process = launch(tmp_path, "--resolution", "7", processes=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("train.py: error: resolution 7×7 cannot be halved") == 1
    assert "Traceback" not in output.split("train.py: error:")[0]


def launch(output_dir, *options, processes):
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", str(processes)]
    return subprocess.Popen(
        [*command, str(ROOT / "training" / "train.py"), *TINY, "--output_dir", str(output_dir), *options],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_killed_in_the_middle_go_on_and_end_with_the_weights_of_one_undisturbed_process(
    straight, tmp_path
):
    # Far more steps than it lives to make: what counts is the checkpoint it leaves.
    process = launch(tmp_path, processes=2)
    first = tmp_path / "checkpoints" / "checkpoint-00000004" / "state.json"
    deadline = time.monotonic() + 120
    while not first.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for stale in list_checkpoints(tmp_path / "checkpoints")[2:]:  # where the machine was faster than the signal
        for file in stale.iterdir():
            file.unlink()
        stale.rmdir()

    process = launch(tmp_path, processes=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "Going on from step" in output
    assert "python training/publish.py" in output.strip().splitlines()[-1]
    assert_same_run(checkpoint(tmp_path, 12), straight[1])
    assert output.count("Network ") == 1 and "on 2 processes" in output
    for one, two in zip(rows(straight[0]), rows(tmp_path), strict=True):
        assert one.keys() == two.keys() and all(two[key] == pytest.approx(one[key], rel=1e-4) for key in one)
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["processes"] == 2
    assert np.asarray(Image.open(tmp_path / "samples.png")).size > 0
