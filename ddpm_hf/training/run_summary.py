"""What is printed about a run at its start: size, memory and length, then its speed and the time left."""

import math
import time
from textwrap import shorten

import torch
from accelerate import Accelerator
from datasets import ClassLabel
from tqdm import tqdm

from ddpm_hf.data.images import Images, abbreviate
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.posthoc_ema import SIGMAS

WIDTH = 40  # characters of the name of a class
TIMED_STEPS = 5  # after the first one, which compiles and allocates
MANY_PASSES, PUBLISHED_PASSES = 5000, 2000  # the longest published run of a preset, cifar10, makes 2,048
MANY_PARAMETERS = 20  # for each number in the images; the digits have 11, and their model repeats none of them


def describe_run(
    config: TrainingConfig,
    accelerator: Accelerator,
    parameters: tuple[int, int],
    examples: tuple[int | None, int],
    first_step: int,
    data: str = "",
) -> str:
    """Lines to print before the first step.

    Args:
        parameters: number of parameters of the network, which are float32, and of those that are trained.
        examples: number of training images (None for a stream) and of validation images.
        data: more lines about the images (see `describe_data`).
    """
    train_examples, validation_examples = examples
    averages = 1 + len(SIGMAS) * (config.ema_snapshot_every_images > 0)
    whole, trained = parameters
    numbers = {"parameters": whole, "gradients": trained, "Adam": 2 * trained, "averages": averages * trained}
    numbers |= {} if config.distill_steps is None else {"teacher": whole}
    memory = [f"{name} {tqdm.format_sizeof(4 * n, 'B')}" for name, n in numbers.items()]
    adapters = "" if config.lora_rank is None else f", {trained:,} of them trained as adapters,"
    shape = "×".join(str(n) for n in (*config.resolution, config.channels))
    counted = "a stream of images" if train_examples is None else f"{train_examples:,} images"
    files = {
        "checkpoints/": (config.checkpoint_every_steps, " steps"),
        "log.jsonl": (config.log_every_steps, ""),
        "samples/": (config.sample_every_steps, ""),
        "ema_snapshots/": (config.ema_snapshot_every_images, " images"),
    }
    written = [f"{name} every {interval:,}{unit}" for name, (interval, unit) in files.items() if interval]
    written += [f"{name} logs" for name in config.trackers]
    processes = accelerator.num_processes
    precision = "float32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} mixed precision"
    resumed = f", from step {first_step:,}" if first_step else ""
    passes = "" if train_examples is None else f", {count_passes(config, train_examples)} over the data"
    warnings = "".join(f"\nWarning     {line}" for line in misfits(config, trained, train_examples))
    hardware = f"{processes} process{'es' * (processes > 1)} ({accelerator.device.type}) in {precision}"
    return (
        f"Data        {counted} of {shape} from {config.dataset}; {validation_examples or 'no'} validation images\n{data}"
        f"Network     {whole:,} parameters{adapters} on {hardware}\n"
        f"Memory      {', '.join(memory)}; plus activations\n"
        f"Length      {config.total_steps:,} steps of {config.batch_size:,} images{passes}{resumed}\n"
        f"Written to  {config.output_dir}/: {', '.join(written)}; the model at the end"
        f"{warnings}"
    )


def count_passes(config: TrainingConfig, examples: int) -> str:
    """How often a run sees each image, in words."""
    passes = config.total_images / examples
    return f"{passes:,.{0 if passes >= 10 else 1}f} passes"


def misfits(config: TrainingConfig, parameters: int, examples: int | None) -> list[str]:
    """What does not fit in the length of a run and the size of its network, for its data, each with a proposal."""
    found = []
    if config.warmup_steps > config.total_steps:
        found.append(
            f"warmup_steps = {config.warmup_steps:,} is longer than the run, whose learning rate stays below "
            f"{config.learning_rate_at(config.total_steps - 1):.1e}: --warmup_steps {config.total_steps // 10}."
        )
    if examples is None:
        return found
    if config.total_images > MANY_PASSES * examples:
        found.append(
            f"{count_passes(config, examples)} over {examples:,} images teach the network to repeat them. Published runs make "
            f"about {PUBLISHED_PASSES:,}: --num_epochs {max(PUBLISHED_PASSES, -(-config.batch_size // examples))}, or more images."
        )
    numbers = examples * config.channels * math.prod(config.resolution)
    if parameters > MANY_PARAMETERS * numbers:
        found.append(
            f"{parameters / numbers:,.0f} parameters for each of the {numbers:,} numbers in the images: the network can store "
            "them all. Use more images, fewer --block_out_channels (--config folder-64 has a small network), and --dropout."
        )
    return found


def describe_data(images: Images | StreamedImages) -> str:
    """Lines about what was found: the kind and the splits of the data set, its classes, the files that are left out and why,
    and the range of values in images of more than 8 bits."""
    source, lines = images.source, {}
    many = len(source.splits) > 1
    lines["Found"] = source.kind + (f"; splits {', '.join(source.splits)}" if many else "")
    for column, feature in images.all_features.items():
        if isinstance(feature, ClassLabel) and images.label_column in (None, column):
            unused = "" if images.label_column else "; --label_column trains on them"
            names = abbreviate([shorten(name, WIDTH) for name in feature.names])
            lines["Classes"] = f"{len(feature.names)} in the column {column!r}: {names}{unused}"
    lines["Left out"] = source.left_out
    if isinstance(images, Images) and images.value_range is not None:
        low, high = images.value_range
        lines["Values"] = f"{low:g} to {high:g} in images of more than 8 bits"
    return "".join(f"{name:<12}{line}\n" for name, line in lines.items() if line)


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
        now = settled_time(self.device)
        if done == self.start:
            self._started = now
            return None
        steps = done - self.start
        rate, left = steps * self.batch_size / (now - self._started), (self.num_steps - done) * self.batch_size
        return speed_line(rate, f"{steps} steps", left, self.device)


def settled_time(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.monotonic()


def speed_line(rate: float, measured: str, images_left: int, device: torch.device) -> str:
    """The line of the summary about the speed. `rate`: images per second, `measured`: over what."""
    module, peak = getattr(torch, device.type, None), ""
    if hasattr(module, "max_memory_allocated"):
        peak = f", {tqdm.format_sizeof(module.max_memory_allocated(), 'B')} peak memory"
    shown = f"{rate:,.1f}" if rate >= 10 else f"{rate:.2g}"
    return f"Speed       {shown} images/s over {measured}{peak}; about {tqdm.format_interval(images_left / rate)} to go"
