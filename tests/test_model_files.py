"""Files of a model folder: what is read, what is refused, and why."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddpm_hf.model_files import (
    check_readable,
    check_shard_index,
    check_weights,
    class_name,
    explain_unreadable,
    read_json_object,
)

BAD_JSON = {
    "a list": b"[1, 2]",
    "null": b"null",
    "text": b'"abc"',
    "a number": b"5",
    "empty": b"",
    "cut short": b'{"a": 1,',
    "a web page": b"<html>",
    "binary": b"\xff\xfe\x00",
    "too many brackets": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_that_is_no_object_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="JSON") as error:
        read_json_object(path)
    assert str(error.value).startswith(str(path)) and type(error.value) is ValueError


def test_json_object_is_read_and_a_missing_file_is_an_os_error(tmp_path):
    (tmp_path / "config.json").write_text('{"ä": [1]}', encoding="utf-8")
    assert read_json_object(tmp_path / "config.json") == {"ä": [1]}
    with pytest.raises(FileNotFoundError, match="other.json"):
        read_json_object(tmp_path / "other.json")


@pytest.mark.parametrize("name", [5, None, "", "../../x", "a.b", ["a", "b"], "os;system"])
def test_class_names_that_are_no_names_are_refused(name):
    assert class_name("config.json", {}, "UNet2DModel") == "UNet2DModel"
    assert class_name("config.json", {"_class_name": "Other"}, "UNet2DModel") == "Other"
    with pytest.raises(ValueError, match="config.json must name a class, got _class_name"):
        class_name("config.json", {"_class_name": name}, "UNet2DModel")


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"weight_map": None}, ValueError, "weight_map"),
        ({"weight_map": {}}, ValueError, "weight_map"),
        ({"weight_map": ["a.safetensors"]}, ValueError, "weight_map"),
        ({"metadata": None}, ValueError, "metadata"),
        ({"weight_map": {"w": "../a.safetensors"}}, ValueError, "its own folder, got '../a.safetensors'"),
        ({"weight_map": {"w": "/etc/passwd"}}, ValueError, "its own folder, got '/etc/passwd'"),
        ({"weight_map": {"w": ".."}}, FileNotFoundError, r"\.\."),
        ({"weight_map": {"w": 3}}, ValueError, "its own folder, got 3"),
        ({"weight_map": {"w": "b.safetensors"}}, FileNotFoundError, "b.safetensors, which is not in its folder"),
    ],
)
def test_shards_are_files_beside_their_index(tmp_path, changes, error, named):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (folder / "a.safetensors", tmp_path / "a.safetensors"):
        path.touch()
    index = {"metadata": {}, "weight_map": {"w": "a.safetensors"}}
    (folder / "index.json").write_text(json.dumps(index))
    check_shard_index(folder / "index.json")
    (folder / "index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(error, match=named) as caught:
        check_shard_index(folder / "index.json")
    assert str(folder / "index.json") in str(caught.value)


class RunsCode:
    def __reduce__(self):
        return (open, ("ran", "w"))


def write_weights(path, kind: str) -> None:
    tensors = {"w": torch.zeros(2)}
    pickles = {"pickle": tensors, "pickle of a list": [1], "pickle with code": {"w": RunsCode()}}
    if kind in pickles:
        torch.save(pickles[kind], str(path))
    elif kind in ("safetensors", "cut short", "with an appendix"):
        save_file(tensors, path)
        whole = path.read_bytes()
        path.write_bytes({"safetensors": whole, "cut short": whole[:-1], "with an appendix": whole + b"x"}[kind])
    else:
        texts = {
            "empty": "",
            "web page": "\n<!doctype html>",
            "pointer": "version https://git-lfs.github.com/spec/v1\n",
        }
        path.write_text(texts[kind])


@pytest.mark.parametrize(
    ("suffix", "kind", "reason"),
    [
        ("safetensors", "empty", "it is empty"),
        ("safetensors", "web page", "it is a web page"),
        ("safetensors", "pointer", "git lfs pull"),
        ("safetensors", "cut short", "it is damaged or cut short"),
        ("safetensors", "with an appendix", "it is damaged or cut short"),
        ("safetensors", "pickle", "it is a pickle"),
        ("safetensors", "pickle with code", "it is a pickle"),
        ("bin", "empty", "it is empty"),
        ("bin", "web page", "it is a web page"),
        ("bin", "safetensors", "it is damaged or cut short"),
        ("bin", "pickle of a list", "it holds list, not tensors by their names"),
        ("bin", "pickle with code", "reading it could run code"),
    ],
)
def test_damaged_weights_are_an_os_error_with_the_reason(tmp_path, monkeypatch, suffix, kind, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"diffusion_pytorch_model.{suffix}"
    write_weights(path, kind)
    with pytest.raises(OSError, match=reason) as error:
        check_readable(path)
    assert str(path) in str(error.value) and not (tmp_path / "ran").exists()
    with pytest.raises(OSError, match=reason):
        explain_unreadable(tmp_path, OSError("of diffusers"))


@pytest.mark.parametrize(("suffix", "kind"), [("safetensors", "safetensors"), ("bin", "pickle")])
def test_whole_weights_are_readable(tmp_path, suffix, kind):
    write_weights(tmp_path / f"diffusion_pytorch_model.{suffix}", kind)
    check_readable(tmp_path / f"diffusion_pytorch_model.{suffix}")
    explain_unreadable(tmp_path, OSError("of another cause"))


@pytest.mark.parametrize("start", [b"<", b"{", b"PK", b"\x80"])
def test_whole_weights_may_begin_like_another_file(tmp_path, start):
    """A file of safetensors begins with the length of its header, which may be filled up with spaces."""
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    length = int.from_bytes(start.ljust(2, b"\x01"), "little")
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    assert path.read_bytes().startswith(start)
    check_readable(path)


FLOAT = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({}, "lacks b, w"),
        ({"w": FLOAT}, "lacks b"),
        ({"w": FLOAT, "b": FLOAT, "c": FLOAT}, "has the unknown c"),
        ({"w": FLOAT, "c": FLOAT}, "lacks b and has the unknown c"),
        ({"w": FLOAT, "b": FLOAT[0]}, r"b must have shape \(2, 3\), got \(3,\)"),
        ({"w": FLOAT, "b": 3}, "b must be a tensor, got 3"),
        *(
            ({"w": FLOAT, "b": FLOAT.to(dtype)}, f"b must hold floating-point numbers, got {dtype}")
            for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
        ),
        *(
            ({"w": FLOAT, "b": torch.full_like(FLOAT, value).to(dtype)}, "b holds NaN or infinite values")
            for value in (np.nan, np.inf, -np.inf)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        ),
        ({"w": FLOAT, "b": torch.full((2, 3), 1e300, dtype=torch.float64)}, "b holds NaN or infinite values"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(found, problem):
    with pytest.raises(ValueError, match=rf"^file .*{problem}\.$"):
        check_weights("file", found, {"w": FLOAT, "b": FLOAT}, check_shapes=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_finite_weights_of_every_precision_pass(dtype):
    check_weights("file", {"w": FLOAT.to(dtype)}, {"w": FLOAT}, check_shapes=True)
    check_weights("file", {"w": FLOAT[0].to(dtype)}, {"w": FLOAT}, check_shapes=False)


def test_finite_weights_with_an_infinite_sum_pass():
    check_weights("file", {"w": FLOAT * 3e38}, {"w": FLOAT}, check_shapes=True)


def test_one_bad_value_among_many_is_found():
    weights = torch.randn(64, 64)
    weights[17, 5] = torch.nan
    with pytest.raises(ValueError, match="w holds NaN"):
        check_weights("file", {"w": weights}, {"w": weights}, check_shapes=True)
