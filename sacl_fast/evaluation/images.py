"""Which images an evaluation is on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sacl_fast.data.images.source import Source, Splits


class ChosenImages(NamedTuple):
    """Images to learn from and images to classify: positions in a source, in random order."""

    train: Source
    train_index: np.ndarray
    test: Source
    test_index: np.ndarray


def choose_images(
    splits: Splits, seed: int, *, train: int | None = None, test: int | None = None
) -> ChosenImages:
    """A random subset of the training images, and one of the validation images or, where there are
    none, of a tenth of the training images that the first then lacks.

    Args:
        train, test: images at most (None: all).
    """
    order = np.random.default_rng([seed, 0]).permutation(len(splits.train))
    if splits.val is not None:
        held_out = np.random.default_rng([seed, 1]).permutation(len(splits.val))
    else:
        count = max(1, len(order) // 10)
        held_out, order = order[:count], order[count:]
    tested = splits.train if splits.val is None else splits.val
    return ChosenImages(splits.train, order[:train], tested, held_out[:test])
