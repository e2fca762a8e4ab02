"""Measurements are spread over processes, and give the same result on any number of them."""

from types import SimpleNamespace

import datasets
import pytest
import torch

from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation import measures
from ddpm_hf.evaluation.metrics import frechet_distance, moments
from ddpm_hf.pipelines.guidance import cycled_labels


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("total", [7, 2])
def test_shares_of_any_number_of_processes_are_in_order(world, total, monkeypatch):
    shares = []
    for rank in range(world):
        state = SimpleNamespace(process_index=rank, num_processes=world)
        monkeypatch.setattr(measures, "PartialState", lambda state=state: state)
        shares.append(torch.tensor(measures.process_share(total), dtype=torch.float32)[:, None])
    monkeypatch.setattr(measures, "gather_object", lambda mine: shares)  # as accelerate joins the lists
    assert measures.gather_rows(shares[0])[:, 0].tolist() == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class PixelBackbone:
    """Pixels as features; counts its calls."""

    def __init__(self, resize=None):
        self.protocol, self.calls = {"backbone": "pixels", "resize": resize}, []

    def __call__(self, batch):
        self.calls.append(len(batch))
        return batch.flatten(1).float()


def test_real_features_are_computed_once_for_each_key(tmp_path):
    config = {"num_class_embeds": None, "sample_size": 8, "in_channels": 1}
    images = measures.model_images(digits()["test"].select(range(10)), config, {}, None, None)
    backbone, source = PixelBackbone(), {"dataset": "digits", "dataset_config": None, "split": "test"}
    options = {"batch_size": 4, "cache_dir": str(tmp_path)}
    first = measures.real_features(backbone, images, source, **options)
    assert torch.equal(first, images[range(10)]["images"].flatten(1).float()) and backbone.calls == [4, 4, 2]
    again = measures.real_features(backbone, images, dict(reversed(source.items())), **options)
    assert torch.equal(again, first) and len(backbone.calls) == 3
    measures.real_features(backbone, images, source | {"split": "train"}, **options)
    assert len(backbone.calls) == 6
    other = PixelBackbone(resize="bicubic")
    measures.real_features(other, images, source, **options)
    assert len(other.calls) == 3 and len(list(tmp_path.iterdir())) == 3
    padded = measures.model_images(images.dataset, config, {"crop": "pad", "background": "black"}, None, None)
    measures.real_features(backbone, padded, source, **options)
    assert len(backbone.calls) == 9 and len(list(tmp_path.iterdir())) == 4
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())


def test_classes_of_samples_have_the_shares_of_the_images(make_pipeline):
    """A perfect model of classes 90:10, whose feature is the class: in turn, the classes would give FD 0.16 + 0.04."""
    pipe = make_pipeline(in_channels=1, out_channels=1, num_class_embeds=2)
    zeros, ones = ([i for i, label in enumerate(digits()["train"]["label"]) if label == c] for c in (0, 1))
    dataset = digits()["train"].select([*zeros[:90], *ones[:10]]).cast_column("label", datasets.Value("int64"))
    images = measures.model_images(dataset, pipe.unet.config, {}, None, "label")

    def distance(labels):
        reference = images.first_labels(100)
        return frechet_distance(*(moments(x.float()[:, None]) for x in (labels, reference)))

    drawn = measures.draw_conditions(pipe, images, 50, seed=0)
    assert drawn.bincount().tolist() == [45, 5] and distance(drawn) < 1e-4
    assert distance(torch.tensor(cycled_labels(pipe.unet, range(50)))) == pytest.approx(0.2, abs=0.01)
    assert cycled_labels(pipe.unet, range(50), drawn).equal(drawn)
    assert measures.draw_conditions(pipe, images, 50, seed=0).equal(drawn)
    assert not measures.draw_conditions(pipe, images, 50, seed=1).equal(drawn)
    assert measures.draw_conditions(make_pipeline(), images, 50, seed=0) is None
    assert measures.describe_conditions(pipe, "train") == "classes by their shares of the train split"


def test_part_that_a_run_validated_on_is_split_off():
    config = {"num_class_embeds": None, "sample_size": [8, 8], "in_channels": 1}
    images = measures.model_images(digits()["train"].select(range(90)), config, {}, None, None)
    assert measures.split_as_trained(images, {}) is None and len(images) == 90
    validation = measures.split_as_trained(images, {"validation_fraction": 0.4})
    assert len(images) + len(validation) == 90 and 20 < len(validation) < 52
