"""Files of options: what is no such file is one sentence that names it, and does not have its content."""

import os
import time
from pathlib import Path

import pytest

from ddpm_hf.training.config_file import MAX_BYTES, read_options
from ddpm_hf.training.presets import parse_config


def read(folder: Path, content: str | bytes) -> dict:
    file = folder / "options.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_options(file)


@pytest.mark.parametrize(
    "text, value",
    [
        ("5", 5), ("-5", -5), ("1e-3", 1e-3), ("1.0e-3", 1e-3), (".5", 0.5), ("true", True), ("null", None), ("", None),
        ("no", "no"), ("'5'", "5"), ("010", "010"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("1_000", "1_000"),
        ("[1, 2]", [1, 2]), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_plain_values_are_those_of_yaml_1_2(tmp_path, text, value):
    (found,) = read(tmp_path, f"option: {text}").values()
    assert found == value and type(found) is type(value)


def test_json_and_a_byte_order_mark_are_read(tmp_path):
    assert read(tmp_path, '\ufeff{"learning_rate": 1e-3, "tf32": false}') == {"learning_rate": 1e-3, "tf32": False}


EXPLODING = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn"))
SECRET = "hunter2"


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "it is empty"), ("# a comment", "it is empty"), ("{}", "it is empty"), ("null", "it is empty"),
        (f"- {SECRET}", "it is a list"), (SECRET, "it is one value"), (f"root:x:0:{SECRET}\nroot:x", "it is one value"),
        (f"a: {SECRET}\n  b: c", "line 2, column 4: mapping values are not allowed here"),
        (f"a: '{SECRET}", "line 1, column 12: while scanning a quoted scalar"),
        (f"a: [{SECRET}", "line 1, column 12"), (f"\t{SECRET}: 1", "line 1, column 1"),
        (f"a: 1\nb: 2\na: {SECRET}", "line 3, column 1: the same option twice"),
        (f"a: !!python/object/apply:os.system ['{SECRET}']", "line 1, column 4: tags"),
        (f"a: !!python/name:os.{SECRET}", "tags"), (f"a: !!int '{SECRET}'", "tags"), (f"a: !{SECRET} 1", "tags"),
        (f"a: &x {SECRET}\nb: *x", "anchors and aliases are not read"), (EXPLODING, "anchors"),
        (f"1: {SECRET}", "a key that is not the name of an option"), (f"? [{SECRET}]\n: 1", "a key that is not"),
        (f"a: 1\n---\nb: {SECRET}", "expected a single document"),
        ("a: " + "[" * 20_000, "it is nested too deeply"),
        (b"\x7fELF\x00\xff" + SECRET.encode(), "no text file"), (b"a: \x00", "no text file"),
        ("a: " + SECRET * MAX_BYTES, "larger than"),
    ],
)  # fmt: skip
def test_what_is_no_mapping_of_options_is_one_sentence(tmp_path, content, problem):
    start = time.monotonic()
    with pytest.raises(ValueError, match=problem) as caught:
        read(tmp_path, content)
    assert "options.yaml" in str(caught.value) and SECRET not in str(caught.value) and len(str(caught.value)) < 400
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "{folder}", "{folder}/fifo", "{folder}/nowhere"])
def test_what_is_no_file_is_refused_at_once(tmp_path, place):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is no file of options"):
        read_options(Path(place.format(folder=tmp_path)))


@pytest.mark.parametrize("place", ["/etc/passwd", "/dev/zero", "/proc/self/mem", "nowhere", "x" * 5000, "a\0b", ""])
def test_a_config_that_is_no_file_of_options_is_not_echoed(place):
    with pytest.raises(ValueError) as caught:
        parse_config(["--config", place])
    assert "root:" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "line, message",
    [
        ("batch_size: [1]", "batch_size must be an integer of at least 1, got \\[1\\]"),
        ("batch_size: '8'", "batch_size must be .* got '8'"),
        ("seed: null", "seed must be an integer in 0..4294967295, got None"),
        ("seed: 1.0", "seed must be .* got 1.0"),
        ("dataset: 5", "dataset must be text, got 5"),
        ("resolution: true", "resolution must be .* got True"),
        ("resolution: {a: 1}", "resolution must be a list"),
        ("random_flip: yes", "random_flip must be True or False, got 'yes'"),
        ("learning_rate: .inf", "learning_rate must be .* got inf"),
        ("max_grad_norm: .nan", "max_grad_norm must be .* got nan"),
        ("max_grad_norm: -1", "max_grad_norm must be .* got -1"),
        ("crop: [center]", "crop must be one of .* got \\['center'\\]"),
        ("output_dir: ''", "output_dir must be text that is not empty"),
        ("attention_head_dim: 0", "attention_head_dim must be an integer of at least 1, got 0"),
        ("norm_num_groups: 7", "norm_num_groups must divide"),
        ("5: 5", "a key that is not the name"),
    ],
)
def test_values_in_a_file_are_typed_and_refused_by_name(tmp_path, line, message):
    (tmp_path / "my.yaml").write_text(f"total_images: 1000\n{line}\n")
    dataset = [] if line.startswith("dataset") else ["--dataset", "digits"]
    with pytest.raises(ValueError, match=message):
        parse_config(["--config", str(tmp_path / "my.yaml"), *dataset])
