"""Data sets larger than the disk: read as a stream, shared out, shuffled, and gone on with exactly where a run stopped.

A stream is cut into `num_lanes` lanes once and for all. Lane l fills the l-th of `num_lanes` equal parts of every global
batch, and a process computes some whole lanes. So a run of L lanes is the same run on any number of processes that divides
L, and may go on with another such number.

Where the data set has at least as many shards (files) as there are lanes, a lane reads every L-th shard; otherwise every
lane reads all of them and keeps every L-th row. A lane goes through its shards in an order that depends on (seed, lane,
epoch), and shuffles blocks of consecutive images by (seed, lane, block). Every image of a lane comes once before one comes
again; lanes of different lengths finish their epochs at different times.
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import datasets
import torch

from ddpm_hf.data.decoding import UNREADABLE, ImageFormat, decode_image, read_entry, stack_images
from ddpm_hf.data.finding import find_column
from ddpm_hf.data.images import Images, check_class_count, label_names, validation_hash
from ddpm_hf.seeds import make_generator

logger = logging.getLogger(__name__)
VALIDATION_LIMIT = 512  # images that `validation` reads from the start of a stream


class StreamError(ValueError):
    """What ends a run on a stream: lanes that cannot be shared out, no image to train on, or one that cannot be read."""


class StreamedImages:
    """The images of a stream, brought to one size as `Images` does.

    Args:
        dataset: a stream with a column of images. A row whose image is held out by `validation_fraction` (see
            `validation_hash`) is passed over.
        shuffle_buffer: images in a block, over all lanes; the files of up to twice as many are in memory.
        num_lanes: see above. None: one a process, which makes the order depend on their number.
        skip_broken: pass over an image that cannot be read, and say so; otherwise it ends the run.
        image_column, label_column, size, channels, crop, background: see `Images`.
    """

    in_memory = False

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        size: tuple[int, int],
        channels: int = 3,
        image_column: str | None = None,
        label_column: str | None = None,
        crop: str = "center",
        background: str = "white",
        shuffle_buffer: int = 4096,
        num_lanes: int | None = None,
        validation_fraction: float = 0.0,
        skip_broken: bool = False,
    ):
        self.format = ImageFormat(size, channels, crop, background)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {shuffle_buffer!r}.")
        if dataset.features is None:
            dataset = dataset._resolve_features()
        self.image_column = find_column(dataset, datasets.Image, image_column, "image_column")
        columns, self.label_column = [self.image_column], None
        if label_column is not None:
            kinds = (datasets.ClassLabel, datasets.Value)
            self.label_column = find_column(dataset, kinds, label_column, "label_column")
            columns.append(label_column)
        dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self.dataset = dataset.select_columns(columns)
        self.shuffle_buffer, self.num_lanes, self.skip_broken = shuffle_buffer, num_lanes, skip_broken
        self.validation_fraction = validation_fraction

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes 0, 1, ..., where the label column knows them."""
        return label_names(self.dataset, self.label_column)

    def check_labels(self, num_classes: int) -> None:
        """ValueError for another number of classes than the column names; labels are read while training only."""
        check_class_count(self.class_names, num_classes, self.label_column)

    @property
    def num_examples(self) -> int | None:
        """How many images the data set says it has, held-out ones included; None where it does not say."""
        split = (self.dataset.info.splits or {}).get(str(self.dataset.split))
        return split.num_examples if split is not None else None

    def validation(self, limit: int = VALIDATION_LIMIT) -> Images:
        """The first validation images, at most `limit`, all of which are read now."""
        rows = []
        for row in self.dataset:
            entry = {"bytes": read_entry(row[self.image_column]), "path": row[self.image_column]["path"]}
            if validation_hash(entry["bytes"]) < self.validation_fraction:
                rows.append(row | {self.image_column: entry})
                if len(rows) == limit:
                    break
        if not rows:
            raise ValueError(f"validation_fraction = {self.validation_fraction!r} holds out no image of the stream.")
        rows = datasets.Dataset.from_list(rows, features=self.dataset.features)
        rows = rows.cast_column(self.image_column, datasets.Image())
        f = self.format
        images = Images(rows, f.size, f.channels, self.image_column, self.label_column, f.crop, f.background)
        images.without(images.broken())
        return images

    def batches(
        self,
        batch_size: int,
        seed: int,
        first_step: int,
        num_steps: int,
        rank: int,
        num_processes: int,
        micro_batches: int,
        threads: int = 0,
        state: dict | None = None,
    ) -> "StreamedBatches":
        """What `MicroBatches` reads; `state` is that of the step before `first_step`, of all lanes.

        Raises StreamError for a number of lanes that the batch or the processes do not share out evenly, and for a state
        that was saved with another.
        """
        lanes = self.num_lanes or (len(state["lanes"]) if state else num_processes)
        if state and len(state["lanes"]) != lanes:
            raise StreamError(f"stream_lanes = {lanes}, but the run that is gone on with has {len(state['lanes'])}.")
        if lanes % num_processes or batch_size % lanes:
            raise StreamError(
                f"stream_lanes = {lanes} must be a multiple of the {num_processes} processes and divide the batch of "
                f"{batch_size} images."
            )
        share = lanes // num_processes
        mine = range(rank * share, (rank + 1) * share)
        readers = [Lane(self, lane, lanes, seed, state["lanes"][lane] if state else None) for lane in mine]
        steps = num_steps - first_step
        return StreamedBatches(self, readers, batch_size // lanes, steps, micro_batches, max(1, threads))


class StreamedBatches(torch.utils.data.IterableDataset):
    """The micro-batches of a process, in order, decoded by `threads` threads. The last one of a step has the lanes' state
    after it, as JSON, in "state". An image that cannot be read makes a batch of "error" alone, which is the last."""

    def __init__(
        self, images: StreamedImages, lanes: list["Lane"], per_lane: int, steps: int, micro_batches: int, threads: int
    ):
        self.images, self.lanes, self.per_lane, self.steps = images, lanes, per_lane, steps
        self.micro_batches, self.threads = micro_batches, threads

    def __iter__(self) -> Iterator[dict]:
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in range(self.steps):
                try:
                    pairs = [pair for lane in self.lanes for pair in self._take(lane, pool)]
                except (StreamError, OSError) as error:
                    yield {"error": str(error)}
                    return
                size = len(pairs) // self.micro_batches
                for i in range(self.micro_batches):
                    part = pairs[i * size : (i + 1) * size]
                    batch = {"images": stack_images([image for image, _ in part])}
                    if self.images.label_column is not None:
                        batch["labels"] = torch.tensor([row[self.images.label_column] for _, row in part])
                    if i == self.micro_batches - 1:
                        batch["state"] = json.dumps({"lanes": [lane.state() for lane in self.lanes]})
                    yield batch

    def _take(self, lane: "Lane", pool: ThreadPoolExecutor) -> list[tuple[torch.Tensor, dict]]:
        """The lane's next images, decoded, with their rows."""
        pairs = []
        while len(pairs) < self.per_lane:
            rows = [lane.next() for _ in range(self.per_lane - len(pairs))]
            for image, row in zip(pool.map(self._decode, rows), rows):
                if isinstance(image, torch.Tensor):
                    pairs.append((image, row))
                    continue
                name = row[self.images.image_column]["path"] or "an image without a name"
                if not self.images.skip_broken:
                    raise StreamError(
                        f"an image of the stream cannot be read: {name} ({image}). Repair or remove it, or leave such "
                        "images out with --skip_broken_images."
                    )
                logger.warning("Leaving out an image that cannot be read: %s (%s)", name, image)
        return pairs

    def _decode(self, row: dict) -> torch.Tensor | Exception:
        try:
            return decode_image(read_entry(row[self.images.image_column]), self.images.format)
        except UNREADABLE as error:
            return error


class Lane:
    """One lane of a stream, endless and shuffled.

    A block is given out in random order while the next one is read, one row for each given. Going on from `state` reads
    the unfinished block again, from where it starts, and as much of the next as had been read.
    """

    def __init__(self, images: StreamedImages, lane: int, num_lanes: int, seed: int, state: dict | None = None):
        self.size = max(1, images.shuffle_buffer // num_lanes)
        self.lane, self.seed = lane, seed
        self._reader = Reader(images, lane, num_lanes, seed, state and state["start"])
        self._number, self._given, self._rows = (state["block"], state["given"], None) if state else (0, 0, None)

    def next(self) -> dict:
        if self._rows is None:  # lazily: in the process that reads, not in the one that made this
            self._open(Block(self._reader, self.size))
            self._upcoming.read(self._given)
        if self._given == len(self._rows):
            self._number, self._given = self._number + 1, 0
            self._open(self._upcoming)
        self._given += 1
        self._upcoming.read(1)
        return self._rows[self._order[self._given - 1]]

    def _open(self, block: "Block") -> None:
        block.read(self.size)
        self._rows, self._start = block.rows, block.start
        generator = make_generator("cpu", self.seed, f"blocks of lane {self.lane}", self._number)
        self._order = torch.randperm(len(self._rows), generator=generator).tolist()
        self._upcoming = Block(self._reader, self.size)

    def state(self) -> dict:
        """JSON-able."""
        return {"start": self._start, "block": self._number, "given": self._given}


class Block:
    """Up to `size` rows of one epoch; read in any number of steps."""

    def __init__(self, reader: "Reader", size: int):
        self.reader, self.size, self.rows, self.is_whole, self.start = reader, size, [], False, None

    def read(self, count: int) -> None:
        """`count` more rows, or as many as are left of the block."""
        while count and not self.is_whole:
            if self.start is None:
                self.start = self.reader.position()
            row = self.reader.next()
            if row is not None:
                self.rows.append(row)
                count -= 1
            elif not self.rows:
                self.start = None  # the block before it ended with the epoch
            self.is_whole = len(self.rows) == self.size or (row is None and bool(self.rows))


class Reader:
    """The rows of a lane in the order of their shards, epoch after epoch, from `position` on."""

    def __init__(self, images: StreamedImages, lane: int, num_lanes: int, seed: int, position: dict | None):
        self.images, self.dataset, self.lane, self.seed = images, images.dataset, lane, seed
        shards = self.dataset.num_shards
        self.shards = list(range(lane, shards, num_lanes)) if shards >= num_lanes else list(range(shards))
        self.every = 1 if shards >= num_lanes else num_lanes
        self.at = dict(position or {"epoch": 0, "shard": 0, "row": 0, "stream": None})
        self._rows, self._stream, self._found = None, None, self.at["shard"] + self.at["row"] > 0

    def position(self) -> dict:
        stream = self._stream.state_dict() if self._rows is not None else self.at["stream"]
        return {**self.at, "stream": stream}

    def next(self) -> dict | None:
        """The next row; None once where an epoch ends."""
        while self.at["shard"] < len(self.shards):
            if self._rows is None:
                generator = make_generator("cpu", self.seed, f"shards of lane {self.lane}", self.at["epoch"])
                order = torch.randperm(len(self.shards), generator=generator).tolist()
                self._stream = self.dataset.shard(self.dataset.num_shards, self.shards[order[self.at["shard"]]])
                if self.at["stream"] is not None:
                    self._stream.load_state_dict(self.at["stream"])
                self._rows = iter(self._stream)
            for row in self._rows:
                self.at["row"] += 1
                if (self.at["row"] - 1) % self.every == (self.lane if self.every > 1 else 0) and self._is_mine(row):
                    self._found = True
                    return row
            self._rows, self.at = None, self.at | {"shard": self.at["shard"] + 1, "row": 0, "stream": None}
        if not self._found:
            raise StreamError(f"lane {self.lane} of the stream has no image to train on: use fewer lanes.")
        self.at, self._found = {"epoch": self.at["epoch"] + 1, "shard": 0, "row": 0, "stream": None}, False
        return None

    def _is_mine(self, row: dict) -> bool:
        """Whether it is trained on. What had to be read for that is kept."""
        fraction, entry = self.images.validation_fraction, row[self.images.image_column]
        if fraction:
            try:
                entry["bytes"] = read_entry(entry)
            except UNREADABLE:
                return True  # so that it is met, and named, where it is decoded
            return validation_hash(entry["bytes"]) >= fraction
        return True
