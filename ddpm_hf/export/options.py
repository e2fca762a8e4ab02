"""The options of an export. Imports no torch, so that --help answers at once."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from ddpm_hf.options import check_options, option


@dataclass
class ExportOptions:
    """Every option of `training/export.py`."""

    model: str = option(MISSING, "folder, or repository on the Hub; may be given first, without --model")
    format: Literal["onnx", "torch"] = option("onnx", "'torch': a program of torch.export, model.pt2")
    variants: list[Literal["fp16", "int8"]] | None = option(
        None, "ONNX files to write beside the one in float32: weights in half precision, or 8-bit arithmetic"
    )
    dataset: str | None = option(
        None, "images whose noised versions calibrate int8, as for train.py; None: samples of the model"
    )
    dataset_config: str | None = option(None, "configuration of a data set on the Hub")
    dataset_revision: str | None = option(None, "branch, tag or commit of a data set on the Hub")
    split: str = option("train", "split of the data set")
    image_column: str | None = option(None, "column of images; None: the only one")
    label_column: str | None = option(None, "column of labels, for a class-conditional model; None: the run's")
    calibration_images: int = option(128, "number of images, each at one timestep", "[1, inf)")
    output_dir: str | None = option(None, "folder to write to; None: the model's")

    def __post_init__(self):
        check_options(self)
        if self.output_dir is None and not Path(self.model).is_dir():
            needed = "output_dir must be given for a model that is not a local folder"
            raise ValueError(f"{needed}, got model {self.model!r}.")
        if self.format == "torch" and self.variants:
            raise ValueError(f"variants are those of format 'onnx', got {self.variants} with format 'torch'.")
        if self.dataset is not None and "int8" not in (self.variants or []):
            raise ValueError(f"dataset {self.dataset!r} is for the calibration of int8, which variants do not name.")
