"""train.py: what a run writes, resuming, several processes, and errors."""

import json
import os
import signal
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ddpm_hf.scripts import evaluate, sample, train
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from ddpm_hf import DDPMPipelineCustom, UNet2DModelCustom
from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.training.build import build
from ddpm_hf.training.checkpoints import list_checkpoints
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import load_images
from ddpm_hf.training.step import training_step
from ddpm_hf.training.step_randomness import draw_randomness
from tests.training.helpers import (
    TINY,
    assert_bit_identical,
    assert_same_run,
    checkpoint,
    drop_checkpoints_after,
    launch,
    photo_options,
    rows,
    run,
    steps_saved,
    until,
    write_sums,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder)


def test_a_run_writes_pipeline_figures_metrics_config_and_card(straight):
    folder, _ = straight
    for file in ("model_index.json", "samples.png", "denoising.png", "loss.png", "config.yaml", "README.md"):
        assert (folder / file).stat().st_size > 0, file
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["training"]["images_seen"] == 192 and metrics["training"]["train_examples"] == 1437
    assert parse_config(["--config", str(folder / "config.yaml")]).seed == 3
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".unfinished")]


def test_the_saved_pipeline_has_the_averaged_weights(straight):
    folder, saved = straight
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    weights = pipe.unet.state_dict()
    assert all(torch.equal(weights[name], average) for name, average in saved["ema"].items())
    assert any(not torch.equal(weights[name], saved["model"][name]) for name in weights)


def weights_after_a_step(output_dir, *options):
    """Weights before a step on gradients of 1, after one of the run's optimizer, and after one of torch's Adam."""
    with ExitStack() as stack:
        run = train.prepare(parse_config([*TINY, "--output_dir", str(output_dir), *options]), stack)
        model, optimizer, *_ = train.build_training(run)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    options = {name: optimizer.defaults[name] for name in ("lr", "betas")}
    adam = torch.optim.Adam([p.clone().requires_grad_() for p in before], **options, fused=True)
    for p in adam.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    adam.step(), optimizer.step()
    return before, list(model.parameters()), adam.param_groups[0]["params"]


def test_without_weight_decay_a_step_is_bit_identical_to_adam(tmp_path):
    _, ours, adam = weights_after_a_step(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours, adam))


def test_weight_decay_shrinks_weights_apart_from_the_gradient(tmp_path):
    """Loshchilov and Hutter (2019), algorithm 2: θ − η·(Adam's step) − η·λ·θ."""
    before, ours, adam = weights_after_a_step(tmp_path, "--weight_decay", "30", "--learning_rate", "0.01")
    for start, mine, plain in zip(before, ours, adam):
        torch.testing.assert_close(mine, plain - 0.01 * 30 * start, rtol=1e-5, atol=1e-6)


def test_the_first_loss_of_a_zero_initialized_network_is_one(straight):
    folder, _ = straight
    config = parse_config([*TINY, "--config", str(folder / "config.yaml")])
    unet, scheduler = build(config)
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.0)
    images, _ = load_images(config)
    batches = [images[list(range(i * 16, i * 16 + 16))] for i in range(8)]
    training = (Accelerator(), unet, optimizer, scheduler.diffusion, config)
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
    losses = [
        training_step(*training, step, [batch], sampler).losses.mean().item() for step, batch in enumerate(batches)
    ]
    # The network gives 0, so each loss is the mean square of its noise; the rate is 0, so it stays so.
    assert sum(losses) / 8 == pytest.approx(1.0, abs=4 * (2 / (8 * 16 * 64)) ** 0.5)


@pytest.mark.parametrize(("channels", "options"), [(2, []), (5, ["--streaming"])])
def test_arrays_of_any_number_of_channels_are_trained_on(tmp_path, channels, options, capsys):
    """Trained, sampled and measured: the bound, and distances in pixels."""
    values = np.random.default_rng(0).integers(0, 65536, (60, 8, 8, channels), np.uint16)
    (tmp_path / "arrays").mkdir()
    for i, array in enumerate(values):
        np.save(tmp_path / "arrays" / f"{i}.npy", array)
    folder, data = tmp_path / "out", ["--dataset", str(tmp_path / "arrays")]
    run(folder, *data, *options, "--channels", str(channels), "--validation_fraction", "0.3", "--cpu_threads", "1")
    assert ("--format npz" in capsys.readouterr().out) == (channels == 5)
    sample.main(["--model", str(folder), "--steps=2", "--num_images=3", "--format=npz"])
    with np.load(folder / "generated" / "seed0-3.npz") as samples:
        assert samples["arr_0"].shape == (3, 8, 8, channels)
    small = ["--num_samples=10", "--steps=2", "--bound_images=4", "--bound_stride=2"]
    with pytest.raises(SystemExit, match=f"images of {channels} channels have no features"):
        evaluate.main(["--model", str(folder), *data, *small, "--features=inception"])
    evaluate.main(["--model", str(folder), *data, *small])
    evaluation = json.loads((folder / "metrics.json").read_text())["evaluation"]
    assert evaluation["figures"] == [] and list(evaluation["memorization"]) == ["pixels"]
    assert all(bound["bits_per_dim"] > 8 for bound in evaluation["bits_per_dim"].values())  # of uniform noise
    card = (folder / "README.md").read_text()
    assert card.count(', output_type="np").images') == 2 and "first three channels as red, green and blue" in card


