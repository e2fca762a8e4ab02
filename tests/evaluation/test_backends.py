"""The backend that is measured to be faster is taken, and what was measured is said."""

import copy
import sys
import time

import pytest

from ddpm_hf.evaluation import backends
from ddpm_hf.evaluation.backends import faster_pipeline, seconds_per_step


@pytest.fixture
def exported(exports, monkeypatch):
    monkeypatch.setattr(backends, "SECONDS", 0.05)
    return copy.deepcopy(exports[0]), str(exports[1])


def slow_down(pipe, seconds: float) -> None:
    pipe.unet.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_the_slower_backend_is_left(exported):
    pipe, model = exported
    slow_down(pipe, 0.05)
    chosen, reason = faster_pipeline(pipe, model, 2, class_labels=[0, 1])
    assert chosen is not pipe and chosen.scheduler is pipe.scheduler
    assert reason.startswith("Backend: onnxruntime (a step of 2 images: torch 5")


def test_pytorch_stays_where_it_is_faster(exported, monkeypatch):
    pipe, model = exported
    times = iter([0.001, 0.002])
    monkeypatch.setattr(backends, "seconds_per_step", lambda *_, **__: next(times))
    chosen, reason = faster_pipeline(pipe, model, 2, class_labels=[0, 1])
    assert chosen is pipe and reason == "Backend: torch (a step of 2 images: torch 1 ms, onnxruntime 2 ms)."


def test_without_a_file_or_the_package_pytorch_is_taken(exported, tmp_path, monkeypatch):
    pipe, model = exported
    assert "torch, because there is no other: " in faster_pipeline(pipe, str(tmp_path), 1, class_labels=0)[1]
    (tmp_path / "other" / "onnx").mkdir(parents=True)
    (tmp_path / "other" / "onnx" / "model.onnx").write_bytes(b"no graph")
    assert "cannot be read" in faster_pipeline(pipe, str(tmp_path / "other"), 1, class_labels=0)[1]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    chosen, reason = faster_pipeline(pipe, model, 1, class_labels=0)
    assert chosen is pipe and "not installed" in reason


def test_steps_are_measured_over_several_chains(exported):
    pipe, _ = exported
    slow_down(pipe, 0.004)
    seconds = seconds_per_step(pipe, 1, seconds=0.2, class_labels=0, num_inference_steps=2)
    assert 0.004 < seconds < 0.1
