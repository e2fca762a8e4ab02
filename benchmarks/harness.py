"""Timing side by side: every round calls each candidate once, in an order that changes from round to round, so that
what else the machine does falls on all of them alike. Medians and ratios are what counts; seconds are this machine's."""

import platform
import random
import statistics
import time
from collections.abc import Callable

import torch


def interleaved_medians(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` rounds."""
    for _ in range(warmup):
        for function in candidates.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    names = list(candidates)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            candidates[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_ratios(title: str, medians: dict[str, float], baseline: str) -> None:
    """One line per candidate: milliseconds, and how many times as fast as the baseline."""
    print(f"\n{title}")
    for name, seconds in medians.items():
        print(f"  {name:44s} {seconds * 1e3:10.3f} ms   {medians[baseline] / seconds:6.2f}×")


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
