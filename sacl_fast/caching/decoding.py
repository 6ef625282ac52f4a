"""Images to the bytes that a cache holds of them."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sacl_fast.caching.dimensions import Images, shrunk
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.pixel_format import padded


class Decoded(NamedTuple):
    """Of n images, as they leave a worker."""

    pixels: Tensor  # (bytes,) uint8, as they lie in the file
    sizes: Tensor  # (n, 2) int64: height, width; 0, 0 of unreadable ones
    checksums: Tensor  # (n,) int64
    shrunk: int  # how many were
    bad: list[tuple[int, str]]  # unreadable ones, counted from the first of the n, and why


class DecodingReader:
    """A range of images of both splits, decoded; the shorter side of larger ones is shrunk to
    ``size`` (0: none is)."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, key: tuple[int, int]) -> Decoded:
        start, stop = key
        parts: list[np.ndarray] = []
        sizes = np.zeros((stop - start, 2), np.int64)
        checksums = np.zeros(stop - start, np.int64)
        count, bad = 0, []
        for slot in range(stop - start):
            source, index = self.images.where(start + slot)
            try:
                image = source.load(index)
            except BadImage as error:
                bad.append((slot, str(error)))
                continue
            small = shrink(image, self.size)
            count += small is not image
            pixels = np.asarray(small)
            sizes[slot] = pixels.shape[:2]
            checksums[slot] = zlib.crc32(pixels.data)
            part = np.zeros(padded(pixels.size), np.uint8)
            part[: pixels.size] = pixels.reshape(-1)
            parts.append(part)
        pixels = np.concatenate(parts) if parts else np.empty(0, np.uint8)
        return Decoded(*map(torch.from_numpy, (pixels, sizes, checksums)), shrunk=count, bad=bad)


def shrink(image: Image.Image, size: int) -> Image.Image:
    """The image, or a smaller one whose shorter side has ``size`` px: bicubic, antialiased, as
    torchvision's ``Resize(size, BICUBIC)``."""
    smaller = shrunk(*image.size, size)
    return image if smaller == image.size else image.resize(smaller, Image.Resampling.BICUBIC)
