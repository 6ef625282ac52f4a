"""What DALI is fed: encoded images, and everything random about their views.

The draws are those of ``data/views/draw.py``, in the form that the maker of the views takes: DALI
(``data/views/dali_parameters.py``) or the compiled operator (``data/views/draws.py``).

Images that DALI and Pillow decode alike are handed on as they are. All others (CMYK, 16 bits,
transparency, GIF, WebP, ...) are decoded by Pillow and handed on as PPM, so that no image works
with one loader only. Broken files are found here too, by a check of header and end that costs
nothing while the bytes are at hand; a pass over all files before the first step would cost
minutes on a network disk.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import Config, ViewsConfig
from sacl_fast.data.images.decode import decode_rgb, plain_size, to_ppm
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.readers import first_readable

_PNG = b"\x89PNG\r\n\x1a\n"

# Of the views, a seed, an epoch, images (n,) and their heights and widths (n, 2): the draws of both
# views.
Draw = Callable[[ViewsConfig, int, int, np.ndarray, np.ndarray], Any]


class Feed(NamedTuple):
    """A batch as it leaves a worker."""

    images: Tensor
    """(bytes,) uint8: the images end to end, encoded or as pixels"""
    ends: Tensor
    """(n,) int64: where each of them ends"""
    sizes: Tensor
    """(n, 2) int64: height and width of images that are pixels; empty where they are encoded"""
    draws: Any
    """of both views"""
    index: Tensor
    """(n,) int64"""
    bad: list[tuple[int, str]]
    """unreadable images met, and why"""
    missed: int = 0
    """images that others stand for"""

    def arrays(self) -> list[np.ndarray]:
        """The images as DALI takes them: (bytes,) uint8 each, or (H, W, 3)."""
        images = np.split(self.images.numpy(), self.ends.numpy()[:-1])
        if not len(self.sizes):
            return images
        sizes = self.sizes.tolist()
        return [image.reshape(*size, 3) for image, size in zip(images, sizes, strict=True)]


class FeedReader:
    """(epoch, indices) to what DALI makes the views of those images from.

    For an unreadable image the next readable one is taken, cyclically. ``by_pillow`` holds the
    images that DALI failed to decode.
    """

    def __init__(self, source: Source, config: Config, draw: Draw) -> None:
        self.source, self.views, self.seed = source, config.views, config.seed
        self.draw = draw
        self.patience = int(config.data.max_bad_share * len(source))
        self.by_pillow: set[int] = set()

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Feed:
        epoch, wanted = key
        images, sizes, index, bad = [], [], wanted.copy(), {}
        for slot, i in enumerate(wanted.tolist()):
            found, index[slot] = first_readable(self._load, i, len(self.source), self.patience, bad)
            if found is None:  # more are bad than may be: the loader will say so
                nothing = torch.empty(0)
                return Feed(nothing, nothing, nothing, None, nothing, list(bad.items()))
            images.append(found[0])
            sizes.append(found[1])
        draws = self.draw(self.views, self.seed, epoch, wanted, np.array(sizes))
        blob = np.concatenate([image.reshape(-1) for image in images])
        ends = np.cumsum([image.size for image in images])
        pixels = np.array([image.shape[:2] for image in images if image.ndim == 3], np.int64)
        missed = int((index != wanted).sum())
        blob, ends, pixels, index = map(torch.from_numpy, (blob, ends, pixels, index))
        return Feed(blob, ends, pixels, draws, index, list(bad.items()), missed)

    def _load(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """An image for DALI, its height and its width. BadImage where it cannot be read."""
        data = self.source.read(index)
        if isinstance(data, np.ndarray):
            height, width, _ = data.shape
            return data, (height, width)
        size = None if index in self.by_pillow else plain_size(data)
        if size is None or not intact(data):
            image = decode_rgb(data)
            data, size = to_ppm(image), image.size
        width, height = size
        return np.frombuffer(data, np.uint8), (height, width)


def intact(data: bytes) -> bool:
    """Whether the check sums of a PNG are right; True for any other format.

    DALI refuses a PNG where they are not, and all batches that it works on have to be begun anew.
    To check them costs a hundredth of decoding.
    """
    if not data.startswith(_PNG):
        return True
    view, start = memoryview(data), len(_PNG)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4])
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return False
        if view[start + 4 : start + 8] == b"IEND":
            return True
        start = end + 4
    return False
