"""A small evaluation: 60 digits of each split, and a tiny DINOv2 with random weights."""

from pathlib import Path

import datasets
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from ddpm_hf.data.builtin import digits

DIM = 12


def small_evaluation(model: Path, folder: Path) -> dict[str, object]:
    """The options of an evaluation of a digits model, whose data and backbone are written to `folder`."""
    sizes = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dinov2")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessorPil(**size).save_pretrained(folder / "dinov2")
    some = {name: split.select(range(60)) for name, split in digits().items()}
    datasets.DatasetDict(some).save_to_disk(folder / "some_digits")
    return {
        "model": str(model),
        "dataset": str(folder / "some_digits"),
        "features": str(folder / "dinov2"),
        "num_samples": 20,
        "bound_images": 12,
        "bound_stride": 3,
        "cache_dir": str(folder / "cache"),
    }
