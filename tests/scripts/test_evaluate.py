"""The evaluation script on a tiny model and a tiny DINOv2 with random weights."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import diffusers
import pytest
import yaml
from ddpm_hf.scripts import evaluate
from ddpm_hf.scripts import sample as sample_script
from huggingface_hub import ModelCard

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.data.builtin import digits
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.images import Images
from ddpm_hf.training.artifacts import write_evaluation
from tests.conftest import TINY_SCHEDULER
from tests.evaluation.helpers import small_evaluation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def options(model, tmp_path):
    """Arguments of a small evaluation on a vision model of transformers."""
    return [f"--{name}={value}" for name, value in (small_evaluation(model, tmp_path) | {"steps": 5}).items()]


def measured(folder):
    return json.loads((folder / "metrics.json").read_text())["evaluation"]


def test_every_metric_is_written_with_its_protocol_and_to_the_card(model, options, capsys):
    evaluate.main(options)
    printed, evaluation = capsys.readouterr().out, measured(model)
    names = ["training, 20 steps", *(f"validation, {steps} steps" for steps in ("20", "5", "best 5"))]
    assert list(evaluation["bits_per_dim"]) == names
    for bound in evaluation["bits_per_dim"].values():
        assert bound["num_images"] == 12 and f"{bound['bits_per_dim']:.4f} ±" in printed
        assert len(bound["epsilon_mse"]) == len(bound["x_0_mse"]) == len(bound["terms"]) == len(bound["timesteps"])
    names = [figure["name"] for figure in evaluation["figures"]]
    kinds = ("FD", "KD", "precision", "recall", "density", "coverage")
    assert names == [f"{kind}-DINOv2, n = 20" for kind in kinds] and "FID" not in printed
    for figure in evaluation["figures"]:
        assert figure["name"] in printed
        protocol = figure["protocol"]
        assert protocol["num_samples"] == 20 and protocol["steps"] == 5 and protocol["seed"] == 0
        assert protocol["backbone"] == "dinov2" and len(protocol["backbone_revision"]) == 16
        assert (
            protocol["reference"] == "train split, 60 images"
            and protocol["weights"] == "averaged over a half-life of 8,000 images"
        )
        assert protocol["channels"] == "gray repeated to RGB" and "fixed_small" in protocol["sampler"]
    assert "repeated to RGB" in printed and set(evaluation["memorization"]) == {"pixels", "features"}
    assert all((model / name).is_file() for name in ("bound.png", "closest_pixels.png", "closest_features.png"))
    card = ModelCard.load(model / "README.md")
    values = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert values["FD-DINOv2"] == pytest.approx(evaluation["figures"][0]["value"], abs=1e-4)
    assert "FD-DINOv2, n = 20" in card.text and "validation, 5 steps" in card.text
    # The second evaluation reads the features of real images from the cache.
    files = {file: file.stat().st_mtime_ns for file in (model.parent / "cache").iterdir()}
    evaluate.main(options)
    assert files == {file: file.stat().st_mtime_ns for file in (model.parent / "cache").iterdir()} and len(files) == 2
    assert measured(model) == evaluation


def test_best_timesteps_are_measured_and_reported(model, options, capsys):
    evaluate.main(options)
    printed, evaluation, card = capsys.readouterr().out, measured(model), (model / "README.md").read_text()
    five, ten = evaluation["best_timesteps"]["rows"]
    assert (five["steps"], ten["steps"]) == (5, 10) and evaluation["best_timesteps"]["variance_type"] == "fixed_small"
    best, even = (evaluation["bits_per_dim"][f"validation, {name}"] for name in ("best 5 steps", "5 steps"))
    assert best["timesteps"][::-1] == five["timesteps"] and best["bits_per_dim"] < even["bits_per_dim"]
    assert best["bits_per_dim"] == pytest.approx(five["predicted_bits_per_dim"], rel=0.1)
    for row in (five, ten):
        assert f"{row['steps']} steps {row['predicted_bits_per_dim']:.4f}" in printed
        assert f"| {row['steps']} | {row['predicted_bits_per_dim']:.4f} |" in card
    evaluate.main([*options, "--steps=20"])  # as many as T: there is nothing to choose
    assert list(measured(model)["bits_per_dim"]) == ["training, 20 steps", "validation, 20 steps"]


def test_model_with_a_learned_variance_has_no_best_timesteps(model, options, make_pipeline, capsys):
    scheduler = DDPMSchedulerCustom(**TINY_SCHEDULER, variance_type="learned_range")
    make_pipeline(scheduler, in_channels=1, out_channels=2).save_pretrained(model)
    evaluate.main(options)
    assert measured(model)["best_timesteps"] is None and len(measured(model)["bits_per_dim"]) == 3
    assert "no best timesteps" in capsys.readouterr().out and "best timesteps" not in (model / "README.md").read_text()


@pytest.mark.parametrize("stock", [diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler])
def test_bound_is_that_of_ddpm_whatever_the_models_scheduler(model, options, make_pipeline, stock):
    pipe = make_pipeline(stock(**TINY_SCHEDULER), in_channels=1, out_channels=1)
    pipe.save_pretrained(model)
    evaluate.main(options)
    evaluation = measured(model)
    pipe.scheduler = DDPMSchedulerCustom(**TINY_SCHEDULER)
    pipe.save_pretrained(model)
    evaluate.main(options)
    full = "validation, 20 steps"
    assert evaluation["bits_per_dim"][full] == measured(model)["bits_per_dim"][full]
    assert evaluation["figures"] != measured(model)["figures"]  # samples are those of the model's own scheduler


def test_class_conditional_model_is_measured_with_its_labels(model, options, make_pipeline, capsys):
    make_pipeline(in_channels=1, out_channels=1, num_class_embeds=10).save_pretrained(model)
    with pytest.raises(SystemExit, match="evaluate.py: error: the model is class-conditional: label_column must say"):
        evaluate.main(options)
    with pytest.raises(SystemExit, match="label_column must be one of .*, got 'digit'"):
        evaluate.main([*options, "--label_column", "digit"])
    evaluate.main([*options, "--label_column", "label", "--variance_type", "analytic"])
    evaluation = measured(model)
    assert evaluation["protocol"]["conditions"] == "classes by their shares of the train split"
    assert evaluation["protocol"]["labels"] == "label" and len(evaluation["bits_per_dim"]) == 4


def test_samples_from_a_folder_give_the_metrics_of_their_model(model, options, tmp_path):
    evaluate.main(options)
    own = measured(model)
    folder = tmp_path / "pngs"
    sample_script.main(["--model", str(model), "--steps=5", "--num_images=20", f"--output_dir={folder}"])
    evaluate.main([*options, f"--samples={folder}"])
    assert measured(model)["figures"][0]["value"] == pytest.approx(own["figures"][0]["value"], rel=0.02)
    assert measured(model)["protocol"]["samples"] == "pngs"


def test_two_processes_give_the_metrics_of_one(model, options, tmp_path):
    evaluate.main(options)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631"]
    script = [str(ROOT / "training" / "evaluate.py"), *options, f"--output_dir={tmp_path / 'two'}"]
    done = subprocess.run(
        [*command, *script, f"--cache_dir={tmp_path / 'other'}"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = measured(model), measured(tmp_path / "two")
    for name, bound in one["bits_per_dim"].items():
        assert two["bits_per_dim"][name]["bits_per_dim"] == pytest.approx(bound["bits_per_dim"], rel=1e-4)
    for a, b in zip(one["figures"], two["figures"]):
        assert b["value"] == pytest.approx(a["value"], rel=0.02, abs=1e-3), a["name"]


def test_analytic_variance_lowers_the_bound_of_a_short_chain(model, options):
    evaluate.main(options)
    small = measured(model)["bits_per_dim"]["validation, 5 steps"]["bits_per_dim"]
    evaluate.main([*options, "--variance_type=analytic"])
    evaluation = measured(model)
    assert "analytic" in evaluation["protocol"]["sampler"]
    assert evaluation["bits_per_dim"]["validation, 5 steps"]["bits_per_dim"] < small


def test_card_of_any_origin_keeps_its_text_and_other_results(model, options, tmp_path):
    (model / "config.yaml").unlink()
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# Somebody's model\n")
    evaluate.main(options)
    write_evaluation(model, measured(model), {})
    card = ModelCard.load(model / "README.md")
    assert "# Somebody's model" in card.text and card.data.license == "mit"
    assert len(card.data.eval_results) == 3 + 6  # three bounds and six figures, not twice


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--num_samples=0"], "num_samples must be an integer of at least 1, got 0"),
        (["--output_dir=/dev/null"], "output_dir must be a folder .*'/dev/null' is not a folder"),
        (["--bound_images=1"], "bound_images must be an integer of at least 2, got 1"),
        (["--seed=-1"], "seed must be an integer of at least 0, got -1"),
        (["--steps=0"], "steps must be an integer of at least 1, got 0"),
        (["--steps=21"], "num_inference_steps must be .* got 21"),
        (["--schedulers", "ddpm", "ddmi"], "schedulers must be one of .*'ddim'.*, got 'ddmi'"),
        (["--schedulers=pndm", "--steps=7"], "steps"),
        (
            ["--variance_type=learned"],
            "variance_type must be one of .'fixed_small', 'fixed_large', 'analytic'., got 'learned'",
        ),
        (["--validation_split=nowhere"], "no split 'nowhere'.*Nor did the run hold images out"),
        (["--split=test"], "validation_split must be another split than split, which is 'test'"),
        (["--label_column=label"], "label_column must be left out for an unconditional model, got 'label'"),
        (
            ["--model=some/where"],
            "output_dir must be given for a model that is not a local folder, got model 'some/where'",
        ),
    ],
)
def test_wrong_options_are_one_sentence_and_nothing_is_written(model, options, changed, message):
    before = (model / "metrics.json").read_bytes()
    with pytest.raises(SystemExit, match=f"evaluate.py: error: .*{message}"):
        evaluate.main([*options, *changed])
    assert (model / "metrics.json").read_bytes() == before and not (model / "bound.png").exists()


def test_samples_of_another_resolution_raise(model, options, tmp_path):
    from PIL import Image

    (tmp_path / "large").mkdir()
    for i in range(20):
        Image.new("L", (9, 8)).save(tmp_path / "large" / f"{i}.png")
    with pytest.raises(SystemExit, match=r"model's resolution \(8, 8\): .*0.png is \(8, 9\)"):
        evaluate.main([*options, f"--samples={tmp_path / 'large'}"])


def test_without_validation_split_the_runs_validation_images_are_used(model, options, tmp_path, capsys):
    some = digits()["train"].select(range(90))
    some.save_to_disk(tmp_path / "one_split")
    options = [*options, f"--dataset={tmp_path / 'one_split'}"]
    run = yaml.safe_load((model / "config.yaml").read_text()) | {"validation_fraction": 0.4}
    (model / "config.yaml").write_text(yaml.safe_dump(run))
    evaluate.main(options)
    protocol = measured(model)["figures"][0]["protocol"]
    images = Images(some, ImageFormat((8, 8), 1))
    validation = images.split_validation(0.4)
    assert protocol["reference"] == f"train split, {len(images)} images" and len(images) + len(validation) == 90
    assert protocol["validation_split"] == "0.4 of train by hash" and len(protocol["dataset_revision"]) == 16


def test_data_without_a_validation_part_is_measured_against_training(model, options, tmp_path, capsys):
    digits()["train"].select(range(60)).save_to_disk(tmp_path / "one_split")
    evaluate.main([*options, f"--dataset={tmp_path / 'one_split'}"])
    evaluation, printed = measured(model), capsys.readouterr().out
    assert "no validation images: their bound, best timesteps and memorization are left out" in printed
    assert list(evaluation["bits_per_dim"]) == ["training, 20 steps"] and evaluation["best_timesteps"] is None
    assert len(evaluation["figures"]) == 6 and all(row["validation"] is None for row in evaluation["figures"])
    assert evaluation["memorization"] == {} and evaluation["protocol"]["validation_split"] is None
    assert "closest pairs" not in (model / "README.md").read_text()
    evaluate.main(options)
    assert evaluation["figures"][0]["value"] == measured(model)["figures"][0]["value"]  # the same training images


def test_features_none_measures_the_bound_alone(model, options):
    evaluate.main(options)
    bounds = measured(model)["bits_per_dim"]
    evaluate.main([*options, "--features=none"])
    evaluation = measured(model)
    assert evaluation["bits_per_dim"] == bounds and evaluation["protocol"]["num_samples"] == 0
    assert evaluation["figures"] == [] and evaluation["memorization"] == {}
    card = (model / "README.md").read_text()
    assert "validation, 20 steps" in card and "| samples |" not in card and "FD-" not in card


def test_missing_features_leave_the_bound(model, options, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no distances, because the features cannot be loaded: .*nowhere"):
        evaluate.main([*options, f"--features={tmp_path / 'nowhere'}"])
    assert len(measured(model)["bits_per_dim"]) == 4 and measured(model)["figures"] == []
    assert "bits/dim, validation, 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("samples", "real"), [(12, 60), (20, 12)])
def test_too_few_images_leave_out_the_frechet_distance_alone(model, options, tmp_path, capsys, samples, real):
    some = {name: split.select(range(real)) for name, split in digits().items()}
    datasets.DatasetDict(some).save_to_disk(tmp_path / "few")
    evaluate.main([*options, f"--num_samples={samples}", f"--dataset={tmp_path / 'few'}"])
    names = [figure["name"].split("-")[0] for figure in measured(model)["figures"]]
    assert names == ["KD", "precision", "recall", "density", "coverage"]
    assert "FD is left out: at least 13 images are needed on either side" in capsys.readouterr().out
