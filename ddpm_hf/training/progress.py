"""Progress: a bar in a terminal, a line every so often in a file or a pipe."""

import sys
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} so far, {remaining} to go, {rate_fmt}{postfix}"


class _Lines(tqdm):
    """Each state that a bar would have, but a line of its own, and none before there is progress."""

    def __init__(self, **options):
        self._last = None
        super().__init__(**options, mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, miniters=1, bar_format=LINE)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.n not in (self.initial, self._last):
            self._last = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> None:
        if not nolock:  # which `write` asks for, after a line of something else
            super().refresh(lock_args=lock_args)

    def clear(self, *_, **__) -> None:
        pass  # lines stay

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.disable = True
            self._decr_instances(self)


def is_terminal() -> bool:
    """Whether progress is seen as it is printed."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(desc: str, total: int, unit: str, initial: int = 0, shown: bool = True) -> tqdm:
    """Progress of `total` units of work; use `update`, `set_postfix(refresh=False)`, `write` and `close` of it.

    Args:
        desc: what the work is for.
        initial: units that were done before.
        shown: whether this process is the one that prints.
    """
    kind, unit = tqdm if is_terminal() else _Lines, f" {unit}"  # after a number
    return kind(desc=desc, total=total, unit=unit, initial=initial, unit_scale=total >= 10_000, disable=not shown)


def counted_steps(bar: tqdm) -> Callable:
    """A `callback_on_step_end` for a pipeline's call, by which each sampling step is one unit of `bar`."""

    def count(_pipe, _step: int, _t: int, _tensors: dict) -> dict:
        bar.update()
        return {}

    return count
