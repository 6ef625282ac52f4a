"""The sources by the names that ``data.source`` takes; ``open_sources`` is what all else calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.config import DataConfig
from sacl_fast.config.choices import SourceName
from sacl_fast.data.images.cifar import open_cifar
from sacl_fast.data.images.folder import open_folder
from sacl_fast.data.images.given import Given, given_splits, open_given
from sacl_fast.data.images.pixel_file import open_cache
from sacl_fast.data.images.shapes import open_demo
from sacl_fast.data.images.source import Source, Splits, Subset
from sacl_fast.data.images.splits import few
from sacl_fast.data.images.voc import open_voc
from sacl_fast.data.images.webdataset import open_webdataset

logger = logging.getLogger(__name__)

_NOTHING = Given()

# Name to what opens it: the training and validation images of a configuration. The second argument
# says whether what is missing may be downloaded.
SOURCES: dict[SourceName, Callable[[DataConfig, bool], Splits]] = {
    "demo": open_demo,
    "folder": open_folder,
    "webdataset": open_webdataset,
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "python": open_given,
    "voc2007": open_voc,
    "cache": open_cache,
}


def open_sources(
    config: DataConfig, seed: int, *, download: bool = True, given: Given = _NOTHING
) -> Splits:
    """The training and validation images of ``config``; ``seed`` chooses those of ``limit``.
    ``given``: images from Python in their place.

    Archives are unpacked and data sets downloaded where they are not at hand. What the user can
    mend (no such folder, no images in it, no network, ``download`` ruled out) is a UserError.
    """
    splits = given_splits(config, given) or SOURCES[config.source](config, download)
    train = _limited(splits.train, config.limit, seed)
    val = "no validation images" if train.classes else "none for validation, which needs labels"
    if splits.val is not None:
        val = counted(len(splits.val), "validation image")
    logger.info("%s, %s", counted(len(train), "training image"), val)
    logger.info("%s", _described_labels(train.classes, config))
    return Splits(train, splits.val)


def _described_labels(classes: Sequence[str], config: DataConfig) -> str:
    if config.source == "voc2007":
        return "labels: several classes an image, which fine-tuning alone uses"
    if not classes:
        return "no labels"
    origin = {
        "folder": "the names of folders, or of classes in the list",
        "webdataset": "the .cls files in the shards",
        "python": "those of the images given",
        "cache": "those of the images that it was made of",
    }.get(config.source, f"those of {config.source}")
    return (
        f"labels: {counted(len(classes), 'class')} ({few(classes)}), which "
        f"are {origin}; "
        "data.labels none does without"
    )


def _limited(source: Source, limit: int, seed: int) -> Source:
    if not 0 < limit < len(source):
        return source
    indices = np.random.default_rng(seed).choice(len(source), limit, replace=False)
    return Subset(source, np.sort(indices))
