"""`training_step`, alone and in runs of train.py, with class labels, learned variance and importance sampling."""

import dataclasses
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.pipelines.guidance import class_names_of, null_class_of
from ddpm_hf.training.build import build
from ddpm_hf.training.checkpoints import list_checkpoints
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.run_data import load_images, open_images
from ddpm_hf.training.step import training_step
from ddpm_hf.training.step_randomness import draw_randomness
from tests.training.helpers import TINY, assert_bit_identical, assert_same_run, checkpoint, run

# Few timesteps, so that importance sampling has ended its uniform phase after a few steps.
SHORT = ["--num_train_timesteps", "8", "--beta_schedule", "squaredcos_cap_v2"]
MIXED = [*SHORT, "--label_column", "label", "--num_classes", "10", "--label_dropout", "0.3"]
MIXED += ["--variance_type", "learned_range", "--loss_weighting", "min_snr", "--timestep_sampler", "loss_second_moment"]
MIXED += ["--input_perturbation", "0.1"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The folder and the last checkpoint of a run with all options that can be combined."""
    folder = tmp_path_factory.mktemp("mixed")
    return folder, run(folder, *MIXED)


def sampler_state(folder, step=12):
    return load_file(folder / "checkpoints" / f"checkpoint-{step:08d}" / "timestep_sampler.safetensors")


def test_importance_sampling_resumes_bit_identically(mixed, tmp_path):
    folder, expected = mixed
    assert (sampler_state(folder)["counts"] >= 10).all()  # its uniform phase is over
    run(tmp_path, *MIXED)
    for later in list_checkpoints(tmp_path / "checkpoints")[1:]:
        shutil.rmtree(later)
    assert_bit_identical(run(tmp_path, *MIXED), expected)
    again, before = sampler_state(tmp_path), sampler_state(folder)
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)


def test_importance_sampling_is_the_same_on_two_processes(mixed, trainer, tmp_path):
    """Processes whose samplers differ would draw different timesteps, and end with different weights."""
    codes, output = trainer.run(tmp_path / "run", *MIXED, "--dataset", "digits", processes=2)
    assert codes == [0, 0], output
    assert_same_run(checkpoint(tmp_path / "run", 12), mixed[1])
    two, one = sampler_state(tmp_path / "run"), sampler_state(mixed[0])
    assert torch.equal(two["counts"], one["counts"])
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-5)


def test_a_class_conditional_model_takes_labels_and_guidance(mixed):
    pipe = DDPMPipelineCustom.from_pretrained(mixed[0])
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.unet.config.num_class_embeds, null_class_of(pipe.unet)) == (11, 10)
    assert class_names_of(pipe.unet) == [str(i) for i in range(10)]
    assert pipe.unet.config.out_channels == 2 and pipe.scheduler.config.variance_type == "learned_range"
    options = {"seed": 0, "num_inference_steps": 4, "output_type": "pt"}
    plain = pipe(3, class_labels=[0, 1, 2], **options).images
    guided = pipe(3, class_labels=[0, 1, 2], guidance_scale=3.0, **options).images
    assert plain.isfinite().all() and guided.isfinite().all() and not torch.equal(plain, guided)
    table = pipe.unet.class_embedding.weight
    with torch.no_grad():
        table.normal_(std=3)
    assert not torch.equal(pipe(1, class_labels=0, **options).images, pipe(1, class_labels=1, **options).images)


def test_the_model_card_lists_the_classes_and_how_to_sample_one(mixed):
    card = (mixed[0] / "README.md").read_text()
    assert (
        "class_labels=0, guidance_scale=1.5)" in card
        and "one of 10 classes, 0 to 9, for" in card
        and "label 10 stands for" in card
    )
    assert json.loads((mixed[0] / "metrics.json").read_text())["training"]["class_names"][9] == "9"


def test_stock_diffusers_samples_a_class_conditional_model(mixed):
    """In a loop of our own, as the model card shows: stock's pipeline does not pass labels to the network."""
    stock, own = DDPMPipeline.from_pretrained(mixed[0]), DDPMPipelineCustom.from_pretrained(mixed[0])
    own.set_progress_bar_config(disable=True)
    labels, x_T = torch.tensor([3, 4]), torch.randn(2, 1, 8, 8)
    generators = [torch.Generator().manual_seed(i) for i in (1, 1)]
    images = own(2, generators[0], class_labels=labels, latents=x_T, output_type="pt").images
    x = x_T
    stock.scheduler.set_timesteps(8)
    with torch.no_grad():
        for t in stock.scheduler.timesteps:
            output = stock.unet(x, t, class_labels=labels).sample
            x = stock.scheduler.step(output, t, x, generator=generators[1]).prev_sample
    torch.testing.assert_close((x / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=1e-3)


def test_stock_diffusers_samples_with_a_variance_learned_by_the_bound(tmp_path):
    saved = run(
        tmp_path, *SHORT, "--variance_type", "learned_range", "--loss_weighting", "vlb", "--learning_rate", "0.01"
    )
    assert (saved["model"]["conv_out.weight"][1] != 0).any()  # the channel of the variance, zero-initialized
    stock, own = DDPMPipeline.from_pretrained(tmp_path), DDPMPipelineCustom.from_pretrained(tmp_path)
    for pipe in (stock, own):
        pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 8, "output_type": "np"}
    ours, theirs = (p(batch_size=2, generator=torch.Generator().manual_seed(0), **options).images for p in (own, stock))
    assert abs(ours - theirs).max() < 1e-3 and ours.std() > 0.01


def conditional_step(**changes):
    """A step of a class-conditional network: configuration, randomness, inputs of the network, report, labels."""
    config = dataclasses.replace(parse_config([*TINY, *MIXED]), timestep_sampler="uniform", **changes)
    unet, scheduler = build(config)
    images, _ = load_images(config)
    batch = images[list(range(16))]
    inputs_seen = []
    unet.register_forward_pre_hook(lambda _, inputs: inputs_seen.append(inputs))
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.0)
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
    report = training_step(Accelerator(), unet, optimizer, scheduler.diffusion, config, 5, [batch], sampler)
    randomness = draw_randomness(config, 5, range(16), torch.device("cpu"), sampler)
    return config, randomness, inputs_seen[0], report, batch["labels"]


