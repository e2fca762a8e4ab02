"""The benchmarks that train: a classifier whose features measure samples, and the quality after so many minutes."""

import json

import numpy as np
import pytest
import torch

from benchmarks import classifier, time_to_quality
from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation.features import load_backbone
from ddpm_hf.evaluation.sample_files import npz_file
from tests.conftest import flags

SHORT = flags(images_seen=25600, width=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a classifier of digits, and its accuracy."""
    folder = tmp_path_factory.mktemp("classifier")
    return folder, classifier.main(["--dataset", "digits", "--output_dir", str(folder), *SHORT])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A file of real digits and their labels, as sample.py writes it."""
    data, file = digits()["train"], tmp_path_factory.mktemp("real") / "real.npz"
    pixels = np.stack([np.asarray(image) for image in data["image"]])[..., None]
    file.write_bytes(npz_file(pixels, data["label"]))
    return file, pixels


def test_a_classifier_recognizes_test_images_and_judges_samples(trained, real):
    folder, accuracy = trained
    assert accuracy > 0.7
    share = classifier.main(["--classifier", str(folder), "--samples", str(real[0])])
    assert abs(share - accuracy) < 0.1


def test_training_on_samples_gives_the_classification_accuracy_score(real):
    assert classifier.main(["--dataset", "digits", "--samples", str(real[0]), *SHORT]) > 0.7


def test_its_features_are_those_of_its_last_layer(trained, real):
    backbone, images = load_backbone(str(trained[0])), real[1][:20].transpose(0, 3, 1, 2)
    assert backbone.dim == 32
    model = classifier.RegNetForImageClassification.from_pretrained(trained[0]).eval()
    x = torch.from_numpy(images).repeat(1, 3, 1, 1) / 127.5 - 1
    with torch.no_grad():
        expected = model.regnet(x).pooler_output.flatten(1)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-4)


def test_images_are_shifted_and_mirrored_as_a_whole():
    images = torch.arange(28 * 8, dtype=torch.uint8).reshape(8, 28).repeat(1000, 3, 4, 1)[:, :, :28]
    random = torch.Generator().manual_seed(0)
    shifted = ((classifier.augmented(images, random, True) + 1) * 127.5).round().long()
    steps = shifted[:, 0, 14, 13:15].diff(dim=1)  # between neighbors in the middle, whatever the shift
    assert set(steps.flatten().tolist()) == {-1, 1}
    assert (
        len({tuple(row) for row in shifted[:, 0, 14].tolist()}) == 2 * 5 * 5
    )  # directions, and shifts along each side


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a dataset to train and test a classifier, or a classifier"),
        (["--classifier", "here"], "give a dataset to train and test a classifier, or a classifier"),
        (["--dataset", "digits", "--samples", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_wrong_options_of_the_classifier_are_one_sentence(options, message):
    with pytest.raises(SystemExit, match=f"classifier.py: error: .*{message}"):
        classifier.main(options)


@pytest.mark.parametrize("side", ["stock", "ddpm_hf"])
def test_both_sides_are_trained_and_measured(trained, tmp_path, capsys, side):
    options = flags(
        classifier=trained[0], output_dir=tmp_path, preset="digits-conditional", dataset="digits", side=side
    )
    options += flags(minutes=0.02, num_samples=40, steps=2, seconds_to_time=0.5, batch_size=16, bound_images=4)
    network = "--block_out_channels 8 16 --norm_num_groups 4 --attention_head_dim 8 --sample_steps 2 --warmup_steps 1"
    time_to_quality.main([*options, "--options", network])
    printed = capsys.readouterr().out.splitlines()
    words = [word.strip() for word in printed[-1].strip("|").split("|")[1:]]
    minutes, images, *measured = (float(word.replace(",", "").replace("%", "")) for word in words)
    assert minutes < 1 and images >= 16 and len(measured) == 4 and all(value > 0 for value in measured)
    (folder,) = tmp_path.glob(f"{side}*/0.02_minutes")
    DDPMPipelineCustom.from_pretrained(folder)
    assert json.loads((folder / "metrics.json").read_text())["evaluation"]["protocol"]["num_samples"] == 40
