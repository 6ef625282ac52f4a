"""Where images come from, behind one small interface: folders, archives, CIFAR, drawn shapes.

``open_sources`` turns the configuration into a training and a validation source. A source is
cheap to pickle and holds no Python object per image, so worker processes share its memory.
"""

from __future__ import annotations

import http.client
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.data.images import archives
from sacl_fast.data.images.cache import cache_folder, exclusive
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.file_list import read_file_list
from sacl_fast.data.images.folder import open_folder
from sacl_fast.data.images.shapes import CLASSES, draw_shapes
from sacl_fast.data.images.shard_index import find_shards
from sacl_fast.data.images.splits import enter, few, find_splits, split_by_name
from sacl_fast.data.images.webdataset import open_shards
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import kind_of, user_path

__all__ = ["ArraySource", "BadImage", "Source", "Splits", "Subset", "open_sources"]

logger = logging.getLogger(__name__)

LIST_SUFFIX = ".txt"


class Source(Protocol):
    """N images by index."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, () without labels."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 positions in ``classes``, all -1 without labels."""
        ...

    def __len__(self) -> int: ...

    @property
    def decoded(self) -> bool:
        """Whether ``read`` gives pixels."""
        ...

    def load(self, index: int) -> Image.Image:
        """The image, mode RGB. BadImage where it cannot be read."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The image as it is kept: an encoded file, or pixels (H, W, 3) uint8. BadImage where it
        cannot be read; whether a file holds an image is not looked at."""
        ...

    def label(self, index: int) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in messages."""
        ...

    def identity(self, index: int) -> bytes:
        """What tells the image from another in its place, at the cost of a look at the file at
        most: its name within the data set and its size, or its pixels."""
        ...


class Splits(NamedTuple):
    train: Source
    val: Source | None


class ArraySource:
    """Images in memory: ``images`` (N, H, W, 3) uint8, called ``title[index]``."""

    decoded = True

    def __init__(
        self, title: str, images: np.ndarray, labels: Sequence[int] | np.ndarray, classes: tuple
    ) -> None:
        self.title, self.images, self.classes = title, images, classes
        self.labels = np.asarray(labels, np.int64) if classes else np.full(len(images), -1)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def identity(self, index: int) -> bytes:
        return self.images[index].tobytes()


class Subset:
    """The images of ``source`` at ``indices`` (M,)."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.classes, self.labels = source.classes, source.labels[indices]
        self.decoded = source.decoded

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.source.load(self.indices[index])

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(self.indices[index])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def identity(self, index: int) -> bytes:
        return self.source.identity(self.indices[index])


def open_sources(config: DataConfig, seed: int, *, download: bool = True) -> Splits:
    """The training and validation images of ``config``; ``seed`` chooses those of ``limit``.

    Archives are unpacked and data sets downloaded where they are not at hand. What the user can
    mend (no such folder, no images in it, no network, ``download`` ruled out) is a UserError.
    """
    if config.source == "demo":
        splits = _demo(config)
    elif config.source == "folder":
        splits = _folder(config)
    elif config.source == "webdataset":
        splits = _webdataset(config, _existing(config), cache_folder(config.cache_dir))
    else:
        splits = _cifar(config, config.source, download)
    train = _limited(splits.train, config.limit, seed)
    val = "no" if splits.val is None else len(splits.val)
    logger.info("%d training images, %s validation images", len(train), val)
    logger.info("%s", _described_labels(train.classes, config))
    return Splits(train, splits.val)


def _described_labels(classes: Sequence[str], config: DataConfig) -> str:
    if not classes:
        return "no labels, so no kNN evaluation"
    origin = {
        "folder": "the names of folders, or of classes in the list",
        "webdataset": "the .cls files in the shards",
    }.get(config.source, f"those of {config.source}")
    return (
        f"labels for kNN evaluation: {len(classes)} classes ({few(classes)}), which are {origin}; "
        "data.labels none does without"
    )


def _limited(source: Source, limit: int, seed: int) -> Source:
    if not 0 < limit < len(source):
        return source
    indices = np.random.default_rng(seed).choice(len(source), limit, replace=False)
    return Subset(source, np.sort(indices))


