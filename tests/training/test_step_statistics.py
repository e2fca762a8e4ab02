"""Means between two rows of the log."""

import pytest
import torch
from accelerate import Accelerator

from ddpm_hf.training.step import StepReport
from ddpm_hf.training.step_statistics import StepStatistics


def report(t, losses, grad_norm=1.0, skipped=0.0):
    losses = torch.tensor(losses)
    return StepReport(torch.tensor(t), losses, torch.tensor(grad_norm), 3 * losses, torch.tensor(skipped))


def test_means_are_by_quartile_of_t_and_reading_starts_again():
    statistics = StepStatistics(8, Accelerator(cpu=True))
    statistics.add(report([0, 1, 2, 7], [1.0, 2.0, 4.0, 9.0], grad_norm=2.0))
    statistics.add(report([6, 6, 6, 3], [3.0, 3.0, 3.0, 6.0], grad_norm=4.0))
    row = statistics.read()
    assert row["loss_by_t_quartile"] == [1.5, 5.0, None, 4.5]
    assert (row["loss"], row["objective"], row["grad_norm"]) == pytest.approx((31 / 8, 3 * 31 / 8, 3.0))
    assert "skipped_steps" not in row
    assert statistics.read()["loss"] is None


def test_a_restored_state_continues_the_sums():
    accelerator = Accelerator(cpu=True)
    whole, first = StepStatistics(8, accelerator), StepStatistics(8, accelerator)
    for statistics in (whole, first):
        statistics.add(report([0, 5], [1.0, 2.0]))
    second = StepStatistics(8, accelerator, first.state())
    for statistics in (whole, second):
        statistics.add(report([1, 4], [float("nan"), 4.0], skipped=1.0))
        statistics.add(report([1, 4], [3.0, 4.0]))
    assert whole.read() == second.read() | {"skipped_steps": 1}
