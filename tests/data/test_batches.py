"""Batches depend on seed and step alone, and are the same from memory, from workers and on any number of processes."""

import pytest
import torch

from ddpm_hf.data.batches import GlobalBatches, MicroBatches, process_positions
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images


def test_every_epoch_has_every_image_once_in_a_new_order():
    batches = GlobalBatches(num_examples=30, batch_size=12, seed=3)
    stream = [index for step in range(10) for index in batches.indices(step).tolist()]
    epochs = [stream[i : i + 30] for i in range(0, 120, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_has_the_same_images_in_any_order_of_steps():
    straight = [GlobalBatches(7, 20, seed=0).indices(step).tolist() for step in range(6)]
    batches = GlobalBatches(7, 20, seed=0)
    assert [batches.indices(step).tolist() for step in (5, 0, 3)] == [straight[5], straight[0], straight[3]]
    assert GlobalBatches(7, 20, seed=1).indices(0).tolist() != straight[0]


@pytest.mark.parametrize(("num_processes", "micro_batches"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 1)])
def test_processes_and_micro_batches_split_the_global_batch_in_order(num_processes, micro_batches):
    batches = GlobalBatches(50, 12, seed=0)
    positions = [process_positions(12, rank, num_processes) for rank in range(num_processes)]
    shares = [[part.tolist() for part in batches.micro_batches(range(2, 5), own, micro_batches)] for own in positions]
    for i, step in enumerate(range(2, 5)):
        parts = [part for share in shares for part in share[i * micro_batches : (i + 1) * micro_batches]]
        assert sum(parts, []) == batches.indices(step).tolist()


def test_positions_of_all_processes_cover_the_batch():
    assert [i for rank in range(4) for i in process_positions(20, rank, 4)] == list(range(20))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_the_same_from_memory_and_from_workers(num_workers):
    dataset = open_dataset("digits", split="test")
    images = Images(dataset, ImageFormat((8, 8), 1), label_column="label")
    sharing = {"batch_size": 200, "seed": 1, "first_step": 1, "num_steps": 4, "rank": 1, "num_processes": 2}
    decoded = list(MicroBatches(images, **sharing, micro_batches=2, num_workers=num_workers))
    images.keep_in_memory()
    in_memory = list(MicroBatches(images, **sharing, micro_batches=2))
    assert len(decoded) == len(in_memory) == 6
    for a, b in zip(decoded, in_memory):
        assert a.keys() == b.keys() == {"images", "labels"} and len(a["images"]) == 50
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_images_on_a_device_are_indexed_there():
    """The "meta" device has no values: moving an index or an image to the host would raise."""
    images = Images(open_dataset("digits", split="test"), ImageFormat((8, 8), 1), label_column="label")
    images.keep_in_memory("meta")
    batch = next(MicroBatches(images, 400, seed=0, first_step=0, num_steps=1, device="meta"))
    assert batch["images"].device.type == batch["labels"].device.type == "meta"
    assert batch["images"].shape == (400, 1, 8, 8)
