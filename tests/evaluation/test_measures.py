"""Measurements are spread over processes, and give the same result on any number of them."""

from types import SimpleNamespace

import pytest
import torch

from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation import measures


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


def test_measured_features_are_read_from_the_cache(tmp_path):
    images = measures.model_images(
        digits()["test"].select(range(10)), {"num_class_embeds": None, "sample_size": 8, "in_channels": 1}, {}
    )
    calls = []

    def backbone(batch):
        calls.append(len(batch))
        return batch.flatten(1).float()

    backbone.protocol = {"backbone": "pixels", "resize": None}
    source = {"dataset": "digits", "dataset_config": None, "split": "test"}
    first = measures.real_features(backbone, images, source, batch_size=4, cache_dir=str(tmp_path))
    again = measures.real_features(backbone, images, source, batch_size=4, cache_dir=str(tmp_path))
    assert calls == [4, 4, 2] and torch.equal(first, again)
    assert torch.equal(first, images[range(10)]["images"].flatten(1).float())
    measures.real_features(backbone, images, source | {"split": "train"}, batch_size=10, cache_dir=str(tmp_path))
    assert len(calls) == 4


def test_part_that_a_run_validated_on_is_split_off():
    config = {"num_class_embeds": None, "sample_size": [8, 8], "in_channels": 1}
    images = measures.model_images(digits()["train"].select(range(90)), config, {})
    assert measures.split_as_trained(images, {}) is None and len(images) == 90
    validation = measures.split_as_trained(images, {"validation_fraction": 0.4})
    assert len(images) + len(validation) == 90 and 20 < len(validation) < 52
