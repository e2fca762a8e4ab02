"""Random numbers of a training step: their distribution, what they depend on, and how many are drawn."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.data.batches import process_positions
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.step_randomness import BLOCK, draw_randomness
from tests.conftest import TINY_TRAINING, flags

EVERYTHING = {"offset_noise": 0.1, "input_perturbation": 0.1, "label_dropout": 0.5, "random_flip": True}
LABELS = {"label_column": "label", "num_classes": 10}


def make_config(**changes):
    return dataclasses.replace(parse_config(flags(**TINY_TRAINING, total_images=192, seed=3)), **changes)


def draw(config, step, positions, sampler=None):
    sampler = sampler or make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
    return draw_randomness(config, step, positions, torch.device("cpu"), sampler)


def assert_rows_equal(part, whole, rows):
    assert [name for name, a, b in zip(whole._fields, part, whole) if not torch.equal(a, b[rows])] == []


def test_randomness_depends_on_seed_step_and_position_alone():
    config = make_config(**EVERYTHING, **LABELS)
    whole = draw(config, 5, range(16))
    for positions in (range(0, 8), range(8, 16), range(4, 6)):
        part = draw(config, 5, positions)
        assert all(torch.equal(a, b[positions.start : positions.stop]) for a, b in zip(part, whole))
    other_seed = dataclasses.replace(config, seed=4)
    for other in (draw(config, 6, range(16)), draw(other_seed, 5, range(16))):
        assert [name for name, a, b in zip(whole._fields, other, whole) if torch.equal(a, b)] == ["weight"]


@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_randomness_is_the_same_however_the_batch_is_divided(sampler):
    size = 4 * BLOCK + 8
    config = make_config(**EVERYTHING, **LABELS, batch_size=size, total_images=size, timestep_sampler=sampler)
    whole = draw(config, 5, range(size))
    assert len(whole.noise.flatten(1).unique(dim=0)) == size  # no two positions share their noise
    cuts = [(0, BLOCK), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (BLOCK + 3, 3 * BLOCK + 5), (size - 1, size)]
    for start, stop in cuts:
        assert_rows_equal(draw(config, 5, range(start, stop)), whole, slice(start, stop))
    for processes in (2, 3, 8, size):
        for rank in range(processes):
            positions = process_positions(size, rank, processes)
            part = draw(config, 5, positions)
            assert_rows_equal(part, whole, slice(positions.start, positions.stop))


def test_noise_does_not_depend_on_the_batch_size():
    small, large = (make_config(batch_size=size, total_images=64) for size in (8, 64))
    part, whole = (draw(config, 5, range(8)) for config in (small, large))
    assert torch.equal(part.noise, whole.noise)


class CountRandomNumbers(TorchDispatchMode):
    """Counts the numbers that operators with a generator return, and the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if (kwargs or {}).get("generator") is not None:
                self.count += result.numel()
        return result


@pytest.mark.parametrize("processes", [1, 8, 256, 1024])
@pytest.mark.parametrize("share", [4, BLOCK, 3 * BLOCK + 1])
def test_numbers_drawn_follow_the_share_of_a_process(processes, share):
    batch_size = share * processes
    size = {"batch_size": batch_size, "total_images": batch_size, "resolution": [16, 16], "channels": 3}
    config = make_config(**EVERYTHING, **LABELS, **size, timestep_sampler="uniform")
    for rank in {0, processes // 2, processes - 1}:
        with CountRandomNumbers() as drawn:
            draw(config, 0, process_positions(batch_size, rank, processes))
        # Noise and perturbation of each pixel, offset of each channel, flip, label dropout.
        per_example, examples = 2 * 3 * 16 * 16 + 3 + 1 + 1, share + 2 * (BLOCK - 1)
        assert share * per_example + batch_size <= drawn.count <= examples * per_example + batch_size
        assert drawn.largest <= max(examples * 3 * 16 * 16, batch_size)  # timesteps are drawn for the global batch


def test_timesteps_are_those_of_the_given_sampler():
    """A run's sampler, which may have learned from its losses, must be given."""
    config = make_config(num_train_timesteps=8, sample_steps=4)
    with pytest.raises(TypeError, match="sampler"):
        draw_randomness(config, 0, range(16), torch.device("cpu"))
    sampler = make_timestep_sampler("loss_second_moment", 8)
    sampler.load_state_dict({"losses": torch.eye(8)[:, :1].double().repeat(1, 10), "counts": torch.full((8,), 10)})
    drawn = draw(config, 0, range(16), sampler)
    assert (drawn.t == 0).sum() >= 14 and drawn.weight[drawn.t == 0].max() < 0.2


def test_offset_noise_is_per_channel_and_perturbation_is_in_the_input():
    plain = make_config(batch_size=512, channels=3, total_images=1024)
    both = dataclasses.replace(plain, offset_noise=0.2, input_perturbation=0.1)
    drawn, base = (draw(config, 3, range(512)) for config in (both, plain))
    assert base.input_noise is base.noise or torch.equal(base.input_noise, base.noise)
    offset = drawn.noise - base.noise
    assert (offset - offset[:, :, :1, :1]).abs().max() < 1e-5
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.2, rel=0.1)
    perturbation = drawn.input_noise - drawn.noise
    assert perturbation.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs((perturbation * drawn.noise).mean().item()) < 5 * 0.1 / perturbation.numel() ** 0.5


def test_noise_is_standard_normal_and_float32():
    noise = draw(make_config(batch_size=512, total_images=512), 0, range(512)).noise
    assert noise.dtype == torch.float32 and noise.shape == (512, 1, 8, 8)
    assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / noise.numel()) ** 0.5)


def test_labels_are_dropped_and_images_flipped_at_the_configured_rates():
    config = make_config(**LABELS, label_dropout=0.3, random_flip=True)
    drawn = [draw(config, step, range(16)) for step in range(200)]
    drop_label, flip = (torch.stack([getattr(one, name) for one in drawn]).float() for name in ("drop_label", "flip"))
    assert drop_label.mean().item() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 3200) ** 0.5)
    assert flip.mean().item() == pytest.approx(0.5, abs=5 * (0.5 * 0.5 / 3200) ** 0.5)


def test_nothing_is_dropped_or_flipped_by_default():
    drawn = draw(make_config(), 0, range(16))
    assert not drawn.drop_label.any() and not drawn.flip.any()
