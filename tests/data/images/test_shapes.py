"""The drawn shapes: balanced, reproducible, and hard to tell apart by their pixels."""

from __future__ import annotations

import numpy as np

from sacl_fast.data.images.shapes import CLASSES, draw_shapes


def test_shapes_sizes_and_balance() -> None:
    (images, labels), (val_images, val_labels) = draw_shapes(train=50, val=20)
    assert images.shape == (50, 32, 32, 3) and images.dtype == np.uint8
    assert val_images.shape == (20, 32, 32, 3)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [5] * len(CLASSES)
    assert np.bincount(val_labels).tolist() == [2] * len(CLASSES)


def test_same_seed_same_images() -> None:
    first, again, other = (draw_shapes(20, 20, seed)[0][0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    train, val = draw_shapes(20, 20)
    assert (train[0] != val[0]).any()


def test_shapes_stand_out_in_luma() -> None:
    """Grayscale views must show them: dark or bright, about 8 to 18 % of the image."""
    images, _ = draw_shapes(200, 10)[0]
    luma = images @ np.array([0.299, 0.587, 0.114]) / 255
    far = np.abs(luma - np.median(luma, (1, 2), keepdims=True)) > 0.2
    share = far.mean((1, 2))
    assert share.min() > 0.04 and share.max() < 0.3


def test_pixels_say_little_about_the_class() -> None:
    (images, labels), (queries, wanted) = draw_shapes(1500, 300)
    bank, query = (
        (flat := split.reshape(len(split), -1) / 255.0 - 0.5)
        / np.linalg.norm(flat, axis=1, keepdims=True)
        for split in (images, queries)
    )
    nearest = np.argsort(-query @ bank.T, 1)[:, :20]
    votes = np.stack([(labels[nearest] == c).sum(1) for c in range(len(CLASSES))], 1)
    assert (votes.argmax(1) == wanted).mean() < 0.3  # chance: 0.1
