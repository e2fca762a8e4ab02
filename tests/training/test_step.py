"""The training script with other objectives than L_simple: by class, with learned variance, with importance sampling."""

import dataclasses
import json

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
from ddpm_hf.training.config import parse_config
from ddpm_hf.training.run_data import load_images
from ddpm_hf.training.step import training_step
from ddpm_hf.training.step_randomness import draw
from tests.scripts.test_train import TINY, assert_bit_identical, assert_same_run, checkpoint, launch, run

# So few timesteps that importance sampling has left its uniform start after a few steps.
SHORT = ["--num_train_timesteps", "8", "--beta_schedule", "squaredcos_cap_v2"]
MIXED = [*SHORT, "--label_column", "label", "--num_classes", "10", "--label_dropout", "0.3"]
MIXED += ["--variance_type", "learned_range", "--loss_weighting", "min_snr", "--timestep_sampler", "loss_second_moment"]
MIXED += ["--input_perturbation", "0.1"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run with everything on that goes together, and its checkpoint."""
    folder = tmp_path_factory.mktemp("mixed")
    return folder, run(folder, *MIXED)


def sampler_state(folder, step=12):
    return load_file(folder / "checkpoints" / f"checkpoint-{step:08d}" / "timestep_sampler.safetensors")


def test_importance_sampling_and_all_draws_resume_bit_identically(mixed, tmp_path):
    folder, expected = mixed
    assert (sampler_state(folder)["counts"] >= 10).all()  # it has left its uniform start
    run(tmp_path, *MIXED)
    for stale in list_checkpoints(tmp_path / "checkpoints")[1:]:
        for file in stale.iterdir():
            file.unlink()
        stale.rmdir()
    assert_bit_identical(run(tmp_path, *MIXED), expected)
    again, before = sampler_state(tmp_path), sampler_state(folder)
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)


def test_two_processes_draw_the_timesteps_that_one_draws_from_the_losses_of_both(mixed, tmp_path):
    """Processes of other states would draw other timesteps, and end with other weights."""
    process = launch(tmp_path, *MIXED, processes=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert_same_run(checkpoint(tmp_path, 12), mixed[1])
    two, one = sampler_state(tmp_path), sampler_state(mixed[0])
    assert torch.equal(two["counts"], one["counts"])
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-5)


def test_a_model_trained_by_class_takes_labels_and_guidance(mixed):
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


def test_its_card_names_the_classes_and_says_how_to_ask_for_one(mixed):
    card = (mixed[0] / "README.md").read_text()
    assert "class_labels=0, guidance_scale=1.5)" in card and "0 0, 1 1, 2 2" in card and "label 10 stands for" in card
    assert json.loads((mixed[0] / "metrics.json").read_text())["training"]["class_names"][9] == "9"


def test_stock_diffusers_samples_it_as_its_card_says(mixed):
    """The parts in a loop: stock's pipeline hands no labels to the network."""
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


def test_a_run_on_the_bound_learns_a_variance_that_stock_s_pipeline_samples_with(tmp_path):
    saved = run(
        tmp_path, *SHORT, "--variance_type", "learned_range", "--loss_weighting", "vlb", "--learning_rate", "0.01"
    )
    assert (saved["model"]["conv_out.weight"][1] != 0).any()  # the variance's half, which started at 0
    stock, own = DDPMPipeline.from_pretrained(tmp_path), DDPMPipelineCustom.from_pretrained(tmp_path)
    for pipe in (stock, own):
        pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 8, "output_type": "np"}
    ours, theirs = (p(batch_size=2, generator=torch.Generator().manual_seed(0), **options).images for p in (own, stock))
    assert abs(ours - theirs).max() < 1e-3 and ours.std() > 0.01


# ------------------------------------------------------------------ one step


def conditional_step(**changes):
    """A step of a class-conditional network: configuration, draws, what the network was given, report, labels."""
    config = dataclasses.replace(parse_config([*TINY, *MIXED]), timestep_sampler="uniform", **changes)
    unet, scheduler = build(config)
    images, _ = load_images(config)
    batch = images[list(range(16))]
    given = []
    unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.0)
    report = training_step(Accelerator(), unet, optimizer, scheduler.diffusion, config, 5, [batch])
    draws = draw(config, 5, range(16), torch.device("cpu"))
    return config, draws, given[0], report, batch["labels"]


def test_labels_reach_the_network_and_those_left_out_are_the_null_class():
    _, draws, (_, t, labels), _, true_labels = conditional_step()
    assert draws.drop_label.any() and not draws.drop_label.all()
    assert torch.equal(labels, torch.where(draws.drop_label, 10, true_labels)) and torch.equal(t, draws.t)


def test_without_label_dropout_every_label_is_told_and_there_is_no_null_class():
    config, _, (_, _, labels), _, true_labels = conditional_step(label_dropout=0.0)
    assert torch.equal(labels, true_labels) and config.num_class_embeds == 10
    assert null_class_of(build(config)[0]) is None


def test_the_report_has_l_simple_and_what_is_minimized():
    """A fresh network gives 0: L_simple is the mean square of the noise."""
    config, draws, _, report, _ = conditional_step(loss_weighting="simple", variance_type="fixed_small")
    torch.testing.assert_close(report.losses, draws.noise.square().flatten(1).mean(1))
    assert torch.equal(report.objective, report.losses)
    _, _, _, weighted, _ = conditional_step(variance_type="fixed_small")
    assert torch.equal(weighted.losses, report.losses) and (weighted.objective <= report.losses).all()
    assert not torch.equal(weighted.objective, report.losses)


def test_a_sampler_with_a_history_must_be_given():
    config = parse_config([*TINY, *MIXED])
    with pytest.raises(ValueError, match="sampler must be given.*loss_second_moment"):
        draw(config, 0, range(16), torch.device("cpu"))
    sampler = make_timestep_sampler("loss_second_moment", 8)
    assert draw(config, 0, range(16), torch.device("cpu"), sampler).t.shape == (16,)


def test_offset_noise_is_shared_by_a_channel_and_perturbation_is_the_input_s_alone():
    shape = {"batch_size": 512, "channels": 3, "total_images": 1024}
    plain = dataclasses.replace(parse_config(TINY), **shape)
    both = dataclasses.replace(plain, offset_noise=0.2, input_perturbation=0.1)
    device = torch.device("cpu")
    draws, base = (draw(config, 3, range(512), device) for config in (both, plain))
    assert base.input_noise is base.noise or torch.equal(base.input_noise, base.noise)
    offset = draws.noise - base.noise
    assert (offset - offset[:, :, :1, :1]).abs().max() < 1e-5
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.2, rel=0.1)
    perturbation = draws.input_noise - draws.noise
    assert perturbation.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs((perturbation * draws.noise).mean().item()) < 5 * 0.1 / perturbation.numel() ** 0.5


def test_labels_are_left_out_as_often_as_asked():
    config = dataclasses.replace(parse_config([*TINY, *MIXED]), timestep_sampler="uniform")
    left_out = [draw(config, step, range(16), torch.device("cpu")).drop_label for step in range(200)]
    assert torch.stack(left_out).float().mean().item() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 3200) ** 0.5)


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
def test_labels_and_data_that_are_not_there_are_one_sentence(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"train.py: error: .*{message}"):
        run(tmp_path / "out", *options)
