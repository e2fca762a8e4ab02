"""What is printed about a run at its start: size, memory and length, then its speed and the time left."""

import math
import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator

from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.posthoc_ema import PowerEMA

TIMED_STEPS = 5  # after the first one, which compiles and allocates


def describe_run(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: torch.nn.Module,
    averages: Mapping[str, EMA | PowerEMA],
    train_examples: int | None,
    validation_examples: int,
    first_step: int,
) -> str:
    """Lines to print before the first step; `train_examples` is None for a stream."""
    parameters = sum(p.numel() for p in unet.parameters())
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    copies = 1 + len(averages["power_ema"].gammas) if "power_ema" in averages else 1
    memory = {"parameters": size, "gradients": size, "Adam": 2 * size, "averages": 4 * parameters * copies}
    shape = "×".join(str(n) for n in (*config.resolution, config.channels))
    data = "a stream of images" if train_examples is None else f"{train_examples:,} images"
    files = {
        "checkpoints/": (config.checkpoint_every_steps, " steps"),
        "log.jsonl": (config.log_every_steps, ""),
        "samples/": (config.sample_every_steps, ""),
        "ema_snapshots/": (config.ema_snapshot_every_images, " images"),
    }
    written = [f"{name} every {interval:,}{unit}" for name, (interval, unit) in files.items() if interval]
    written += [f"{config.report_to} logs"] * (config.report_to != "none")
    processes = accelerator.num_processes
    precision = "" if config.mixed_precision == "no" else f", {config.mixed_precision}"
    resumed = f", from step {first_step:,}" if first_step else ""
    return "\n".join(
        [
            f"Data        {data} of {shape} from {config.dataset}; {validation_examples or 'no'} validation images",
            f"Network     {parameters:,} parameters on {processes} process{'es' * (processes > 1)} "
            f"({accelerator.device.type}{precision})",
            f"Memory      {', '.join(f'{k} {_bytes(v)}' for k, v in memory.items())}; plus activations",
            f"Length      {config.num_steps:,} steps of {config.batch_size:,} images{resumed}",
            f"Written to  {config.output_dir}/: {', '.join(written)}; the model at the end",
        ]
    )


class SpeedReport:
    """Times the steps after the first one, once: images per second, peak memory and time left.

    Args:
        first_step: of this part of the run.
        num_steps, batch_size: of the whole run.
    """

    def __init__(self, first_step: int, num_steps: int, batch_size: int, device: torch.device):
        self.start, self.batch_size, self.device = first_step + 1, batch_size, device
        self.num_steps, self.end = num_steps, min(num_steps, self.start + TIMED_STEPS)

    def after_step(self, done: int) -> str | None:
        """A line to print, after the step that was timed last."""
        if done not in (self.start, self.end):
            return None
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.monotonic()
        if done == self.start:
            self._started = now
            return None
        steps = done - self.start
        rate = steps * self.batch_size / (now - self._started)
        module, peak = getattr(torch, self.device.type, None), ""
        if hasattr(module, "max_memory_allocated"):
            peak = f", {_bytes(module.max_memory_allocated())} peak memory"
        left = _duration((self.num_steps - done) * self.batch_size / rate)
        return f"Speed       {rate:,.1f} images/s over {steps} steps{peak}; about {left} to go"


def _bytes(number: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(number, 1)) / 3), len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
