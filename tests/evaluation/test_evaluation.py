"""Evaluations of several samplers, against references, and of what cannot be measured."""

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import ConvNextImageProcessorPil, RegNetConfig, RegNetForImageClassification

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation import measures
from ddpm_hf.evaluation.evaluation import Evaluation
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.references import read_reference
from ddpm_hf.pipelines.guidance import mark_null_class
from tests.evaluation.helpers import DIM, small_evaluation


@pytest.fixture
def evaluate(model, tmp_path):
    """A function that evaluates the small model with other options, and returns the results."""
    given = small_evaluation(model, tmp_path)

    def run(change=lambda pipe: None, **changes):
        pipe = DDPMPipelineCustom.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        change(pipe)
        settings = yaml.safe_load((model / "config.yaml").read_text())
        evaluation = Evaluation(EvaluationOptions(**(given | {"steps": [5]} | changes)), pipe, settings, None)
        evaluation.measure_bounds()
        evaluation.rows_done = sum(1 for _ in evaluation.measure_samples())
        return evaluation

    return run


def test_each_row_of_the_table_is_the_evaluation_of_its_sampler_alone(evaluate):
    chosen = {"schedulers": ["ddpm", "ddim"], "variance_type": ["fixed_small", "fixed_large"], "steps": [5, 4]}
    together = evaluate(**chosen)
    table = together.result["samplers"]
    named = [(row["scheduler"], row["variance_type"], row["steps"]) for row in table["rows"]]
    ddpm = [("ddpm", variance, steps) for variance in ("fixed_small", "fixed_large") for steps in (5, 4)]
    assert named == [*ddpm, ("ddim", None, 5), ("ddim", None, 4)] and together.rows_done == 6
    for row in table["rows"]:
        variances = None if row["variance_type"] is None else [row["variance_type"]]
        alone = evaluate(schedulers=[row["scheduler"]], variance_type=variances, steps=[row["steps"]]).result
        assert row["figures"] == {figure["name"]: figure["value"] for figure in alone["figures"]}
        assert list(row["figures"]) == table["figures"] and alone["samplers"] is None
        bound = alone["bits_per_dim"][f"validation, {row['steps']} steps"]["bits_per_dim"]
        assert row["bits_per_dim"] == (bound if row["scheduler"] == "ddpm" else None)
    assert len({row["figures"][table["figures"][0]] for row in table["rows"]}) == 6
    first = evaluate(schedulers=["ddpm"], variance_type=["fixed_small"]).result
    assert {key: together.result[key] for key in ("protocol", "figures", "memorization")} == {
        key: first[key] for key in ("protocol", "figures", "memorization")
    }


def test_saved_reference_gives_the_same_distance_without_the_data(evaluate, tmp_path):
    file = str(tmp_path / "reference.npz")
    own = evaluate(save_reference=file).result
    assert len(read_reference(file, DIM).mean) == DIM
    alone = evaluate(dataset=None, reference=file).result
    (fd,) = alone["figures"]
    assert fd["value"] == own["figures"][0]["value"] and fd["name"] == own["figures"][0]["name"]
    assert fd["protocol"]["reference"] == "reference.npz" and alone["dataset"] == "reference.npz"
    assert alone["bits_per_dim"] == alone["memorization"] == {} and alone["protocol"]["split"] is None
    beside = evaluate(reference=file).result
    assert [f["value"] for f in beside["figures"]] == [f["value"] for f in own["figures"]]
    assert [f["protocol"]["reference"] for f in beside["figures"][:2]] == ["reference.npz", "train split, 60 images"]


def test_reference_of_another_number_of_features_is_refused(evaluate, tmp_path):
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=rf"must hold 'mu' \({DIM},\) .*got \(2048,\)"):
        evaluate(reference=str(tmp_path / "inception.npz"))


def nan_at(timestep):
    """A function that makes a pipeline's network NaN at a timestep."""

    def change(pipe):
        def spoil(unet, arguments, output):
            if (torch.as_tensor(arguments[1]) == timestep).any():
                output.sample.fill_(torch.nan)

        pipe.unet.register_forward_hook(spoil)

    return change


