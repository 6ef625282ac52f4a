"""WebDataset shards: .tar files of images, read where they are, by offset.

An image and its label are neighbours that share a name: ``0001.jpg``, ``0001.cls`` (the position of
the class, or its name, as text). What else a sample has does not matter here.

The convention splits names at their first dot, which makes one sample of ``v1.2.jpg`` and
``v1.3.jpg``. Where a sample has no image but of that kind, its names are split at the last dot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.config import DataConfig
from sacl_fast.data.images.cache import cache_folder
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.data.images.decode import read_bytes
from sacl_fast.data.images.manifest import EXTENSIONS, is_image
from sacl_fast.data.images.root import existing_root
from sacl_fast.data.images.shard_index import Member, Sample, find_shards, shard_index
from sacl_fast.data.images.source import FileSource, Splits
from sacl_fast.data.images.splits import few, find_splits, split_by_name
from sacl_fast.data.images.tar import BLOCK
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import kind_of

logger = logging.getLogger(__name__)

_LABEL = "cls"
_LONGEST_LABEL = 4096  # bytes


class WebDatasetSource(FileSource):
    """The N images of some shards."""

    def __init__(
        self,
        shards: Sequence[Path],
        shard_of: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
        most: int = DataConfig.max_file_bytes,
    ) -> None:
        super().__init__(labels, classes, most)
        self.shards = tuple(map(str, shards))
        self.shard_of, self.offsets, self.sizes = shard_of, offsets, sizes

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        return self._read(index, None)

    def head(self, index: int, count: int) -> bytes:
        return self._read(index, count)

    def _read(self, index: int, first: int | None) -> bytes:
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        return read_bytes(self.shards[self.shard_of[index]], self.most, offset, size, first)

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard_of[index]]}@{self.offsets[index]}"

    def identity(self, index: int) -> bytes:
        shard = os.path.basename(self.shards[self.shard_of[index]])
        return os.fsencode(f"{shard}\0{self.offsets[index]}\0{self.sizes[index]}")


def open_webdataset(config: DataConfig, _download: bool) -> Splits:
    """The images in the shards of ``data.root``."""
    root, cache = existing_root(config), cache_folder(config.cache_dir)
    train_root, val_root = find_splits(root) if kind_of(root) == "folder" else (root, None)
    shards = find_shards(train_root)
    train_shards, val_shards = (
        (shards, find_shards(val_root)) if val_root else split_by_name(shards)
    )
    train = open_shards(train_shards, cache, config, () if config.labels == "none" else None)
    if not val_shards or not train.classes:
        return Splits(train, None)
    return Splits(train, open_shards(val_shards, cache, config, train.classes))


def open_shards(
    shards: Sequence[Path], cache: Path, config: DataConfig, classes: tuple[str, ...] | None
) -> WebDatasetSource:
    """The images of ``shards``. ``classes``: those that labels may name; (): no labels; None: all
    that occur, if every image has a label."""
    rows, names, unused = [], [], []
    for number, shard in enumerate(shards):
        labels = []
        for sample in shard_index(shard, cache):
            for image, label, others in _images(sample):
                rows.append((number, image.offset, image.size))
                labels.append(label)
                unused += others
        if classes != ():
            names += _texts(shard, labels)
    where = shards[0].parent
    if not rows:
        raise UserError(
            f"no images in the shards of {where}: files in them that end in "
            f"{', '.join(EXTENSIONS)} count"
        )
    if unused:
        logger.warning(
            "ignored %s in the shards of %s: their samples have another by the name before "
            "the first dot (%s)",
            *(counted(len(unused), "image"), where, few(unused, 3)),
        )
    shard_of, offsets, sizes = np.array(rows, np.int64).T
    if classes is None:
        classes = _classes(names, where)
    position = {name: i for i, name in enumerate(classes)}
    if classes and (unknown := sorted(set(map(str, names)) - position.keys())):
        raise UserError(
            f"the shards of {where} have images of class {few(unknown)}, which those for "
            "training have not; data.labels none works where no labels are needed"
        )
    labels = np.array([position[name] for name in names] if classes else [-1] * len(rows))
    return WebDatasetSource(
        *(shards, shard_of, offsets, sizes, labels, classes, config.max_file_bytes)
    )


def _images(sample: Sample) -> Iterator[tuple[Member, Member | None, list[str]]]:
    """The image of a sample, its label, and the names of other images in it. Several where their
    names have more dots than the one of the convention."""
    images = [member for member in sample if is_image(f".{member.extension}")]
    plain = [member for member in images if member.extension in EXTENSIONS]
    if plain:
        others = [member.name or member.extension for member in images if member is not plain[0]]
        yield plain[0], next((m for m in sample if m.extension == _LABEL), None), others
        return
    parted = [(*member.extension.rpartition(".")[::2], member) for member in sample]
    label_of = {stem: member for stem, kind, member in parted if kind == _LABEL}
    images_of: dict[str, list[Member]] = {}
    for stem, kind, member in parted:
        if kind in EXTENSIONS:
            images_of.setdefault(stem, []).append(member)
    for stem, (image, *others) in images_of.items():
        label = label_of.get(stem, label_of.get(""))  # "": of all that begin alike
        yield image, label, [member.name or member.extension for member in others]


def _classes(names: Sequence[str | None], where: Path) -> tuple[str, ...]:
    found = {name for name in names if name is not None}
    if len(found) > 1 and None in names:
        logger.warning(
            "no labels: %d of %s in the shards of %s have no .%s of their name beside them",
            *(names.count(None), counted(len(names), "image"), where, _LABEL),
        )
    return () if None in names or len(found) < 2 else tuple(sorted(found, key=_natural))


def _natural(name: str) -> tuple[int, str]:
    """Numbers in their order, before words."""
    return (int(name), "") if name.isdecimal() and len(name) < 19 else (2**62, name)


def _texts(shard: Path, members: Sequence[Member | None]) -> list[str | None]:
    """The labels that ``members`` of a shard hold, None for those without."""
    found: list[str | None] = []
    try:
        with shard.open("rb") as file:
            for member in members:
                found.append(None if member is None else _label(file, member))
    except DAMAGED as error:
        raise UserError(
            f"cannot read the labels in {shard}: {reason_of(error)}; sacl-fast index makes its "
            "index anew, and data.labels none does without labels"
        ) from None
    return found


def _label(file: BinaryIO, member: Member) -> str | None:
    if member.size > _LONGEST_LABEL:
        raise ValueError(f"{member.name} has {member.size} bytes, and {_LONGEST_LABEL} may be")
    file.seek(member.offset - BLOCK)
    size = int(file.read(BLOCK)[124:136].strip(b" \0"), 8)  # as its header says
    if size != member.size:
        raise ValueError(f"{member.name} has {size} bytes, and the index says {member.size}")
    return file.read(member.size).decode(errors="surrogateescape").strip() or None
