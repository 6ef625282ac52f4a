"""Which images an evaluation is on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.data.images.source import Source, Splits
from sacl_fast.data.images.splits import few
from sacl_fast.errors import UserError


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


def require_classes(images: ChosenImages, works: str = "data.limit") -> None:
    """Refuse images whose classes cannot be learnt; ``works``: settings that give more of them."""
    classes = images.train.classes
    if len(classes) < 2:
        found = f"one class only ({few(classes)})" if classes else "no labels or one class only"
        raise UserError(
            f"the images have {found}, so nothing can be told from their classes; images of two "
            "classes or more work, such as in a folder for each (data.labels)"
        )
    there, tested = _of_each_class(images)
    if lacking := [classes[label] for label in tested if not there[label]]:
        if images.test is images.train:
            raise UserError(
                f"all images of class {few(lacking)} are in the tenth that is held out for want of "
                f"validation images; more of each class ({works}), or validation images, work"
            )
        raise UserError(
            f"the training images have none of class {few(lacking)}, which images to be classified "
            f"are of; more training images work ({works})"
        )
    if (there > 0).sum() < 2:
        only = few([classes[i] for i in np.flatnonzero(there)])
        raise UserError(
            f"the training images are of one class only ({only}), so nothing can be told "
            "from their classes; images of two or more work"
        )


def require_per_class(images: ChosenImages, count: int) -> None:
    """Refuse images that have not ``count`` to learn from of each class to be classified."""
    there, tested = _of_each_class(images)
    fewest = tested[there[tested].argmin()]
    if count > there[fewest]:
        raise UserError(
            f"per_class is {count}, but class {few([images.train.classes[fewest]])} has only "
            f"{counted(int(there[fewest]), 'training image')}; at most {there[fewest]} works"
        )


def _of_each_class(images: ChosenImages) -> tuple[np.ndarray, np.ndarray]:
    """Training images of each class (C,), and the classes of the images to be classified."""
    labels = images.train.labels[images.train_index]
    there = np.bincount(labels, minlength=len(images.train.classes))
    return there, np.unique(images.test.labels[images.test_index])
