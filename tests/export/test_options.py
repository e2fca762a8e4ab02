"""Options of an export that do not fit together are refused before torch is imported."""

import pytest

from ddpm_hf.export.options import ExportOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "user/name"}, "output_dir must be given .* 'user/name'"),
        ({"format": "torch", "variants": ["fp16"]}, r"variants are those of format 'onnx', got \['fp16'\]"),
        ({"dataset": "digits"}, "dataset 'digits' is for the calibration of int8"),
        ({"variants": ["int4"]}, "variants.*'int4'"),
        ({"calibration_images": 0}, "calibration_images.*0"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**{"model": str(tmp_path), **changes})