def test_dropped_labels_are_the_null_class_and_others_are_unchanged():
    _, randomness, (_, t, labels), _, true_labels = conditional_step()
    assert randomness.drop_label.any() and not randomness.drop_label.all()
    assert torch.equal(labels, torch.where(randomness.drop_label, 10, true_labels)) and torch.equal(t, randomness.t)


def test_without_label_dropout_no_label_is_changed():
    config, _, (_, _, labels), _, true_labels = conditional_step(label_dropout=0.0)
    assert torch.equal(labels, true_labels) and config.num_class_embeds == 10
    assert null_class_of(build(config)[0]) is None


def test_a_step_on_vectors_minimizes_the_objective_of_each_vector():
    config = parse_config([*TINY, "--label_column", "label", "--class_embed_type", "identity"])
    unet, scheduler = build(config)
    for parameter in unet.parameters():  # some are initialized to 0
        torch.nn.init.normal_(parameter, std=0.1)
    images, _ = open_images(parse_config(TINY))
    batch = {"images": images[range(16)]["images"], "labels": torch.randn(16, config.condition_width)}
    sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
    random = draw_randomness(config, 0, range(16), torch.device("cpu"), sampler)
    x_0 = batch["images"] / 127.5 - 1
    expected, other = (
        config.objective(unet, scheduler.diffusion, x_0, random.t, random.noise, labels).objective
        for labels in (batch["labels"], batch["labels"].flip(0))
    )
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.0)
    report = training_step(Accelerator(), unet, optimizer, scheduler.diffusion, config, 0, [batch], sampler)
    torch.testing.assert_close(report.losses, expected.detach())
    assert not torch.allclose(report.losses, other.detach(), rtol=1e-3)


def test_the_report_has_l_simple_and_the_minimized_objective():
    """A new network returns 0, so that L_simple is the mean square of the noise."""
    config, randomness, _, report, _ = conditional_step(loss_weighting="simple", variance_type="fixed_small")
    torch.testing.assert_close(report.losses, randomness.noise.square().flatten(1).mean(1))
    assert torch.equal(report.objective, report.losses)
    _, _, _, weighted, _ = conditional_step(variance_type="fixed_small")
    assert torch.equal(weighted.losses, report.losses) and (weighted.objective <= report.losses).all()
    assert not torch.equal(weighted.objective, report.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--label_column", "label", "--num_classes", "9"],
            "num_classes must be 10, the classes of the column 'label'",
        ),
        (["--label_column", "image", "--num_classes", "10"], r"label_column must be one of \['label'\], got 'image'"),
        (["--config", "lsun-cat-256"], "dataset must be given.*--dataset"),
    ],
)
def test_missing_labels_and_data_are_reported_in_one_sentence(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"train.py: error: .*{message}"):
        run(tmp_path / "out", *options)
