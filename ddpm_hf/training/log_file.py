"""log.jsonl: one row of losses and speed per logged step."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm_hf.files import atomic_file

logger = logging.getLogger("train")


def read_log(file: Path) -> list[dict]:
    """The rows of a log, {"step": k, "images": n, ...}; empty if there is no file.

    A line that a killed run left incomplete is skipped with a warning.
    """
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), start=1):
        try:
            row = json.loads(line)
            row["step"] + row["images"]
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: line %d is incomplete; skipped.", file, number)
    return rows


@contextmanager
def warn_if_not_written(what: str) -> Iterator[None]:
    """Log an OSError, for example of a full disk, instead of raising it."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be written (%s); training continues.", what, error)


class LogFile:
    """A log that rows are appended to. Rows that cannot be written are added later, when there is space again.

    Args:
        file: log.jsonl; None to keep the rows in memory only.
        last_step: rows after this step are removed: the run resumes there and writes them again.
    """

    def __init__(self, file: Path | None, last_step: int):
        self.file, self.rows, self._rewrite = file, [], False
        if file is not None:
            self.rows = [row for row in read_log(file) if row["step"] <= last_step]
            atomic_file(file, "".join(map(_line, self.rows)))

    def append(self, row: dict) -> None:
        """Add a row; the whole file is written again if an earlier row is missing or incomplete."""
        self.rows.append(row)
        if self.file is None:
            return
        rewrite, self._rewrite = self._rewrite, True
        with warn_if_not_written(f"Row {row['step']} of {self.file.name}"):
            if rewrite:
                atomic_file(self.file, "".join(map(_line, self.rows)))
            else:
                with open(self.file, "a") as file:
                    file.write(_line(row))
            self._rewrite = False


def _line(row: dict) -> str:
    # JSON has no NaN and no infinity: null stands for them.
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda _: None)) + "\n"
