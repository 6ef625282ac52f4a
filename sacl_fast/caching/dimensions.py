"""What images take once they are decoded, by their headers: before anything is decoded, a disk that
is too small is known, and which images to decode at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_fast.data.images.decode import BadImage, image_size
from sacl_fast.data.images.pixel_format import padded
from sacl_fast.data.images.source import FileSource, Source, Subset

_HEAD = 2**16  # bytes: most headers, with the thumbnail before the size in a JPEG, are shorter


class Dimensions(NamedTuple):
    """Of n images, as they leave a worker."""

    room: Tensor  # (n,) int64: bytes in the file, 0 of what is no image
    told: Tensor  # (n,) bool: whether the header says exactly


class DimensionReader:
    """A range of images of both splits to their ``Dimensions``, if larger ones are shrunk to
    ``size``."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, key: tuple[int, int]) -> Dimensions:
        room, told = [], []
        for index in range(*key):
            width, height, exact = _dimensions(*self.images.where(index))
            width, height = shrunk(width, height, self.size)
            room.append(padded(width * height * 3))
            told.append(exact)
        return Dimensions(torch.tensor(room), torch.tensor(told))


class Images:
    """The images of both splits as one sequence, those for training first."""

    def __init__(self, train: Source, val: Source | None) -> None:
        self.splits = [train] if val is None else [train, val]
        self.train, self.count = len(train), sum(map(len, self.splits))

    def where(self, index: int) -> tuple[Source, int]:
        """The split of an image, and its index there."""
        if index < self.train:
            return self.splits[0], index
        return self.splits[1], index - self.train


def shrunk(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of an image whose shorter side is to have ``size`` px at most (0: any), as
    torchvision's Resize rounds."""
    short = min(width, height)
    if not 0 < size < short:
        return width, height
    return int(size * width / short), int(size * height / short)


def _dimensions(source: Source, index: int) -> tuple[int, int, bool]:
    """Width and height of an image, 0 where there is none, and whether that is exact."""
    while isinstance(source, Subset):
        source, index = source.source, int(source.indices[index])
    placement: Any = getattr(source, "placement", None)
    if placement is not None:
        _, height, width = placement[index].tolist()
        return width, height, True
    try:
        if isinstance(source, FileSource):
            try:
                return image_size(source.head(index, _HEAD))
            except BadImage:  # or its header is longer
                pass
        data = source.read(index)
        if isinstance(data, np.ndarray):
            height, width, _ = data.shape
            return width, height, True
        return image_size(data)
    except BadImage:
        return 0, 0, True
