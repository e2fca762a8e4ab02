"""Built-in data sets, made of what scikit-learn ships: no download."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image

PHOTO_PATCH = 32
TEST_COLUMN = 512  # training patches lie left of this column of pixels, test patches right of it


def digits() -> datasets.DatasetDict:
    """The 1,797 handwritten digits of scikit-learn (8×8, 17 gray levels), as images with a label.

    The split is fixed and stratified: 1,437 for training, 360 for testing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = (source.images * (255 / 16)).round().astype(np.uint8)
    train, test = train_test_split(np.arange(len(pixels)), test_size=360, stratify=source.target, random_state=0)
    classes = datasets.ClassLabel(num_classes=10)
    splits = {"train": train, "test": test}
    return datasets.DatasetDict({name: _dataset(pixels[i], source.target[i], classes) for name, i in splits.items()})


def photos() -> datasets.DatasetDict:
    """32×32 RGB patches of the two photographs of scikit-learn, china.jpg and flower.jpg (427×640), labeled by photograph:
    4,096 for training, 512 for testing.

    The patches are fixed: those for training from the left 512 columns, those for testing from the right 128, so that no
    pixel is in both.
    """
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    height, width = pictures[0].shape[:2]
    random = np.random.RandomState(0)

    def split(num_patches: int, left: int, right: int) -> datasets.Dataset:
        labels = np.arange(num_patches) % 2
        rows = random.randint(0, height - PHOTO_PATCH + 1, num_patches)
        columns = random.randint(left, right - PHOTO_PATCH + 1, num_patches)
        corners = zip(labels, rows, columns)
        patches = (pictures[label][y : y + PHOTO_PATCH, x : x + PHOTO_PATCH] for label, y, x in corners)
        return _dataset(patches, labels, datasets.ClassLabel(names=["china", "flower"]))

    return datasets.DatasetDict(train=split(4096, 0, TEST_COLUMN), test=split(512, TEST_COLUMN, width))


def _dataset(images: Iterable[np.ndarray], labels: np.ndarray, classes: datasets.ClassLabel) -> datasets.Dataset:
    columns = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    return datasets.Dataset.from_dict(columns, features=features)


@dataclass(frozen=True)
class BuiltinDataset:
    """A built-in data set: the function that makes it, its source, and the module that judges the quality of samples (see
    `ddpm_hf.evaluation.judges`), if there is one."""

    load: Callable[[], datasets.DatasetDict]
    source: str
    judge: str | None = None


BUILTIN = {
    "digits": BuiltinDataset(digits, "scikit-learn/load_digits", judge="ddpm_hf.evaluation.digits"),
    "photos": BuiltinDataset(photos, "scikit-learn/load_sample_images"),
}
