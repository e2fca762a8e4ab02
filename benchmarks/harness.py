"""Side-by-side timing: each round calls every candidate once, in a random order, so that other load on the machine
affects all candidates alike. Compare medians and ratios; seconds depend on the machine."""

import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# Accelerate's names of mixed precision, and the dtype of convolutions.
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Threads of one library wait for work by spinning, for milliseconds after a call. Before a candidate is timed, it runs
# until those of the candidate before it sleep, unless it takes long itself.
SETTLING_SECONDS = 0.03


def interleaved_medians(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` rounds."""

    def call(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def settle(name: str) -> None:
        for _ in range(int(SETTLING_SECONDS / warm[name])):
            call(candidates[name])

    warm = {name: min(call(function) for _ in range(max(warmup, 1))) for name, function in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    names = list(candidates)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            settle(name)
            seconds[name].append(call(candidates[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several matrix products (on a GPU) or convolutions of a U-Net (on a CPU)."""
    candidates, operations = {}, {}
    if device.type == "cpu":
        for B, C, H in ((16, 128, 16), (128, 64, 8), (4, 256, 16)):
            x, w = (torch.randn(shape, dtype=dtype) for shape in ((B, C, H, H), (C, C, 3, 3)))
            x, w = (y.contiguous(memory_format=torch.channels_last) for y in (x, w))
            candidates[f"{B}×{C}×{H}×{H}"] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
            operations[f"{B}×{C}×{H}×{H}"] = 2 * 9 * B * C * C * H * H
    else:
        for n in (4096, 8192):
            a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
            candidates[f"{n}"], operations[f"{n}"] = lambda a=a, b=b: a @ b, 2 * n**3
    medians = interleaved_medians(candidates, 30)
    return max(operations[name] / seconds for name, seconds in medians.items())


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of a call of `function`, including backward passes."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def print_ratios(title: str, medians: dict[str, float], baseline: str) -> None:
    """One line per candidate: milliseconds, and the speed relative to the baseline."""
    print(f"\n{title}")
    for name, seconds in medians.items():
        print(f"  {name:44s} {seconds * 1e3:10.3f} ms   {medians[baseline] / seconds:6.2f}×")


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
