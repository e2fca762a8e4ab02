"""The folder of samples: names, parts and the record of the options that images depend on."""

import json

import numpy as np
import pytest

from ddpm_hf.evaluation.sample_options import SampleArguments
from ddpm_hf.evaluation.sample_output import SampleFolder, folder_path, read_labels

IMAGES = np.random.default_rng(0).random((3, 4, 4, 1))


def folder(tmp_path, **options) -> SampleFolder:
    return SampleFolder(SampleArguments(**{"model": "m", "num_images": 3, "output_dir": str(tmp_path), **options}))


def test_samples_of_a_local_model_lie_in_its_folder(tmp_path):
    assert folder_path(SampleArguments(model=str(tmp_path))) == tmp_path / "generated"
    assert str(folder_path(SampleArguments(model="user/name"))) == "generated"


def test_png_files_are_written_once(tmp_path):
    samples = folder(tmp_path)
    assert samples.is_done(range(3)) == [False] * 3
    samples.write(range(2), IMAGES[:2])
    before = samples.png_file(1).read_bytes()
    samples.write(range(1, 3), IMAGES[::-1][:2])
    assert samples.is_done(range(3)) == [True] * 3 and samples.png_file(1).read_bytes() == before
    assert samples.join([range(3)], None) == tmp_path


def test_parts_become_one_file_and_are_deleted(tmp_path):
    samples = folder(tmp_path, format="npz")
    batches = [range(2), range(2, 3)]
    for batch in batches:
        samples.write(batch, IMAGES[batch.start : batch.stop])
        assert samples.is_done(batch) == [True] * len(batch)
    with np.load(samples.join(batches, [4, 5, 6])) as file:
        assert np.abs(file["arr_0"] / 255 - IMAGES).max() <= 0.5 / 255
    assert not samples.parts.exists() and samples.is_done(range(3)) == [True] * 3


@pytest.mark.parametrize("changes", [{"variant": "fp16"}, {"steps": 3}, {"guidance_scale": 2.0}, {"bits": 16}])
def test_images_of_other_options_are_not_mixed(tmp_path, changes):
    folder(tmp_path).write_record()
    folder(tmp_path, backend="onnxruntime", num_images=5)  # what images do not depend on, but for rounding
    (name,) = changes
    with pytest.raises(ValueError, match=f"made with other options .*{name} .*give another output_dir"):
        folder(tmp_path, **changes)


def test_a_record_of_an_earlier_version_is_understood(tmp_path):
    samples = folder(tmp_path)
    old = json.loads(samples.record())
    del old["variant"]
    samples.record_file.write_text(json.dumps(old))
    assert folder(tmp_path).path == tmp_path


def test_labels_are_numbers_or_rows_of_an_array(tmp_path):
    np.save(tmp_path / "labels.npy", np.array([[1.0, 2.0]]))
    assert (read_labels("3"), read_labels("2.5")) == ([3], [2.5])
    assert read_labels(str(tmp_path / "labels.npy")) == [[1.0, 2.0]]
    with pytest.raises(ValueError, match="class_label must be a class of the model, .*'seven'"):
        read_labels("seven")