def test_resuming_is_bit_identical_to_not_stopping(straight, tmp_path):
    folder, expected = straight
    run(tmp_path)
    drop_checkpoints_after(tmp_path, 4)
    assert_bit_identical(run(tmp_path), expected)
    assert rows(tmp_path) == rows(folder)


def test_a_damaged_checkpoint_is_reported_and_an_earlier_one_used(straight, tmp_path, caplog):
    run(tmp_path)
    damaged = tmp_path / "checkpoints" / "checkpoint-00000012" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 255
    damaged.write_bytes(content)
    assert_bit_identical(run(tmp_path), straight[1])
    assert "model.safetensors is missing or does not have the checksum" in caplog.text


def test_micro_batches_make_the_same_run(straight, tmp_path):
    assert_same_run(run(tmp_path, "--micro_batch_size", "4"), straight[1])


def test_a_checkpoint_with_another_configuration_is_refused(straight):
    folder, saved = straight
    with pytest.raises(SystemExit, match="saved with a different configuration:(.|\n)*seed: 3 there, 4 here"):
        run(folder, "--seed", "4")
    assert_bit_identical(checkpoint(folder, 12), saved)


def test_overwrite_starts_again(straight, tmp_path):
    run(tmp_path, "--seed", "4")
    assert_bit_identical(run(tmp_path, "--overwrite"), straight[1])


def test_a_streamed_run_resumes_bit_identically_and_on_two_processes(trainer, tmp_path):
    options = ["--streaming", "--shuffle_buffer", "50", "--stream_lanes", "2", "--num_workers", "1"]
    options += ["--validation_fraction", "0.1"]
    folder = tmp_path / "run"
    expected = run(folder, *options)
    metrics = json.loads((folder / "metrics.json").read_text())["training"]
    assert 100 <= metrics["validation_examples"] <= 190
    drop_checkpoints_after(folder, 4)
    assert_bit_identical(run(folder, *options), expected)
    drop_checkpoints_after(folder, 4)
    codes, output = trainer.run(folder, *options, "--dataset", "digits", processes=2)
    assert codes == [0, 0], output
    assert_same_run(checkpoint(folder, 12), expected)


def test_a_broken_image_of_a_stream_ends_the_run_with_one_sentence(photos, tmp_path):
    (photos / "07.jpg").write_bytes((photos / "07.jpg").read_bytes()[:1000])
    with pytest.raises(SystemExit, match="train.py: error: an image of the stream cannot be read: .*07.jpg"):
        run(tmp_path / "out", *photo_options(photos), "--streaming")


def test_resuming_with_another_number_of_images_is_refused(photos, tmp_path):
    run(tmp_path / "out", *photo_options(photos))
    drop_checkpoints_after(tmp_path / "out", 4)
    (photos / "07.jpg").unlink()
    with pytest.raises(SystemExit, match="the data set has 19 images; the checkpoint was trained on 20"):
        run(tmp_path / "out", *photo_options(photos))


def swap(photos):
    """The same images under each other's names: another order."""
    first, second = ((photos / name).read_bytes() for name in ("00.jpg", "01.jpg"))
    (photos / "00.jpg").write_bytes(second), (photos / "01.jpg").write_bytes(first)


def copy_over(photos):
    (photos / "07.jpg").write_bytes((photos / "08.jpg").read_bytes())


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (swap, []),
        (copy_over, []),
        (copy_over, ["--memory_limit_bytes", "0"]),
        (swap, ["--streaming"]),  # of a stream, the first images of some shards are compared
    ],
)
def test_resuming_on_other_images_of_the_same_number_is_refused(photos, tmp_path, options, change):
    run(tmp_path / "out", *photo_options(photos), *options)
    drop_checkpoints_after(tmp_path / "out", 4)
    before = checkpoint(tmp_path / "out", 4)
    change(photos)
    with pytest.raises(SystemExit, match="other images or labels than the checkpoint.*Use the same data.*--overwrite"):
        run(tmp_path / "out", *photo_options(photos), *options)
    assert_bit_identical(checkpoint(tmp_path / "out", 4), before)