def _demo(config: DataConfig) -> Splits:
    classes = () if config.labels == "none" else CLASSES
    train, val = draw_shapes()
    return Splits(
        ArraySource("demo", *train, classes),
        ArraySource("demo-val", *val, classes),
    )


def _existing(config: DataConfig) -> Path:
    if not config.root:
        raise UserError(
            "no images given: data.root takes a folder of images or an archive of one "
            f"({', '.join(archives.SUFFIXES)}); data.source demo needs none"
        )
    root = user_path(config.root, "data.root")
    kind = kind_of(root)
    if kind is None:
        raise UserError(f"data.root is {root}, which does not exist (from {Path.cwd()})")
    if kind != "folder" and not (kind == "file" and (archives.is_archive(root) or _is_list(root))):
        what = "a file" if kind == "file" else "a pipe, a socket or a device"
        raise UserError(
            f"data.root is {root}, {what}; a folder of images, an archive of one "
            f"({', '.join(archives.SUFFIXES)}) or a list of paths ({LIST_SUFFIX}) works"
        )
    return root


def _is_list(root: Path) -> bool:
    return root.suffix.lower() == LIST_SUFFIX


# --- folders -------------------------------------------------------------------------------------


def _folder(config: DataConfig) -> Splits:
    root, cache = _existing(config), cache_folder(config.cache_dir)
    if kind_of(root) == "file":
        if _is_list(root):
            return Splits(read_file_list(root, config), None)
        root = enter(archives.unpack(root, cache))
    return Splits(*open_folder(config, root, cache))


# --- shards --------------------------------------------------------------------------------------


def _webdataset(config: DataConfig, root: Path, cache: Path) -> Splits:
    train_root, val_root = find_splits(root) if kind_of(root) == "folder" else (root, None)
    shards = find_shards(train_root)
    train_shards, val_shards = (
        (shards, find_shards(val_root)) if val_root else split_by_name(shards)
    )
    train = open_shards(train_shards, cache, config, () if config.labels == "none" else None)
    if not val_shards or not train.classes:
        return Splits(train, None)
    return Splits(train, open_shards(val_shards, cache, config, train.classes))


# --- CIFAR ---------------------------------------------------------------------------------------


def _cifar(config: DataConfig, name: Literal["cifar10", "cifar100"], download: bool) -> Splits:
    cache = cache_folder(config.cache_dir)
    root = user_path(config.root or f"data/{name}", "data.root")
    kind = kind_of(root)
    if kind == "file":
        root = enter(archives.unpack(_existing(config), cache))
    if kind is not None and find_splits(root).train != root:
        return Splits(*open_folder(config, root, cache))
    return _torchvision_cifar(config, name, root, download)


def _torchvision_cifar(
    config: DataConfig, name: Literal["cifar10", "cifar100"], root: Path, download: bool
) -> Splits:
    from torchvision.datasets import CIFAR10, CIFAR100

    data_set = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    if root.name == data_set.base_folder:
        root = root.parent

    def read(download: bool) -> list:
        return [data_set(str(root), train=train, download=download) for train in (True, False)]

    try:
        splits = read(download=False)
    except (OSError, RuntimeError):  # RuntimeError: torchvision's "not found or corrupted"
        if not download:
            raise UserError(
                f"{data_set.__name__} is not in {root.absolute()} yet; training downloads it"
            ) from None
        try:
            root.mkdir(parents=True, exist_ok=True)
            with exclusive(root / f".{name}.lock"):
                splits = read(download=True)
        except (*DAMAGED, http.client.HTTPException) as error:
            raise UserError(
                f"{data_set.__name__} is not in {root.absolute()} and cannot be downloaded to it "
                f"({reason_of(error)}); data.root may be a folder with torchvision's copy "
                f"({data_set.base_folder}), or an image folder with train/ and test/, or an "
                f"archive of either ({', '.join(archives.SUFFIXES)})"
            ) from None
    classes = () if config.labels == "none" else tuple(splits[0].classes)
    train, val = (
        ArraySource(title, split.data, split.targets, classes)
        for title, split in zip((name, f"{name}-test"), splits, strict=True)
    )
    return Splits(train, val)
