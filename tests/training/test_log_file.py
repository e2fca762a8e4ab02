"""log.jsonl: rows are appended, cut back and read again."""

import json
import math

from ddpm_hf.training.log_file import LogFile, read_log


def row(step, **values):
    return {"step": step, "images": 16 * step, **values}


def test_incomplete_lines_are_skipped_with_a_warning(tmp_path, caplog):
    file = tmp_path / "log.jsonl"
    file.write_text(f'{json.dumps(row(1))}\n{{"step": 2, "ima\n{{"step": 3}}\n{json.dumps(row(4))}\n')
    assert [row["step"] for row in read_log(file)] == [1, 4]
    assert "line 2 is incomplete" in caplog.text and "line 3 is incomplete" in caplog.text
    assert read_log(tmp_path / "none.jsonl") == []


def test_rows_after_the_resumed_step_are_removed(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(row(step)) + "\n" for step in (2, 4, 6)))
    log = LogFile(file, last_step=4)
    log.append(row(5))
    assert log.rows == read_log(file) == [row(2), row(4), row(5)]


def test_values_that_are_not_finite_become_null(tmp_path):
    LogFile(tmp_path / "log.jsonl", 0).append(row(1, loss=math.nan, quartiles=[1.5, -math.inf, None]))
    assert read_log(tmp_path / "log.jsonl") == [row(1, loss=None, quartiles=[1.5, None, None])]


def test_a_log_without_file_keeps_its_rows_in_memory(tmp_path):
    log = LogFile(None, 0)
    log.append(row(1))
    assert log.rows == [row(1)] and not list(tmp_path.iterdir())
