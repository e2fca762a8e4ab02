"""The small scripts, called as a person calls them."""

import json

import digits_quality
import numpy as np
import pytest
import sample as sample_script
from finish import sample, write_metrics_and_card
from PIL import Image
from test_model_card import TRAINING
from training_config import TrainingConfig, load_preset

from ddpm_hf import DDPMPipelineCustom


@pytest.fixture
def model(make_pipeline, tmp_path):
    """The output folder of a digits run, as far as the scripts look at it."""
    folder = tmp_path / "model"
    folder.mkdir()
    make_pipeline(in_channels=1, out_channels=1).save_pretrained(folder)
    config = TrainingConfig(**load_preset("digits")).to_yaml()
    (folder / "config.yaml").write_text(config)
    write_metrics_and_card(folder, config, {"training": TRAINING})
    return folder


def pixels(folder):
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def test_an_image_of_a_seed_is_the_same_in_any_company(tiny_pipeline):
    together = sample(tiny_pipeline, range(5), 4, seed=1)
    alone = np.concatenate([sample(tiny_pipeline, [i], 4, seed=1) for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(sample(tiny_pipeline, [0], 4, seed=2) - together[:1]).max() > 0.05


def test_sampling_again_with_more_images_goes_on_where_it_ended(model, tmp_path, capsys):
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
    [(["--model", "./nowhere"], "nowhere"), (["--num_images", "0"], "num_images must be at least 1")],
)
def test_what_cannot_be_sampled_is_one_sentence(model, options, message):
    with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}"):
        sample_script.main(["--model", str(model), *options])


def test_the_quality_script_prints_the_figures_says_what_is_missed_and_updates_the_card(model, capsys):
    assert digits_quality.main(["--model", str(model), "--num_samples", "30", "--steps", "2"]) == 1
    printed = capsys.readouterr().out
    quality = json.loads((model / "metrics.json").read_text())["quality"]
    assert quality["num_samples"] == 30 and quality["sample_steps"] == 2
    assert f"{quality['recognised_held_out']:.1%}" in printed and "MISSED" in printed
    assert "30 samples (2 steps, seed 0" in (model / "README.md").read_text()
    samples = sample(DDPMPipelineCustom.from_pretrained(model), range(30), 2, 0)
    again = digits_quality.judge_digits(samples, 2, 0)
    assert again["recognised"] == pytest.approx(quality["recognised"], abs=0.05)
    assert again["nearest_distance_quantiles"] == pytest.approx(quality["nearest_distance_quantiles"], abs=1e-2)


def test_the_quality_script_wants_the_folder_of_a_run(tmp_path):
    with pytest.raises(SystemExit, match="holds no metrics.json"):
        digits_quality.main(["--model", str(tmp_path)])
