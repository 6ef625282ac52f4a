"""Where images come from, behind one small interface: folders, archives, CIFAR, drawn shapes.

``open_sources`` turns the configuration into a training and a validation source. A source is
cheap to pickle and holds no Python object per image, so worker processes share its memory.
"""

from __future__ import annotations

import http.client
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.data import archives
from sacl_fast.data.cache import cache_folder, exclusive
from sacl_fast.data.decode import BadImage, file_identity, read_bytes, read_rgb
from sacl_fast.data.file_list import read_file_list
from sacl_fast.data.manifest import EXTENSIONS, Manifest, list_images
from sacl_fast.data.shapes import CLASSES, draw_shapes
from sacl_fast.data.webdataset import open_shards
from sacl_fast.errors import UserError

__all__ = ["ArraySource", "BadImage", "FolderSource", "Source", "Splits", "Subset", "open_sources"]

logger = logging.getLogger(__name__)

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "test")
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


class FolderSource:
    """Image files of a listing, with labels (N,) and class names, or without."""

    decoded = False

    def __init__(self, manifest: Manifest, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        self.manifest, self.labels, self.classes = manifest, labels, classes
        self.folder_of = manifest.folder_of

    def __len__(self) -> int:
        return len(self.manifest)

    def load(self, index: int) -> Image.Image:
        return read_rgb(self.name(index))

    def read(self, index: int) -> bytes:
        return read_bytes(self.name(index))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        manifest = self.manifest
        folder = manifest.folders[self.folder_of[index]]
        return os.path.join(manifest.root, folder, manifest.name(index))

    def identity(self, index: int) -> bytes:
        path = self.name(index)
        return file_identity(path, path.removeprefix(self.manifest.root))


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
        root, cache = _existing(config), cache_folder(config.cache_dir)
        if root.suffix.lower() == LIST_SUFFIX and root.is_file():
            splits = Splits(read_file_list(root, labelled=config.labels != "none"), None)
        else:
            splits = _folder(config, root, cache)
    elif config.source == "webdataset":
        splits = _webdataset(config, _existing(config), cache_folder(config.cache_dir))
    else:
        splits = _cifar(config, config.source, download)
    train = _limited(splits.train, config.limit, seed)
    val = "no" if splits.val is None else len(splits.val)
    logger.info("%d training images, %s validation images", len(train), val)
    return Splits(train, splits.val)


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
    root = Path(config.root).expanduser()
    if not root.exists():
        raise UserError(f"data.root is {root}, which does not exist (from {Path.cwd()})")
    if root.is_file() and not archives.is_archive(root) and root.suffix.lower() != LIST_SUFFIX:
        raise UserError(
            f"data.root is {root}, a file; a folder of images, an archive of one "
            f"({', '.join(archives.SUFFIXES)}) or a list of paths ({LIST_SUFFIX}) works"
        )
    return root


# --- folders -------------------------------------------------------------------------------------


def _folder(config: DataConfig, root: Path, cache: Path) -> Splits:
    if root.is_file():
        root = _enter(archives.unpack(root, cache))
    train_root = _first_folder(root, _TRAIN)
    val_root = _first_folder(root, _VAL) if train_root else None
    train = _labelled(list_images(train_root or root, cache), config.labels)
    if val_root is None or not train.classes:
        return Splits(train, None)
    return Splits(train, _validation(list_images(val_root, cache), train))


def _enter(folder: Path) -> Path:
    """The one folder that wraps everything in an archive, or ``folder`` where there is none."""
    inside = [p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX"]
    wrapped = len(inside) == 1 and inside[0].is_dir() and inside[0].name not in _TRAIN
    return inside[0] if wrapped else folder


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _require_images(manifest: Manifest) -> None:
    if len(manifest) == 0:
        raise UserError(
            f"no images in {manifest.root}: files that end in {', '.join(EXTENSIONS)} count, in "
            "it and in its folders"
        )


def _labelled(manifest: Manifest, rule: Literal["auto", "folder", "none"]) -> FolderSource:
    """The training images, with the labels that ``rule`` (``DataConfig.labels``) gives them."""
    _require_images(manifest)
    top = _top_folders(manifest)
    classes = tuple(dict.fromkeys(top[manifest.counts > 0].tolist()))  # sorted, as folders are
    if rule == "folder" and "" in classes:
        raise UserError(
            f"data.labels is folder, but {manifest.counts[0]} images lie directly in "
            f"{manifest.root} (such as {manifest.name(0)}); every image in a class folder works, "
            "and so does data.labels none"
        )
    if rule == "folder" and len(classes) == 1:
        raise UserError(
            f"data.labels is folder, but {manifest.root} has one class folder only, {classes[0]}; "
            "two or more work, and so does data.labels none"
        )
    if rule == "none" or "" in classes or len(classes) == 1:
        return FolderSource(manifest, np.full(len(manifest), -1), ())
    return FolderSource(manifest, _positions(manifest, top, classes), classes)


def _validation(manifest: Manifest, train: FolderSource) -> FolderSource:
    """The validation images, labelled with the classes of ``train``."""
    _require_images(manifest)
    top = _top_folders(manifest)
    unknown = sorted(set(top[manifest.counts > 0].tolist()) - set(train.classes))
    if unknown:
        found = "images without a class folder" if unknown == [""] else _few(unknown)
        raise UserError(
            f"{manifest.root} has {found}, but the classes of {train.manifest.root} are "
            f"{_few(train.classes)}; the same class folders in both work, and so does data.labels "
            "none (no kNN evaluation)"
        )
    return FolderSource(manifest, _positions(manifest, top, train.classes), train.classes)


def _top_folders(manifest: Manifest) -> np.ndarray:
    """(F,) str: the folder directly below the root in which each folder lies, "" for the root."""
    return np.array([folder.partition("/")[0] for folder in manifest.folders], dtype=object)


def _positions(manifest: Manifest, top: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    position = {name: index for index, name in enumerate(classes)}
    return np.repeat([position.get(name, -1) for name in top], manifest.counts)


def _few(names: Sequence[str], show: int = 5) -> str:
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + more


# --- shards --------------------------------------------------------------------------------------


def _webdataset(config: DataConfig, root: Path, cache: Path) -> Splits:
    train_root = _first_folder(root, _TRAIN)
    val_root = _first_folder(root, _VAL) if train_root else None
    classes = () if config.labels == "none" else None
    train = open_shards(train_root or root, cache, classes)
    if val_root is None or not train.classes:
        return Splits(train, None)
    return Splits(train, open_shards(val_root, cache, train.classes))


# --- CIFAR ---------------------------------------------------------------------------------------


def _cifar(config: DataConfig, name: Literal["cifar10", "cifar100"], download: bool) -> Splits:
    cache = cache_folder(config.cache_dir)
    root = Path(config.root or f"data/{name}").expanduser()
    if root.is_file():
        root = archives.unpack(_existing(config), cache)
        if _first_folder(root, ("cifar-10-batches-py", "cifar-100-python")) is None:
            root = _enter(root)
    if _first_folder(root, _TRAIN):
        return _folder(config, root, cache)
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
    except RuntimeError:  # torchvision's "not found or corrupted"
        if not download:
            raise UserError(
                f"{data_set.__name__} is not in {root.absolute()} yet; training downloads it"
            ) from None
        try:
            with exclusive(root / f".{name}.lock"):
                splits = read(download=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"{data_set.__name__} is not in {root.absolute()} and cannot be downloaded to it "
                f"({error}); data.root may be a folder with torchvision's copy "
                f"({data_set.base_folder}), or an image folder with train/ and test/, or an "
                f"archive of either ({', '.join(archives.SUFFIXES)})"
            ) from None
    classes = () if config.labels == "none" else tuple(splits[0].classes)
    train, val = (
        ArraySource(title, split.data, split.targets, classes)
        for title, split in zip((name, f"{name}-test"), splits, strict=True)
    )
    return Splits(train, val)
