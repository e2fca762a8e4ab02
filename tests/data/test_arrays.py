"""Files of arrays are read as they were written, and refused if they hold anything else."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data.arrays import read_array
from tests.data.test_decoding import npy, npz, random_array


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 8)])
def test_an_array_is_read_as_it_was_written(shape, dtype):
    array = random_array(*shape, dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)
    for data in (npy(array), npz(array)):
        found = read_array(data)
        assert found.dtype.isnative and found.ndim == 3
        np.testing.assert_array_equal(found, array.reshape(found.shape))


def zipped(size: int) -> bytes:
    """A .npz file whose one array, compressed well, has this many bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("image.npy", npy(np.zeros((size, 1), np.uint8)))
    return stream.getvalue()


def test_an_array_that_unpacks_to_more_than_any_image_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_array(zipped(3000)).shape == (3000, 1, 1)
    with pytest.raises(ValueError, match="it unpacks to 3328 bytes, more than 3200"):
        read_array(zipped(3200))


class Opened:
    """An object whose unpickling would be noticed."""

    def __reduce__(self):
        return exec, ("import tests.data.test_arrays as t; t.OPENED.append(1)",)


OPENED = []


@pytest.mark.parametrize("pack", [npy, npz])
def test_an_array_of_pickled_objects_is_refused_unopened(pack):
    with pytest.raises(ValueError, match="Object arrays cannot be loaded when allow_pickle=False"):
        read_array(pack(np.array([[Opened()]], dtype=object)))
    assert not OPENED
