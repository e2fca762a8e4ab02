"""Data sets larger than the disk, read as a stream: shared among processes, shuffled, and resumed exactly.

A stream is divided into `num_lanes` lanes, each with images and an order of its own. Lane l fills the l-th of `num_lanes`
equal parts of every global batch, and each process reads one or more lanes. So a run of L lanes is the same on any number
of processes that divides L, and can resume on another such number.

If the data set has at least as many shards (files) as there are lanes, a lane reads every L-th shard. Otherwise every lane
reads all shards and keeps every L-th row. The order of the shards of a lane depends on (seed, lane, epoch), the order
within a block of consecutive images on (seed, lane, block). A lane has each of its images once per epoch. Lanes of
different lengths finish their epochs at different times.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import NamedTuple

import datasets
import numpy as np
import torch

from ddpm_hf.checks import check_int
from ddpm_hf.data.checking import describe_losses, inspect, validation_hash
from ddpm_hf.data.decoding import UnreadableImage, read_entry
from ddpm_hf.data.images import ImageColumns, Images, leave_out_broken, name_of
from ddpm_hf.data.reasons import reading
from ddpm_hf.seeds import make_generator

logger = logging.getLogger(__name__)
FINGERPRINT_SHARDS = 16  # at most: each is opened once more at the start of a run
VALIDATION_LIMIT = 512  # validation images that are read from the start of a stream


class StreamError(ValueError):
    """An error that ends a run on a stream: lanes that cannot be shared evenly, no image to train on, or a broken one."""


@dataclass(eq=False)
class StreamedImages(ImageColumns):
    """The images of a stream, converted to one format.

    Args:
        dataset: a stream with a column of images.
        format, image_column, label_column: see `ImageColumns`.
        shuffle_buffer: images in a block, over all lanes. The files of up to twice as many are in memory.
        num_lanes: see the module. None: one per process, so that the order depends on the number of processes.
        skip_broken: skip broken images, with a warning. Otherwise a broken image ends the run.
    """

    shuffle_buffer: int = 4096
    num_lanes: int | None = None
    skip_broken: bool = False
    validation_fraction: float = field(default=0.0, init=False)
    _num_classes: int | None = field(default=None, init=False)
    _warnings: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self):
        check_int("shuffle_buffer", self.shuffle_buffer, 1)
        if self.dataset.features is None:
            self.dataset = self.dataset.cast(datasets.Dataset.from_list(list(self.dataset.take(5))).features)
        super().__post_init__()
        columns = (self.image_column, self.label_column)
        self.dataset = self.dataset.select_columns([column for column in columns if column is not None])

    def decode(self, entry: dict | None) -> torch.Tensor:
        """As of `ImageColumns`. What an image loses is kept for `take_warnings`."""
        try:
            image, check = inspect(read_entry(entry), self.format)
        except UnreadableImage as error:
            raise UnreadableImage(f"{name_of(entry)} ({error})") from error
        if not (check["reduced"] or check["unprofiled"]) and math.isnan(check["high"]):  # of 8 bits
            return image
        columns = {name: np.asarray([value]) for name, value in check.items()}
        for kind, sentence in describe_losses(columns, self.format, lambda _: name_of(entry), "Some").items():
            self._warnings.setdefault(kind, sentence)
        return image

    def take_warnings(self) -> list[str]:
        """What the first images that lost bits or colors lost, each kind once."""
        sentences = [sentence for sentence in self._warnings.values() if sentence]
        self._warnings.update(dict.fromkeys(self._warnings, ""))
        return sentences

    @property
    def num_examples(self) -> int | None:
        """The number of images, validation included, that the data set declares; None if it declares none."""
        split = (self.dataset.info.splits or {}).get(str(self.dataset.split))
        return split.num_examples if split is not None else None

    @property
    def fingerprint(self) -> str:
        """A hash of the columns, the number of shards, and the first images and labels of some shards, which it reads."""
        count = self.dataset.num_shards
        digest = hashlib.sha256(f"{self.dataset.features} {count}".encode())
        for i in range(0, count, -(-count // FINGERPRINT_SHARDS)):
            for row in self.dataset.shard(count, i).take(1):
                try:
                    digest.update(read_entry(row[self.image_column]))
                except UnreadableImage:
                    digest.update(b"broken")
                digest.update(repr(row.get(self.label_column)).encode())
        return digest.hexdigest()

    def split_validation(self, fraction: float) -> Images:
        """Leave the share `fraction` of the images, chosen by `validation_hash`, out of training. Returns the first of them,
        at most `VALIDATION_LIMIT`, which are read now. Raises ValueError if there are none."""
        self.validation_fraction = fraction
        rows = list(islice(filter(self.is_validation, read_rows(self.dataset)), VALIDATION_LIMIT))
        if not rows:
            raise ValueError(f"validation_fraction = {fraction!r} selects no image of the stream.")
        rows = datasets.Dataset.from_list(rows, features=self.dataset.features)
        images = Images(rows, self.format, self.image_column, self.label_column)
        leave_out_broken(images, True, "validation images")
        return images

    def count_classes(self) -> int:
        """As of `ImageColumns`; also the number that is known from the labels alone."""
        return self.class_names is None and self.source.num_classes or super().count_classes()

    def check_labels(self, num_classes: int) -> None:
        """As of `ImageColumns`. The labels themselves are checked as they are read: one that is not an integer in
        0..num_classes−1 ends the run, as the label after them stands for no class."""
        super().check_labels(num_classes)
        self._num_classes = num_classes

    def to_batch(self, images: Sequence[torch.Tensor], labels: Sequence | None) -> dict[str, torch.Tensor]:
        classes = range(self._num_classes or 0)
        wrong = [label for label in labels if type(label) is not int or label not in classes] if classes else []
        if wrong:
            accepted = f"integers in 0..num_classes−1 = {classes[-1]}"
            raise ValueError(f"the labels in the column {self.label_column!r} must be {accepted}, got {wrong[0]!r}.")
        return super().to_batch(images, labels)

    def is_validation(self, row: dict) -> bool:
        """Whether the image is left out of training. If its file had to be read for that, the row keeps the bytes.

        A file that cannot be read is not left out: decoding it reports the error.
        """
        if not self.validation_fraction:
            return False
        entry = row[self.image_column]
        try:
            data = read_entry(entry)
        except UnreadableImage:
            return False
        entry["bytes"] = data
        return validation_hash(data) < self.validation_fraction

    def lanes(self, batch_size: int, seed: int, rank: int, num_processes: int, state: dict | None) -> list["Lane"]:
        """The lanes of a process, at the start (None) or at a `state` (see `MicroBatches.gather_state`).

        Raises StreamError if the processes or the batch cannot share the lanes evenly, or `state` has another number of
        lanes.
        """
        states = state["lanes"] if state else []
        num_lanes = self.num_lanes or len(states) or num_processes
        if states and len(states) != num_lanes:
            raise StreamError(f"stream_lanes = {num_lanes}, but the run to resume has {len(states)}.")
        if num_lanes % num_processes:
            raise StreamError(f"stream_lanes = {num_lanes} must be a multiple of the {num_processes} processes.")
        if batch_size % num_lanes:
            raise StreamError(f"stream_lanes = {num_lanes} must divide the batch of {batch_size} images.")
        share = num_lanes // num_processes
        states = states or [{"start": None, "block": 0, "given": 0}] * num_lanes
        return [Lane(self, i, num_lanes, seed, states[i]) for i in range(rank * share, (rank + 1) * share)]


class StreamBatch(NamedTuple):
    """A micro-batch: "images" (B, C, H, W) and "labels" (B,) or (B, D), and after the last one of a step the states of the lanes
    and warnings about its images."""

    tensors: dict[str, torch.Tensor]
    lane_states: list[dict] | None
    warnings: Sequence[str] = ()


@dataclass(eq=False)
class StreamedBatches(torch.utils.data.IterableDataset):
    """The micro-batches of `num_steps` steps of a process, in order, decoded by threads. `batch_size` counts the images of
    this process in a step.

    A StreamError is the last item, not raised: a DataLoader would add the traceback of its worker to the message.
    """

    images: StreamedImages
    lanes: list["Lane"]
    batch_size: int
    num_steps: int
    micro_batches: int
    num_threads: int

    def __iter__(self) -> Iterator[StreamBatch | StreamError]:
        lanes = [iter(lane) for lane in self.lanes]
        size = self.batch_size // self.micro_batches
        with ThreadPoolExecutor(self.num_threads) as pool:
            for _ in range(self.num_steps):
                try:
                    pairs = [pair for lane in lanes for pair in self._take(lane, pool)]
                    parts = (pairs[start : start + size] for start in range(0, self.batch_size, size))
                    *others, last = [self.images.to_batch(*zip(*part)) for part in parts]
                except (ValueError, OSError) as error:
                    yield StreamError(str(error))
                    return
                yield from (StreamBatch(batch, None) for batch in others)
                yield StreamBatch(last, [lane.state for lane in self.lanes], self.images.take_warnings())

    def _take(self, lane: Iterator[dict], pool: ThreadPoolExecutor) -> list[tuple[torch.Tensor, int | None]]:
        """The next images of a lane, decoded, with their labels."""
        pairs, count, column = [], self.batch_size // len(self.lanes), self.images.image_column
        while len(pairs) < count:
            rows = [next(lane) for _ in range(count - len(pairs))]
            decoded = [pool.submit(self.images.decode, row[column]) for row in rows]
            for image, row in zip(decoded, rows):
                try:
                    pairs.append((image.result(), row.get(self.images.label_column)))
                except UnreadableImage as error:
                    problem = f"an image of the stream cannot be read: {error}"
                    if not self.images.skip_broken:
                        advice = "Repair or remove it, or leave such images out with --skip_broken_images."
                        raise StreamError(f"{problem}. {advice}") from error
                    logger.warning("Left out: %s", problem)
        return pairs


@dataclass
class Lane:
    """The rows of lane number `index`, endless and shuffled: a block is yielded in random order while the next one is read, one row
    for each that is yielded.

    `state` is JSON-serializable: where the current block starts, its number, and how many of its rows were yielded. Resuming
    reads that block again, and as much of the next one as had been read.
    """

    images: StreamedImages
    index: int
    num_lanes: int
    seed: int
    state: dict

    def __iter__(self) -> Iterator[dict]:
        reader = Reader(self)
        number, skip = self.state["block"], self.state["given"]
        size = max(1, self.images.shuffle_buffer // self.num_lanes)
        block = Block(reader, size)
        while True:
            block.read(size)
            generator = make_generator("cpu", self.seed, f"blocks of lane {self.index}", number)
            order = torch.randperm(len(block.rows), generator=generator).tolist()
            following = Block(reader, size)
            following.read(skip)
            for given, i in enumerate(order[skip:], skip + 1):
                following.read(1)
                self.state = {"start": block.start, "block": number, "given": given}
                yield block.rows[i]
            block, number, skip = following, number + 1, 0


class Block:
    """Up to `size` consecutive rows of one epoch, read as far as asked. `start`: the position of the first."""

    def __init__(self, reader: "Reader", size: int):
        self.rows, self.start = [], None
        self._unread = self._read(reader, size)

    def read(self, count: int) -> None:
        """Read `count` more rows, or as many as are left of the block."""
        self.rows.extend(islice(self._unread, count))

    def _read(self, reader: "Reader", size: int) -> Iterator[dict]:
        self.start, row = reader.position(), next(reader.rows)
        if row is None:  # the end of the epoch, which completed the block before
            self.start, row = reader.position(), next(reader.rows)
        yield row
        yield from takewhile(lambda row: row is not None, islice(reader.rows, size - 1))


def read_rows(dataset: datasets.IterableDataset, name: str = "the stream") -> Iterator[dict]:
    """The rows of a stream. Raises BadData, with its name, for every error of reading it."""
    with reading(name):
        yield from dataset


class Reader:
    """`rows`: the rows of a lane in the order of their shards, epoch after epoch, from the start of its current block on,
    with None after each epoch."""

    def __init__(self, lane: Lane):
        self.lane = lane
        self.at = dict(lane.state["start"] or {"epoch": 0, "shard": 0, "row": 0, "stream": None})
        self._stream, self.rows = None, self._read()

    def position(self) -> dict:
        """The position of the next row, as JSON-serializable values."""
        return {**self.at, "stream": self._stream.state_dict() if self._stream is not None else self.at["stream"]}

    def _read(self) -> Iterator[dict | None]:
        images, index, num_lanes = self.lane.images, self.lane.index, self.lane.num_lanes
        all_shards = range(images.dataset.num_shards)
        has_own_shards = len(all_shards) >= num_lanes
        shards = all_shards[index::num_lanes] if has_own_shards else all_shards
        found = self.at["shard"] + self.at["row"] > 0
        while True:
            generator = make_generator("cpu", self.lane.seed, f"shards of lane {index}", self.at["epoch"])
            order = torch.randperm(len(shards), generator=generator).tolist()
            for shard in order[self.at["shard"] :]:
                self._stream = images.dataset.shard(len(all_shards), shards[shard])
                if self.at["stream"] is not None:
                    self._stream.load_state_dict(self.at["stream"])
                for row in read_rows(self._stream, f"part {shards[shard] + 1} of {len(all_shards)} of the stream"):
                    is_own = has_own_shards or self.at["row"] % num_lanes == index
                    self.at["row"] += 1
                    if is_own and not images.is_validation(row):
                        found = True
                        yield row
                self._stream, self.at = None, self.at | {"shard": self.at["shard"] + 1, "row": 0, "stream": None}
            if not found:
                raise StreamError(f"lane {index} of the stream has no image to train on: use fewer lanes.")
            self.at, found = {"epoch": self.at["epoch"] + 1, "shard": 0, "row": 0, "stream": None}, False
            yield None
