"""Errors of libraries that read files, in words."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from PIL import Image, UnidentifiedImageError

# Errors whose messages are sentences. Those of others need the name of their type.
PLAIN_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class BadData(ValueError):
    """A data set, or a file of it, that cannot be used. The message names it."""


def reason(error: Exception) -> str:
    """What an error says, in one line: its message, with the name of its type if the message alone is no sentence."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__  # "An error occurred while generating the dataset"
    if isinstance(error, UnidentifiedImageError):
        return "neither an array of NumPy nor a picture that Pillow knows"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text in UTF-8 ({error})"
    message, name = " ".join(str(error).split()), type(error).__name__
    return message if isinstance(error, PLAIN_ERRORS) and message else f"{name}: {message}" if message else name


@contextmanager
def reading(file) -> Iterator[None]:
    """Raise every error as BadData with the name of the file: libraries raise errors of many types for damaged files, such as
    MemoryError for one that states a wrong size."""
    try:
        yield
    except BadData:
        raise
    except Exception as error:
        raise BadData(f"{file} cannot be read: {reason(error).rstrip('.')}.") from error