def test_resuming_with_other_labels_is_refused(photos, tmp_path):
    rows = [f"{file.name},{i % 2}" for i, file in enumerate(sorted(photos.iterdir()))]
    (photos / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]))
    options = [*photo_options(photos), "--label_column", "kind"]
    run(tmp_path / "out", *options)
    drop_checkpoints_after(tmp_path / "out", 4)
    (photos / "metadata.csv").write_text("\n".join(["file_name,kind", *rows[:-1], rows[-1].replace(",1", ",0")]))
    with pytest.raises(SystemExit, match="other images or labels than the checkpoint was trained on"):
        run(tmp_path / "out", *options)


def test_a_run_saved_without_a_fingerprint_stays_resumable(photos, tmp_path):
    run(tmp_path / "out", *photo_options(photos))
    drop_checkpoints_after(tmp_path / "out", 4)
    (saved,) = list_checkpoints(tmp_path / "out" / "checkpoints")
    state = json.loads((saved / "state.json").read_text())
    assert len(state["data"].pop("fingerprint")) == 64
    (saved / "state.json").write_text(json.dumps(state))
    write_sums(saved)
    run(tmp_path / "out", *photo_options(photos))


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("file", "file' is not a folder"),
        ("dangling", "dangling' is a link to '.*', which does not exist"),
        ("/dev/null", "'/dev/null' is not a folder"),
        *(
            (f"run/{name}", f"{name}' is a folder")
            for name in ("config.yaml", "log.jsonl", "samples.png", "metrics.json")
        ),
        *((f"run/{name}", f"{name}' is not a folder") for name in ("checkpoints", "unet", "samples")),
    ],
)
@pytest.mark.parametrize("option", [[], ["--dry_run"]])
def test_a_place_that_cannot_be_written_to_is_refused_before_training(tmp_path, place, problem, option):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    if place.startswith("run"):
        (tmp_path / place).mkdir() if "." in place else (tmp_path / place).touch()
    before = sorted(tmp_path.rglob("*"))
    folder = tmp_path / (place.split("/")[0] if place.startswith("run") else place)
    with pytest.raises(SystemExit, match=f"train.py: error: output_dir must be a folder .*{problem}"):
        run(folder, *option)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["link", "mount", "parts"])
def test_a_run_on_another_disk_is_the_same_run(straight, tmp_path, other_disk, mount, place):
    folder, options = tmp_path / "run", ["--sample_every_steps", "6", "--ema_snapshot_every_images", "48"]
    if place == "link":
        folder.symlink_to(other_disk)
    elif place == "mount":
        mount("run", "size=64m")
    else:
        for part in ("checkpoints", "unet", "samples", "ema_snapshots", "logs"):
            (other_disk / part).mkdir()
            folder.mkdir(exist_ok=True)
            (folder / part).symlink_to(other_disk / part)
    for _ in range(2):  # the second one replaces what the first one has written
        found = run(folder, *options, "--overwrite", "--keep_checkpoints", "1")
    assert_bit_identical(found, straight[1])
    DDPMPipelineCustom.from_pretrained(folder)
    assert steps_saved(folder) == [12]
    assert not [path for path in (*tmp_path.rglob("*"), *other_disk.rglob("*")) if "unfinished" in path.name]


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
    images, _ = load_images(config)
    parts = config.micro_batches(1)
    batches = MicroBatches(images, config.batch_size, 0, 0, steps, micro_batches=parts)
    training = (accelerator, model, optimizer, scheduler.diffusion, config)
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
    return [training_step(*training, step, batches.step(), sampler) for step in range(steps)]


def test_classes_need_not_be_counted_by_the_user(tmp_path):
    options = [*TINY, "--label_column", "label", "--label_dropout", "0.1", "--total_images", "16"]
    for name, given in (("counted", []), ("given", ["--num_classes", "10"])):
        train.main([*options, *given, "--output_dir", str(tmp_path / name)])
    here, there = (
        load_file(tmp_path / n / "unet" / "diffusion_pytorch_model.safetensors") for n in ("counted", "given")
    )
    assert all(torch.equal(here[key], there[key]) for key in there) and here.keys() == there.keys()
    configs = [(tmp_path / name / "config.yaml").read_text().replace(name, "") for name in ("counted", "given")]
    assert configs[0] == configs[1] and "num_classes: 10" in configs[0]


def test_compiled_training_is_eager_training_with_accumulation(accelerators):
    backend = CompileCounterWithBackend("aot_eager")
    config = parse_config([*TINY, "--block_out_channels", "8", "8", "--micro_batch_size", "8"])
    eager, compiled = (reports(accelerators(), config, b) for b in (None, backend))
    assert backend.frame_count == 1  # one graph: nothing breaks it, and steps and parts do not compile again
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=1e-5)


