"""CIFAR-10 and CIFAR-100: torchvision's data sets, downloaded where missing, or image folders of
them."""

from __future__ import annotations

import http.client
from pathlib import Path

from sacl_fast.config import DataConfig
from sacl_fast.data.images import archives
from sacl_fast.data.images.cache import cache_folder, exclusive
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.data.images.folder import folder_splits
from sacl_fast.data.images.root import check_downloadable, existing_root
from sacl_fast.data.images.source import ArraySource, Splits
from sacl_fast.data.images.splits import enter, find_splits
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import kind_of, user_path


def open_cifar(config: DataConfig, download: bool) -> Splits:
    """CIFAR-10 or CIFAR-100, as ``data.source`` says, from ``data.root`` (default: data/NAME).

    Raises:
        UserError: it is not there, and cannot or must not be downloaded.
    """
    name = config.source
    cache = cache_folder(config.cache_dir)
    root = user_path(config.root or f"data/{name}", "data.root")
    kind = kind_of(root)
    if kind == "file":
        root = enter(archives.unpack(existing_root(config), cache))
    if kind is not None and find_splits(root).train != root:
        return folder_splits(config, root, cache)
    return _torchvision_cifar(config, name, root, download)


def _torchvision_cifar(config: DataConfig, name: str, root: Path, download: bool) -> Splits:
    from torchvision.datasets import CIFAR10, CIFAR100

    data_set = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    if root.name == data_set.base_folder:
        root = root.parent

    def read(download: bool) -> list:
        return [data_set(str(root), train=train, download=download) for train in (True, False)]

    try:
        splits = read(download=False)
    except (OSError, RuntimeError):  # RuntimeError: torchvision's "not found or corrupted"
        own = [name for of in (CIFAR10, CIFAR100) for name in (of.base_folder, of.filename)]
        check_downloadable(config, root, data_set.__name__, own)
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
