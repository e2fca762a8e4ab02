"""Errors of libraries are said in one line, with the name of the file."""

import datasets
import pytest
from PIL import UnidentifiedImageError

from ddpm_hf.data.reasons import BadData, reading, reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no\n  such file"), "no such file"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError(), "ValueError"),
        (MemoryError(), "MemoryError"),
        (ValueError("A sentence"), "A sentence"),
        (
            UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "cut"),
            "it is not text in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 0: cut)",
        ),
        (UnidentifiedImageError("x"), "neither an array of NumPy nor a picture that Pillow knows"),
    ],
)
def test_an_error_is_said_in_one_line(error, words):
    assert reason(error) == words
    with pytest.raises(BadData) as raised, reading("a.zip"):
        raise error
    assert str(raised.value) == f"a.zip cannot be read: {words}."


def test_the_cause_is_said_instead_of_the_wrapper_of_datasets():
    error = datasets.exceptions.DatasetGenerationError("An error occurred")
    error.__cause__ = OSError("cut off")
    assert reason(error) == "cut off"


def test_an_error_that_names_its_file_is_kept():
    with pytest.raises(BadData, match="^b.zip is bad$"), reading("a.zip"):
        raise BadData("b.zip is bad")