def test_noise_noised_images_and_loss_are_float32_in_mixed_precision(accelerators):
    config, seen = parse_config([*TINY, "--mixed_precision", "bf16"]), {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0].dtype, output)})

    accelerator = accelerators(mixed_precision="bf16")
    unet, scheduler = build(config)
    unet.register_forward_hook(keep("network"))
    unet.conv_in.register_forward_hook(keep("convolution"))
    model, optimizer = accelerator.prepare(unet, torch.optim.Adam(unet.parameters()))
    images, _ = load_images(config)
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
    batches = [images[list(range(16))]]
    report = training_step(accelerator, model, optimizer, scheduler.diffusion, config, 0, batches, sampler)
    assert seen["network"][0] == torch.float32  # x_t, made of noise in float32
    assert seen["convolution"][1].dtype == torch.bfloat16  # and yet it is bf16 that is computed in
    assert report.losses.dtype == torch.float32
    assert draw_randomness(config, 0, range(16), torch.device("cpu"), sampler).noise.dtype == torch.float32


def test_the_training_benchmark_runs_and_both_sides_train_alike(capsys):
    from benchmarks import training as benchmark

    benchmark.main(["--presets", "digits", "--rounds", "1", "--steps", "1", "--batch_size", "8"])
    printed = capsys.readouterr().out
    assert "losses of the same draws differ by" in printed and printed.count("images/s") == 2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_sampling_benchmark_runs_and_both_sides_agree(capsys, precision):
    from benchmarks import pipeline as benchmark

    sizes = ["--network", "tiny", "--batch_size", "2", "--steps", "2", "--rounds", "1"]
    benchmark.main([*sizes, "--mixed_precision", precision])
    printed = capsys.readouterr().out
    assert "mean difference from diffusers' images in float32" in printed and printed.count("images/s") == 2


def test_no_part_of_a_run_exceeds_the_micro_batch_size(tmp_path, monkeypatch):
    """Sampling included: running out of memory at the end of a long run would be late."""
    forward, sizes = UNet2DModelCustom.forward, []

    def recorded(self, sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DModelCustom, "forward", recorded)
    run(tmp_path, "--micro_batch_size", "8", "--sample_every_steps", "6", "--validate_every_steps", "6")
    assert max(sizes) == 8


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_color_photos_trains_at_a_nonsquare_resolution(photos, tmp_path, in_memory):
    limit = [] if in_memory else ["--memory_limit_bytes", "0", "--num_workers", "1"]
    run(tmp_path / "out", *photo_options(photos), *limit)
    images = DDPMPipelineCustom.from_pretrained(tmp_path / "out")(2, num_inference_steps=2).images
    assert [(image.size, image.mode) for image in images] == [((24, 16), "RGB")] * 2


def test_a_broken_image_is_reported_before_training_or_skipped(photos, tmp_path, caplog):
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
        (["--block_out_channels", "6", "12"], "must divide the 12 channels"),
        (["--down_block_types", "DownBlock2D", "SkipDownBlock2D"], "down_block_types must be one of.*SkipDownBlock2D"),
    ],
)
def test_an_invalid_run_ends_with_one_sentence_and_no_traceback(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"train.py: error: .*{message}"):
        run(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_an_error_in_two_processes_is_printed_once_without_traceback(tmp_path):
    process = launch(tmp_path, "--resolution", "7", processes=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("train.py: error: resolution 7×7 cannot be halved") == 1
    assert "Traceback" not in output.split("train.py: error:")[0]


def test_two_killed_processes_resume_to_the_weights_of_one_process(straight, trainer, tmp_path):
    pids = trainer.start(tmp_path, "--dataset", "digits", processes=2)
    until((tmp_path / "checkpoints" / "checkpoint-00000004" / "state.json").exists, 120)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    trainer.wait(pids)
    drop_checkpoints_after(tmp_path, 8)  # if the machine was faster than the signal

    process = launch(tmp_path, processes=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "Resuming from step" in output
    assert "python training/publish.py" in output.strip().splitlines()[-1]
    assert_same_run(checkpoint(tmp_path, 12), straight[1])
    assert output.count("Network ") == 1 and "on 2 processes" in output
    for one, two in zip(rows(straight[0]), rows(tmp_path), strict=True):
        assert one.keys() == two.keys() and all(two[key] == pytest.approx(one[key], rel=1e-4) for key in one)
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["processes"] == 2
    assert np.asarray(Image.open(tmp_path / "samples.png")).size > 0
