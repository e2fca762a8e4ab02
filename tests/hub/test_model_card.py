"""Model cards: metadata for the Hub, figures from metrics.json, and example code that runs."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.hub.model_card import BEGIN, card_for_repository, merge_cards, plain_card
from ddpm_hf.hub.publish import published_files
from ddpm_hf.training.artifacts import write_metrics_and_card
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.presets import load_preset

CONFIG = TrainingConfig(**load_preset("digits"))
TRAINING = {
    "images_seen": 192,
    "steps": 12,
    "final_loss": 0.5,
    "seconds": 90.0,
    "images_per_second": 2.13,
    "processes": 1,
    "hardware": "cpu",
    "parameters": 1_234_567,
    "train_examples": 1437,
}
QUALITY = {
    "num_samples": 500,
    "recognized": 0.8125,
    "recognized_validation": 0.875,
    "recognized_ratio": 0.928571,
    "accuracy_validation": 0.99,
    "smallest_class_share": 0.061,
    "largest_class_share": 0.139,
    "nearest_distance_quantiles": {"0.05": 0.71, "0.5": 1.05},
    "nearest_distance_quantiles_validation": {"0.05": 0.7, "0.5": 1.04},
    "closer_than_5_percent_of_validation": 0.043,
    "closer_p_value": 0.42,
    "sample_steps": 100,
    "seed": 0,
}


# The models in model_cards/, and the largest size of their weights.
LARGEST = {"digits": 3e6, "mnist": 6e6, "cifar10-small": 12e6}
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
shipped = pytest.mark.parametrize("folder", [CARDS / name for name in LARGEST], ids=list(LARGEST))


def test_every_shipped_model_is_tested():
    assert {folder.name for folder in CARDS.iterdir()} == LARGEST.keys()


@pytest.fixture
def card(tmp_path):
    def make(**metrics):
        write_metrics_and_card(tmp_path, CONFIG.to_yaml(), {"training": TRAINING, **metrics})
        return ModelCard.load(tmp_path / "README.md")

    return make


def test_the_card_has_the_metadata_of_the_hub(card):
    data = card(quality=QUALITY).data
    assert data.library_name == "diffusers" and data.license == "apache-2.0"
    assert data.pipeline_tag == "unconditional-image-generation" and "ddpm" in data.tags
    (result,) = data.eval_results
    assert result.metric_value == pytest.approx(0.9286, abs=1e-4) and "500 samples" in result.metric_name


def test_built_in_data_sets_are_named_by_source_not_as_hub_data_sets(tmp_path):
    for preset, source in (("digits", "scikit-learn/load_digits"), ("photos", "scikit-learn/load_sample_images")):
        config = TrainingConfig(**load_preset(preset))
        write_metrics_and_card(tmp_path, config.to_yaml(), {"training": TRAINING})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.datasets is None and f"trained on {source} with" in card.text


def test_every_figure_of_the_quality_table_is_the_measured_one(card):
    text = card(quality=QUALITY).text
    for figure in ("81.2 % | 87.5 %", "6.1 %, 13.9 %", "0.710 | 0.700", "1.050 | 1.040", "4.3 % | 5.0 %", "p = 0.42"):
        assert figure in text, figure
    assert "500 samples (100 steps, seed 0" in text


def test_optimizer_and_schedule_are_named_with_their_options(tmp_path):
    for changes, words in (
        ({}, ("| Adam, β₂", f"{CONFIG.beta_schedule} β schedule, predicts")),
        (
            {"weight_decay": 0.01, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            ("| AdamW, weight decay 0.01, β₂", "β schedule rescaled to zero terminal SNR, predicts v_prediction"),
        ),
    ):
        config = dataclasses.replace(CONFIG, **changes).to_yaml()
        write_metrics_and_card(tmp_path, config, {"training": TRAINING})
        assert all(text in (tmp_path / "README.md").read_text() for text in words)


def test_a_card_without_quality_figures_says_so(card):
    unmeasured = card()
    assert "Not measured." in unmeasured.text and unmeasured.data.eval_results is None


def test_the_configuration_in_the_card_repeats_the_run(card):
    block = re.search(r"```yaml\n(.*?)```", card().text, re.DOTALL).group(1)
    assert TrainingConfig(**yaml.safe_load(block)) == CONFIG


def test_no_placeholder_is_left(card):
    text = card(quality=QUALITY).content
    assert "{{" not in text and "{%" not in text and "None" not in text.split("```yaml")[0]


def test_the_card_shows_best_timesteps_where_they_were_measured(card):
    protocol = {"sampler": "DDPMSchedulerCustom", "steps": 100, "seed": 0, "split": "train"}
    evaluation = {"protocol": protocol, "dataset": "digits", "bits_per_dim": {}, "figures": [], "memorization": {}}
    rows = [{"steps": 5, "predicted_bits_per_dim": 13.02257}, {"steps": 20, "predicted_bits_per_dim": 5.24594}]
    text = card(evaluation=evaluation | {"best_timesteps": {"rows": rows}}).text
    assert "| 5 | 13.0226 |\n| 20 | 5.2459 |\n" in text and "--timesteps best --steps N" in text
    # None with a learned variance; missing in files of earlier versions.
    for without in (evaluation, evaluation | {"best_timesteps": None}):
        assert "best" not in card(evaluation=without).text.split("## Training")[0]


def test_both_examples_of_the_card_run(card, tmp_path, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", card(quality=QUALITY).text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        code = snippet.replace('"digits"', repr(str(tmp_path))).replace(
            "num_inference_steps=100", "num_inference_steps=2"
        )
        assert str(tmp_path) in code and "=2)" in code
        names = {}
        exec(code, names)
        assert len(names["images"]) == 16


def test_metrics_are_written_with_the_card(card, tmp_path):
    card(quality=QUALITY)
    assert json.loads((Path(tmp_path) / "metrics.json").read_text())["quality"] == QUALITY


def test_the_recipe_and_cost_are_those_of_the_run(card):
    text = card(quality=QUALITY).text
    for cell in (
        "1.23 M parameters",
        "T = 1000, squaredcos_cap_v2 β",
        "rate 0.002 (cosine)",
        "192 images seen in 12 steps",
        "1.5 minutes",
    ):
        assert cell in text, cell
    assert "kWh" not in text
    assert "2.5 hours" in card(training={**TRAINING, "seconds": 9000}).text
    assert "@inproceedings{ho2020denoising" in text and "## Limits" in text


# ------------------------------------------------------------------ cards on the Hub

OURS = "---\ntags:\n- ddpm\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n\n# Mine\n\nfirst figures\n"


def test_merging_a_card_twice_changes_nothing():
    once = merge_cards(OURS, "")
    assert merge_cards(OURS, once) == once and ModelCard(once).data.license == "apache-2.0"


def test_merging_keeps_a_persons_text_and_replaces_generated_text():
    theirs = merge_cards(OURS, "---\nlicense: mit\ntags:\n- art\nmine: 1\n---\n\n# By hand\n\nAbout.\n") + "\nBelow.\n"
    renewed = merge_cards(OURS.replace("first", "second"), theirs)
    data = ModelCard(renewed).data.to_dict()
    assert (data["license"], data["tags"], data["mine"], data["library_name"]) == (
        "mit",
        ["art", "ddpm"],
        1,
        "diffusers",
    )
    assert renewed.index("# By hand") < renewed.index("second figures") < renewed.index("Below.")
    assert "first figures" not in renewed and renewed.count("# Mine") == 1


def test_generated_text_of_earlier_versions_is_replaced():
    first = merge_cards(OURS, "")
    assert BEGIN.format("0" * 16).split(": ")[1] in first
    earlier = first.replace("the text between these two lines", "what lies between these two lines")
    assert earlier != first and merge_cards(OURS, earlier) == first


def test_edits_of_generated_text_are_kept_below_it():
    edited = merge_cards(OURS, "").replace("first figures", "first figures, by a careful person")
    renewed = merge_cards(OURS.replace("first", "second"), edited)
    assert (
        renewed.index("second figures")
        < renewed.index("## From an earlier card")
        < renewed.index("by a careful person")
    )
    assert merge_cards(OURS.replace("first", "second"), renewed) == renewed


def test_results_of_this_model_are_replaced_and_others_stay():
    def index(name, value):
        result = f"{{task: {{type: t}}, dataset: {{type: d, name: d}}, metrics: [{{type: m, value: {value}}}]}}"
        return f"---\nmodel-index:\n- name: {name}\n  results: [{result}]\n---\n\n# mine\n"

    both = merge_cards(index("mine", 2), merge_cards(index("mine", 1), index("theirs", 7)))
    values = {
        e["name"]: e["results"][0]["metrics"][0]["value"] for e in yaml.safe_load(both.split("---")[1])["model-index"]
    }
    assert values == {"theirs": 7, "mine": 2}
    assert "theirs" in merge_cards("# mine\n", both).split("---")[1] and "value: 2" not in merge_cards("# mine\n", both)


@pytest.mark.parametrize(
    "theirs", ["---\n: [\n---\ntext\n", "---\nnever closed\n", "plain text", "---\n- a list\n---\ntext"]
)
def test_a_card_with_invalid_metadata_is_kept_as_text(theirs):
    assert theirs.strip() in merge_cards(OURS, theirs)


def test_the_examples_of_a_plain_card_run(tmp_path, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path)
    snippets = re.findall(
        r"```python\n(.*?)```", card_for_repository(plain_card("user/name"), str(tmp_path)), re.DOTALL
    )
    assert len(snippets) == 2
    for snippet in snippets:
        names = {}
        exec(snippet, names)
        assert len(names["images"]) == 16


def test_the_card_states_how_the_weights_are_averaged(card, tmp_path):
    assert "averaged over a half-life of 8,000 images" in " ".join(card().text.split())
    chosen = {"length": 0.1, "images_seen": 200_000, "criterion": "loss of 256 validation images", "curve": [{}, {}]}
    text = card(ema=chosen).text
    assert "power function of length σ_rel = 0.1 over 200,000 images" in text and "best of 2 lengths by loss of" in text
    assert "(ema.png)" in text and "half-life of 8,000" not in text.split("```yaml")[0]
    config = TrainingConfig(**(load_preset("digits") | {"ema_halflife_images": 0, "ema_decay": 0.9999}))
    write_metrics_and_card(tmp_path, config.to_yaml(), {"training": TRAINING})
    assert "averaged with a decay of 0.9999 per step" in (tmp_path / "README.md").read_text()


@shipped
def test_a_shipped_model_is_complete_and_small(folder):
    files = published_files(folder)
    assert {"README.md", "config.yaml", "metrics.json", "samples.png", "denoising.png", "loss.png"} <= set(files)
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < LARGEST[folder.name]
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt")]
    rows = yaml.safe_load((folder / "README.md").read_text().split("---")[1])["model-index"][0]["results"]
    metrics = json.loads((folder / "metrics.json").read_text())
    measured = {figure["value"] for figure in metrics["evaluation"]["figures"]}
    shown = [m["value"] for row in rows for m in row["metrics"] if m["type"].startswith("FD")]
    assert shown and all(min(abs(value - m) for m in measured) < 1e-4 for value in shown)


@shipped
def test_a_shipped_model_makes_the_same_images_in_diffusers(folder):
    ours, stock = (kind.from_pretrained(folder) for kind in (DDPMPipelineCustom, DDPMPipeline))
    assert ours.unet.dtype == stock.unet.dtype == torch.float32
    conditional, size = ours.unet.config.num_class_embeds is not None, ours.unet.config.sample_size
    x = start = torch.randn(2, ours.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    condition = {"class_labels": torch.tensor([3, 7])} if conditional else {}
    stock.scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in stock.scheduler.timesteps:  # what the card says, since diffusers' pipeline passes no labels
            x = stock.scheduler.step(stock.unet(x, t, **condition).sample, t, x, generator=generator).prev_sample
    ours.set_progress_bar_config(disable=True)
    images = ours(2, torch.Generator().manual_seed(1), 5, "pt", latents=start, **condition).images
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@shipped
def test_a_shipped_card_shows_exactly_the_images_in_its_folder(folder):
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (folder / "README.md").read_text())
    assert sorted(shown) == sorted(file.name for file in folder.glob("*.png"))


@shipped
def test_a_shipped_model_names_no_path_and_no_private_data(folder):
    for name in ("README.md", "config.yaml", "metrics.json"):
        text = (folder / name).read_text()
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users)/", text), name


def test_the_versions_are_those_of_the_training(card):
    text = card(training=TRAINING | {"versions": {"torch": "1.2.3+cu456"}}).text
    assert "| versions | torch 1.2.3+cu456 |" in text


@pytest.mark.parametrize(("names", "found"), [(["0", "1"], "0 to 1, for all"), (["cat", "dog"], ": 0 cat, 1 dog.")])
def test_names_of_classes_are_listed_if_they_are_more_than_numbers(tmp_path, names, found):
    config = dataclasses.replace(CONFIG, label_column="label", num_classes=2)
    write_metrics_and_card(tmp_path, config.to_yaml(), {"training": TRAINING | {"class_names": names}})
    text = ModelCard.load(tmp_path / "README.md").text
    assert found in text and "0 0" not in text


def test_the_card_of_a_student_says_how_it_is_sampled(tmp_path):
    values = dataclasses.asdict(CONFIG) | {"init_from": "user/teacher", "distill_steps": 4}
    write_metrics_and_card(tmp_path, yaml.safe_dump(values), {"training": TRAINING})
    text = ModelCard.load(tmp_path / "README.md").text
    assert "The model is distilled to 4 steps" in text and "to 4 steps of DDIM, taught by 8 of the base model" in text
