"""Order has an address, and every way to the device gives the same batches."""

import pytest
import torch

from ddpm_hf.data.batches import GlobalBatches, MicroBatches, ProcessBatches, process_positions
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    batches = GlobalBatches(num_examples=30, batch_size=12, seed=3)
    stream = [index for step in range(10) for index in batches(step)]
    epochs = [stream[i : i + 30] for i in range(0, 120, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_has_the_same_examples_whenever_it_is_asked_for():
    straight = [GlobalBatches(7, 20, seed=0)(step) for step in range(6)]
    batches = GlobalBatches(7, 20, seed=0)
    assert [batches(step) for step in (5, 0, 3)] == [straight[5], straight[0], straight[3]]
    assert GlobalBatches(7, 20, seed=1)(0) != straight[0]


@pytest.mark.parametrize(("num_processes", "micro_batches"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 1)])
def test_processes_and_micro_batches_share_the_global_batch_out_in_order(num_processes, micro_batches):
    batches = GlobalBatches(50, 12, seed=0)
    shares = [list(ProcessBatches(batches, 2, 5, rank, num_processes, micro_batches)) for rank in range(num_processes)]
    for i, step in enumerate(range(2, 5)):
        parts = [part for share in shares for part in share[i * micro_batches : (i + 1) * micro_batches]]
        assert sum(parts, []) == batches(step)


def test_positions_of_all_processes_cover_the_batch():
    assert [i for rank in range(4) for i in process_positions(20, rank, 4)] == list(range(20))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_in_memory_and_images_decoded_by_workers_make_the_same_batches(num_workers):
    dataset = open_dataset("digits", split="test")
    images = Images(dataset, (8, 8), 1, label_column="label")
    sharing = {"batch_size": 200, "seed": 1, "first_step": 1, "num_steps": 4, "rank": 1, "num_processes": 2}
    decoded = list(MicroBatches(images, **sharing, micro_batches=2, num_workers=num_workers))
    images.keep_in_memory()
    in_memory = list(MicroBatches(images, **sharing, micro_batches=2))
    assert len(decoded) == len(in_memory) == 6
    for a, b in zip(decoded, in_memory):
        assert a.keys() == b.keys() == {"images", "labels"} and len(a["images"]) == 50
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_images_on_a_device_are_chosen_there():
    """The "meta" device has no values: whatever brought an index or an image to the host would fail on it."""
    images = Images(open_dataset("digits", split="test"), (8, 8), 1, label_column="label")
    images.keep_in_memory("meta")
    batch = next(MicroBatches(images, 400, seed=0, first_step=0, num_steps=1, device="meta"))
    assert batch["images"].device.type == batch["labels"].device.type == "meta"
    assert batch["images"].shape == (400, 1, 8, 8)
