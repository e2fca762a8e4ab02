"""Which images form the batches of a run, and how they get to the device."""

import atexit
import copy
import logging
import signal
import weakref
from collections.abc import Callable, Iterator

import torch

from ddpm_hf.checks import check_device, check_int
from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamBatch, StreamedBatches, StreamedImages
from ddpm_hf.seeds import make_generator

logger = logging.getLogger("train")


class GlobalBatches:
    """The indices of the images in the global batch of each step: consecutive parts of shuffled epochs.

    The order of an epoch depends on (seed, epoch) alone. So step k has the same images on any number of processes, resumed
    or not, and resuming reads no image only to skip it. `device` holds the order of the current epoch.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, device: torch.device | str = "cpu"):
        self.num_examples, self.batch_size = (
            check_int("num_examples", num_examples, 1),
            check_int("batch_size", batch_size, 1),
        )
        self.seed, self.device = check_int("seed", seed, 0), check_device("device", device)
        self._epoch, self._order = -1, None

    def indices(self, step: int) -> torch.Tensor:
        """Indices (batch_size,) of the images of step 0, 1, ..., by position in the global batch, on `device`."""
        parts, found = [], 0
        while found < self.batch_size:
            epoch, start = divmod(step * self.batch_size + found, self.num_examples)
            if epoch != self._epoch:
                generator = make_generator("cpu", self.seed, "order", epoch)
                self._epoch = epoch
                self._order = torch.randperm(self.num_examples, generator=generator).to(self.device)
            parts.append(self._order[start : start + self.batch_size - found])
            found += len(parts[-1])
        return torch.cat(parts)

    def micro_batches(self, steps: range, positions: range, num_parts: int) -> Iterator[torch.Tensor]:
        """The indices at some positions of each step (see `process_positions`), in `num_parts` equal parts."""
        for step in steps:
            yield from self.indices(step)[positions.start : positions.stop].chunk(num_parts)


def process_positions(batch_size: int, rank: int, num_processes: int) -> range:
    """The positions in the global batch that a process computes."""
    share = batch_size // num_processes
    return range(rank * share, (rank + 1) * share)


def _ignore_signals(_worker: int) -> None:
    # A signal to all processes, such as Ctrl-C, must not stop the workers before the run has finished its step.
    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)


def _shut_down(loader: weakref.ref) -> None:
    # Before Python exits: it sends the workers SIGTERM, which they ignore, and waits for them. No public name as of
    # torch 2.13.
    if (iterator := loader()) is not None:
        iterator._shutdown_workers()


class _ReturnsErrors(torch.utils.data.Dataset):
    """Images whose errors are items, not raised: a DataLoader would add the traceback of its worker to the message."""

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor] | Exception:
        try:
            return self.images[indices]
        except (ValueError, OSError, MemoryError) as error:
            return error


class MicroBatches:
    """Iterator over this process's micro-batches of steps first_step .. num_steps−1: dicts of "images" (B, C, H, W) and,
    with a label column, "labels" (B,) or (B, D).

    Images in memory are indexed there. Others are decoded ahead by `num_workers` processes (a stream: by threads of one
    process), into pinned memory if the device is a GPU.

    Args:
        images: the images to train on.
        batch_size: images in a global batch.
        seed: of the order of the images.
        rank, num_processes: this process, and how many share a global batch.
        micro_batches: micro-batches per step.
        device: where training runs.
        state: of a stream, from `gather_state`, to resume at `first_step`.

    Raises:
        StreamError: see `StreamedImages.lanes`.
        UnreadableImage: for an image whose file was deleted or changed after it was checked.
    """

    def __init__(
        self,
        images: Images | StreamedImages,
        batch_size: int,
        seed: int,
        first_step: int,
        num_steps: int,
        rank: int = 0,
        num_processes: int = 1,
        micro_batches: int = 1,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        state: dict | None = None,
    ):
        self.micro_batches = micro_batches
        self._lane_states: list[dict] | None = None
        if isinstance(images, StreamedImages):
            lanes = images.lanes(batch_size, seed, rank, num_processes, state)
            share, steps = batch_size // num_processes, num_steps - first_step
            dataset = StreamedBatches(images, lanes, share, steps, micro_batches, max(1, num_workers))
            sampler, num_workers = None, min(1, num_workers)
        else:
            order = GlobalBatches(len(images), batch_size, seed, device if images.in_memory else "cpu")
            positions = process_positions(batch_size, rank, num_processes)
            parts = order.micro_batches(range(first_step, num_steps), positions, micro_batches)
            if images.in_memory:
                self._batches = (images[part] for part in parts)
                return
            dataset, sampler = _ReturnsErrors(images), (part.tolist() for part in parts)
        loader = torch.utils.data.DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            pin_memory=torch.device(device).type == "cuda",
            worker_init_fn=_ignore_signals,
        )
        self._batches = iter(loader)
        if num_workers:
            atexit.register(_shut_down, weakref.ref(self._batches))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        if isinstance(batch, Exception):
            # Not `batch` itself: its traceback would refer to this frame, and keep the workers alive.
            raise copy.copy(batch)
        if isinstance(batch, StreamBatch):
            self._lane_states = batch.lane_states or self._lane_states
            for warning in batch.warnings:  # here, since a worker's logger may have no handler
                logger.warning("%s", warning)
            return batch.tensors
        return batch

    def gather_state(self, gather: Callable[[list], list]) -> dict | None:
        """The state of a stream after the last step, for a checkpoint; None without a stream. `gather` concatenates the
        lists of all processes."""
        return None if self._lane_states is None else {"lanes": gather(self._lane_states)}

    def step(self) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of one step."""
        return (next(self) for _ in range(self.micro_batches))