def test_a_sampler_whose_samples_are_not_finite_leaves_the_others(evaluate, tmp_path, capsys):
    file = str(tmp_path / "reference.npz")
    evaluate(save_reference=file)
    # 4 steps, unlike 5, are at timestep 15.
    rows = evaluate(nan_at(15), dataset=None, reference=file, steps=[5, 4]).result["samplers"]["rows"]
    assert "problem" not in rows[0] and rows[0]["figures"]
    assert rows[1]["problem"] == "samples are not finite" and rows[1]["figures"] == {}
    assert "4 steps: samples must be finite" in capsys.readouterr().out
    with pytest.raises(ValueError, match="samples must be finite"):
        evaluate(nan_at(16), dataset=None, reference=file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [5, 21]}, "num_inference_steps"),
        ({"schedulers": ["ddpm", "pndm"], "steps": [5, 7]}, "7"),
        ({"label_column": "label"}, "label_column must be left out"),
        ({"samples": "nowhere.npz"}, "samples must be a folder"),
        ({"dataset": "digits/nowhere/x"}, "neither 'digits'"),
    ],
)
def test_wrong_options_are_refused_before_any_work(evaluate, monkeypatch, changes, message):
    monkeypatch.setattr(Evaluation, "measure_bounds", lambda self: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        evaluate(**changes)


def test_broken_images_that_the_run_left_out_are_left_out(evaluate, model, tmp_path):
    """In both parts; for a run that did not leave them out, the first one is named."""
    good = evaluate().result
    for split, images in digits().items():
        folder = tmp_path / "pictures" / split
        folder.mkdir(parents=True)
        for i, image in enumerate(images.select(range(60))["image"]):
            image.save(folder / f"{i:02d}.png")
        (folder / "30.5.png").write_bytes(b"broken")
    dataset = str(tmp_path / "pictures")
    with pytest.raises(ValueError, match="30.5.png"):
        evaluate(dataset=dataset)
    run = yaml.safe_load((model / "config.yaml").read_text()) | {"skip_broken_images": True}
    (model / "config.yaml").write_text(yaml.safe_dump(run))
    found = evaluate(dataset=dataset).result
    assert [f["value"] for f in found["figures"]] == [f["value"] for f in good["figures"]]
    assert found["dataset"] == "pictures"


def test_damaged_features_of_the_cache_are_computed_again(evaluate, tmp_path):
    first = evaluate().result
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    assert evaluate().result == first
    assert evaluate().result == first


@pytest.mark.parametrize("channels", [2, 4])
def test_features_of_other_channels_are_refused_or_left_out(make_pipeline, model, tmp_path, channels):
    given = small_evaluation(model, tmp_path) | {"steps": [5]}
    pipe = make_pipeline(in_channels=channels, out_channels=channels)
    with pytest.raises(ValueError, match=f"images of {channels} channels have no features"):
        Evaluation(EvaluationOptions(**given), pipe, {}, None)


def test_samples_that_a_classifier_takes_for_their_class_are_counted(make_pipeline, tmp_path):
    pipe = make_pipeline(in_channels=1, out_channels=1, num_class_embeds=11)
    mark_null_class(pipe.unet)
    pipe.save_pretrained(tmp_path / "model")
    options = small_evaluation(tmp_path / "model", tmp_path)
    sizes = {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "groups_width": 4}
    torch.manual_seed(0)
    classifier = RegNetForImageClassification(RegNetConfig(**sizes, num_labels=10)).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    ConvNextImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        tmp_path / "classifier"
    )
    options |= {"features": str(tmp_path / "classifier"), "label_column": "label", "num_samples": 40}
    evaluation = Evaluation(EvaluationOptions(**options, steps=[5]), pipe, {}, None)
    assert len(list(evaluation.measure_samples())) == 1
    (figure,) = [f for f in evaluation.result["figures"] if "recognized" in f["name"]]

    def share(images, labels):
        with torch.no_grad():
            logits = classifier(images.expand(-1, 3, -1, -1) / 127.5 - 1).logits
        return (logits.argmax(1) == labels).double().mean().item()

    data = datasets.load_from_disk(options["dataset"])
    real = [torch.from_numpy(np.array(image)).float()[None] for image in data["test"]["image"]]
    assert figure["validation"] == pytest.approx(
        share(torch.stack(real), torch.tensor(data["test"]["label"])), abs=1e-6
    )
    images = measures.model_images(data["train"], pipe.unet.config, {}, None, "label")
    labels = measures.draw_conditions(pipe, images, 40, 0)
    samples = measures.make_samples(pipe, 40, 5, 0, 256, labels)
    assert figure["value"] == pytest.approx(share(samples.float(), labels), abs=1e-6)
