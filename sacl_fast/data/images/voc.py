"""PASCAL VOC 2007: images with objects of 20 classes, several in one image.

The official layout: a folder ``VOC2007`` (in ``VOCdevkit``) that holds ``JPEGImages``,
``Annotations`` and ``ImageSets/Main`` with ``trainval.txt`` and ``test.txt``. To pre-training and
kNN, which know one label an image, it is a source without labels; ``targets_of`` says which classes
are in an image.
"""

from __future__ import annotations

import http.client
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.config import DataConfig
from sacl_fast.data.images import archives
from sacl_fast.data.images.cache import cache_folder, exclusive
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.data.images.decode import BadImage, file_identity, read_bytes
from sacl_fast.data.images.root import check_downloadable, existing_root
from sacl_fast.data.images.source import FileSource, Source, Splits, Subset
from sacl_fast.data.images.splits import few
from sacl_fast.data.images.text import read_text
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import kind_of, user_path

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_PARTS = ("JPEGImages", "Annotations", "ImageSets/Main")
# What torchvision leaves of a download, whole or begun.
_DOWNLOADS = ("VOCdevkit", "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar")
_MOST = 2**20  # bytes of an annotation, which has 1,000


class VocSource(FileSource):
    """The images of a split. ``targets`` (N, 20) int8: 1 where the image has an object of the
    class, 0 where it has none, -1 where all that it has are marked as difficult."""

    def __init__(self, root: Path, names: list[str], targets: np.ndarray, most: int) -> None:
        super().__init__(np.full(len(names), -1), (), most)
        self.root, self.targets = root, targets
        self._names = np.array(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self.root / "JPEGImages" / f"{self._names[index]}.jpg")

    def identity(self, index: int) -> bytes:
        return file_identity(self.name(index), str(self._names[index]))


def targets_of(source: Source) -> np.ndarray | None:
    """(N, 20) int8, see ``VocSource``; None of a source whose images have one label or none."""
    if isinstance(source, Subset):
        inner = targets_of(source.source)
        return None if inner is None else inner[source.indices]
    return source.targets if isinstance(source, VocSource) else None


def open_voc(config: DataConfig, download: bool) -> Splits:
    """``trainval`` and ``test`` of VOC 2007 from ``data.root`` (default: data/voc2007), which is
    VOC2007 or a folder or archive that holds it.

    Raises:
        UserError: it is not there and cannot or must not be downloaded, or is not whole.
    """
    root = user_path(config.root or "data/voc2007", "data.root")
    if kind_of(root) == "file":
        root = archives.unpack(existing_root(config), cache_folder(config.cache_dir))
    found = find_voc(root)
    if found is None:
        check_downloadable(config, root, "VOC 2007", _DOWNLOADS)
        _download(root, download)
        found = find_voc(root)
        assert found is not None
    train, val = (_split(found, split, config.max_file_bytes) for split in ("trainval", "test"))
    return Splits(train, val)


def find_voc(root: Path, parts: int = len(_PARTS)) -> Path | None:
    """The folder VOC2007: ``root``, or a folder in it, that has so many of its parts; None where
    there is none."""
    for inner in (".", "VOC2007", "VOCdevkit/VOC2007"):
        if sum(kind_of(root / inner / part) == "folder" for part in _PARTS) >= parts:
            return root / inner
    return None


def _download(root: Path, download: bool) -> None:
    from torchvision.datasets import VOCDetection

    if not download:
        raise UserError(f"VOC 2007 is not in {root.absolute()} yet; training downloads it")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with exclusive(root / ".voc2007.lock"):
            for split in ("trainval", "test"):
                VOCDetection(str(root), year="2007", image_set=split, download=True)
    except (*DAMAGED, http.client.HTTPException) as error:
        raise UserError(
            f"VOC 2007 is not in {root.absolute()} and cannot be downloaded to it "
            f"({reason_of(error)}); data.root may be a folder that holds VOCdevkit/VOC2007 "
            f"({', '.join(_PARTS)}), or an archive of one ({', '.join(archives.SUFFIXES)})"
        ) from None


def _split(root: Path, split: str, most: int) -> VocSource:
    path = root / "ImageSets/Main" / f"{split}.txt"
    if kind_of(path) != "file":
        raise UserError(f"{path}, which names the images of {split}, is missing")
    names = [line.split()[0] for line in read_text(path).split("\n") if line.strip()]
    if not names:
        raise UserError(f"{path} names no images")
    if unsafe := [name for name in names if "/" in name or name.startswith(".")]:
        raise UserError(f"{path} names {few(unsafe, 3)}; names without '/' such as 000005 work")
    pictures = root / "JPEGImages"
    missing = [name for name in names if kind_of(pictures / f"{name}.jpg") != "file"]
    if missing:
        raise UserError(
            f"{pictures} lacks {len(missing)} of the {counted(len(names), 'image')} that "
            f"{path} names "
            f"({few([f'{name}.jpg' for name in missing], 3)})"
        )
    rows = [_classes_in(root / "Annotations" / f"{name}.xml") for name in names]
    return VocSource(root, names, np.stack(rows), most)


def _classes_in(path: Path) -> np.ndarray:
    """(20,) int8 of one annotation."""
    row, name = np.zeros(len(VOC_CLASSES), np.int8), ""
    try:
        objects = ElementTree.fromstring(read_bytes(str(path), _MOST)).findall("object")
        for item in objects:
            name = (item.findtext("name") or "").strip()
            position = VOC_CLASSES.index(name)
            difficult = (item.findtext("difficult") or "0").strip() == "1"
            row[position] = -1 if difficult and row[position] != 1 else 1
    except (BadImage, ElementTree.ParseError, LookupError) as error:
        raise UserError(f"annotation {path} cannot be read: {reason_and_remedy(error)}") from None
    except ValueError:
        known = ", ".join(VOC_CLASSES[:3])
        raise UserError(
            f"annotation {path} has the object {name!r}, which is none of VOC's 20 classes "
            f"({known}, ...)"
        ) from None
    return row
