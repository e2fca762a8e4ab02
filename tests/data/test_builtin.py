"""The built-in data sets are the images that scikit-learn ships, in fixed splits."""

import numpy as np
from sklearn.datasets import load_digits, load_sample_image

from ddpm_hf.data.builtin import digits, photos
from ddpm_hf.data.columns import fingerprint


def test_digits_are_those_of_scikit_learn_split_without_overlap():
    splits = digits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    original = {image.tobytes() for image in (load_digits().images * (255 / 16)).round().astype(np.uint8)}
    seen = [np.asarray(row["image"]).tobytes() for split in splits.values() for row in split]
    assert set(seen) == original and len(seen) == 1797
    labels = np.bincount(splits["test"]["label"])
    assert labels.min() >= 34 and labels.max() <= 38


def test_photos_are_patches_of_two_photographs_split_without_overlap():
    splits = photos()
    assert {name: len(split) for name, split in splits.items()} == {"train": 4096, "test": 512}
    pictures = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    windows = [np.lib.stride_tricks.sliding_window_view(p, (32, 32), axis=(0, 1)) for p in pictures]
    for name, columns in (("train", range(0, 481)), ("test", range(512, 609))):
        labels = splits[name]["label"]
        assert labels.count(0) == labels.count(1) == len(labels) / 2
        for row in splits[name].select(range(0, len(labels), 37)):
            patch = np.asarray(row["image"])
            corner = (windows[row["label"]][..., 0, 0] == patch[0, 0]).all(-1)
            corners = [
                x for y, x in np.argwhere(corner) if (windows[row["label"]][y, x] == patch.transpose(2, 0, 1)).all()
            ]
            assert any(x in columns for x in corners)
    again = photos()
    assert all(fingerprint(splits[name]) == fingerprint(again[name]) for name in splits)
