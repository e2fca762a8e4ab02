"""Data sets that need no download: scikit-learn ships what they are made of."""

from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image

PHOTO_PATCH = 32
TEST_COLUMN = 512  # test patches lie right of it, training patches left


def digits() -> datasets.DatasetDict:
    """The 1,797 hand-written digits that scikit-learn ships (8×8, 17 gray levels), as images with a label.

    Split once and for all, stratified: 1,437 to train on, 360 held out.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = (source.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    train, test = train_test_split(np.arange(len(pixels)), test_size=360, stratify=source.target, random_state=0)

    def split(indices: np.ndarray) -> datasets.Dataset:
        columns = {"image": [Image.fromarray(pixels[i]) for i in indices], "label": source.target[indices].tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    return datasets.DatasetDict(train=split(train), test=split(test))


def photos() -> datasets.DatasetDict:
    """32×32 RGB patches of the two photographs that scikit-learn ships, china.jpg and flower.jpg (427×640), labeled by
    photograph: 4,096 to train on, 512 held out.

    The places are drawn once and for all: training patches anywhere in the left 512 columns, validation patches anywhere
    in the right 128, so that no pixel is in both.
    """
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["china", "flower"])})
    random = np.random.RandomState(0)

    def split(num_patches: int, left: int, right: int) -> datasets.Dataset:
        labels = np.arange(num_patches) % 2
        rows = random.randint(0, pictures[0].shape[0] - PHOTO_PATCH + 1, num_patches)
        columns = random.randint(left, right - PHOTO_PATCH + 1, num_patches)
        patches = [
            Image.fromarray(pictures[label][y : y + PHOTO_PATCH, x : x + PHOTO_PATCH])
            for label, y, x in zip(labels, rows, columns)
        ]
        return datasets.Dataset.from_dict({"image": patches, "label": labels.tolist()}, features=features)

    return datasets.DatasetDict(train=split(4096, 0, TEST_COLUMN), test=split(512, TEST_COLUMN, pictures[0].shape[1]))


@dataclass(frozen=True)
class BuiltinDataset:
    """A data set that needs no download: what makes it, where it comes from, and the module that can judge samples of it
    (see `ddpm_hf.evaluation.judges`), if there is one."""

    load: Callable[[], datasets.DatasetDict]
    source: str
    judge: str | None = None


BUILTIN = {
    "digits": BuiltinDataset(digits, "scikit-learn/load_digits", judge="ddpm_hf.evaluation.digits"),
    "photos": BuiltinDataset(photos, "scikit-learn/load_sample_images"),
}
