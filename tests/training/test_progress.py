"""Progress is a bar in a terminal, and lines elsewhere."""

import io
import os
import pty
import re
import sys

import pytest

from ddpm_hf.training import progress
from ddpm_hf.training.progress import counted_steps, is_terminal, progress_bar


class Output(io.StringIO):
    """Standard error that is a terminal, or not."""

    def __init__(self, is_tty):
        super().__init__()
        self.isatty = lambda: is_tty


@pytest.fixture
def stderr(monkeypatch):
    def replace(is_tty):
        monkeypatch.setattr(sys, "stderr", Output(is_tty))
        return sys.stderr

    return replace


def work(steps, **options):
    with progress_bar("samples.png", steps, "step", **options) as bar:
        for i in range(steps):
            bar.update()
            bar.set_postfix({"loss": i}, refresh=False)


def test_a_terminal_gets_a_bar_that_says_what_it_is_for(stderr):
    output = stderr(True)
    work(5)
    assert "\rsamples.png: 100%|" in output.getvalue() and output.getvalue().count("\n") == 1


def test_a_file_gets_a_line_every_so_often_without_control_characters(stderr, monkeypatch):
    output = stderr(False)
    work(5)
    assert re.fullmatch(r"samples\.png: 5 of 5 step, \S+ so far, \S+ to go, [^\r\n]*loss=4\n", output.getvalue())
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    output = stderr(False)
    work(5)
    assert [line.split(" ")[1] for line in output.getvalue().splitlines()] == ["1", "2", "3", "4", "5"]
    assert "\r" not in output.getvalue() and "\x1b" not in output.getvalue()


def test_lines_of_others_come_between(stderr):
    output = stderr(False)
    with progress_bar("Training", 4, "images", initial=2) as bar:
        bar.update(1)
        bar.write("Speed 3", file=sys.stderr)
        bar.update(1)
    assert re.fullmatch(r"Speed 3\nTraining: 4 of 4 images.*\n", output.getvalue())


@pytest.mark.parametrize("is_tty", [True, False])
def test_nothing_is_printed_without_progress_or_by_other_processes(stderr, is_tty):
    output = stderr(is_tty)
    work(3, shown=False)
    assert output.getvalue() == ""
    if not is_tty:
        progress_bar("Training", 4, "images", initial=4).close()
        assert output.getvalue() == ""


def test_a_closed_standard_error_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_terminal()
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master):
        monkeypatch.setattr(sys, "stderr", terminal)
        assert is_terminal()


def test_steps_of_several_calls_count_in_one_bar(stderr, tiny_pipeline):
    output = stderr(False)
    with progress_bar("quality check", 6, "step") as bar:
        for _ in range(2):
            tiny_pipeline(2, num_inference_steps=3, callback_on_step_end=counted_steps(bar))
        assert bar.n == 6
    assert output.getvalue().count("quality check") == 1
