"""Which examples make the batches of a run, and how they get to the device."""

import atexit
import json
import signal
import weakref
from collections.abc import Callable, Iterator

import torch

from ddpm_hf.data.images import Images
from ddpm_hf.data.streaming import StreamedImages, StreamError
from ddpm_hf.seeds import make_generator


class GlobalBatches:
    """Which examples make the global batch of a step: consecutive runs through shuffled data, one epoch after another.

    The shuffle of an epoch depends on (seed, epoch) alone, so that step k has the same examples in any run, on any
    number of processes, resumed or not, and no example is read in order to skip it. `device` holds an epoch's order.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, device: torch.device | str = "cpu"):
        self.num_examples, self.batch_size, self.seed, self.device = num_examples, batch_size, seed, device
        self._epoch, self._order = -1, None

    def indices(self, step: int) -> torch.Tensor:
        """Indices (batch_size,) of the examples of step 0, 1, ..., by their position in the global batch, on `device`."""
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

    def __call__(self, step: int) -> list[int]:
        """`indices` as a list."""
        return self.indices(step).tolist()


class ProcessBatches(torch.utils.data.Sampler):
    """This process's share of the global batches of steps first_step .. num_steps−1, in `micro_batches` parts each."""

    def __init__(
        self, batches: GlobalBatches, first_step: int, num_steps: int, rank: int, num_processes: int, micro_batches: int
    ):
        self.batches, self.steps, self.micro_batches = batches, range(first_step, num_steps), micro_batches
        self.positions = process_positions(batches.batch_size, rank, num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        return (part.tolist() for part in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """The same as tensors on the device of `batches`."""
        for step in self.steps:
            share = self.batches.indices(step)[self.positions.start : self.positions.stop]
            yield from share.chunk(self.micro_batches)

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches


def process_positions(batch_size: int, rank: int, num_processes: int) -> range:
    """The positions in the global batch that a process computes."""
    share = batch_size // num_processes
    return range(rank * share, (rank + 1) * share)


def _ignore_signals(_worker: int) -> None:
    """A signal sent to everyone, Ctrl-C for example, must not take the images of the step away that is to be finished.
    Workers end with the process that they work for."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _shut_down(batches: weakref.ref) -> None:
    if (loader := batches()) is not None:
        loader._shutdown_workers()


class MicroBatches:
    """This process's micro-batches of steps first_step .. num_steps−1, `micro_batches` of them a step: dicts of "images"
    (B, C, H, W) and, where there are labels, "labels" (B,).

    Images in memory are chosen where they are. Others are decoded by `num_workers` processes (a stream: threads of one),
    which live as long as the run and read ahead, into pinned memory where the device is a GPU.

    Args:
        images: what is trained on; a stream goes on from `state`.
        rank, num_processes, micro_batches: see `ProcessBatches`.
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
        self.state, self.micro_batches = state, micro_batches
        sharing = (first_step, num_steps, rank, num_processes, micro_batches)
        self.is_stream = isinstance(images, StreamedImages)
        if self.is_stream:
            dataset = images.batches(batch_size, seed, *sharing, threads=num_workers, state=state)
            sampler, num_workers = None, min(1, num_workers)
        else:
            on = device if images.in_memory else "cpu"
            sampler = ProcessBatches(GlobalBatches(len(images), batch_size, seed, on), *sharing)
            dataset = images
        if sampler is not None and images.in_memory:
            self._batches = (images[part] for part in sampler.tensors())
        else:
            self._batches = iter(
                torch.utils.data.DataLoader(
                    dataset,
                    sampler=sampler,
                    batch_size=None,
                    num_workers=num_workers,
                    prefetch_factor=4 if num_workers else None,
                    pin_memory=torch.device(device).type == "cuda",
                    worker_init_fn=_ignore_signals,
                )
            )
            # Before the end of Python, which sends workers the SIGTERM that they ignore, and waits for them.
            if num_workers:
                atexit.register(_shut_down, weakref.ref(self._batches))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        if "error" in batch:
            raise StreamError(batch["error"])
        if "state" in batch:
            self.state = json.loads(batch.pop("state"))
        return batch

    def gather_state(self, gather: Callable[[list], list]) -> dict | None:
        """The state of all processes, for a checkpoint; None for what is no stream. `gather` joins every process's list."""
        if not self.is_stream:
            return None
        lanes = gather(self.state["lanes"])
        return {"lanes": lanes}

    def step(self) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of one step."""
        return (next(self) for _ in range(self.micro_batches))
