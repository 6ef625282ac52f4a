"""What worker processes do: from the images of a source to batches of 8-bit pixels.

A reader maps a whole batch of indices at once; the loader's plan makes the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sacl_fast.config import Config
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.source import Source
from sacl_fast.data.views.draw import ViewDraw, apply_view, draw_view, sample_rng
from sacl_fast.data.views.operator import compiled_pixels

_T = TypeVar("_T")


class Views(NamedTuple):
    """A batch as it leaves a worker."""

    a: Tensor  # (n, S, S, 3) uint8
    b: Tensor
    index: Tensor  # (n,) int64
    bad: list[tuple[int, str]]  # unreadable images met, and why
    missed: int = 0  # images that others stand for


class ViewReader:
    """(epoch, indices) to the views of those images.

    For an unreadable image the next readable one is taken, cyclically.
    """

    def __init__(self, source: Source, config: Config) -> None:
        self.source, self.views, self.seed = source, config.views, config.seed
        self.patience = int(config.data.max_bad_share * len(source))

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Views:
        epoch, wanted = key
        views, side = self.views, self.views.size
        pixels = np.empty((2, len(wanted), side, side, 3), np.uint8)
        index, bad = wanted.copy(), {}
        for slot, i in enumerate(wanted.tolist()):
            image, index[slot] = first_readable(
                self.source.load, i, len(self.source), self.patience, bad
            )
            if image is None:  # more are bad than may be: the loader will say so
                return Views(torch.empty(0), torch.empty(0), torch.empty(0), list(bad.items()))
            a, b = (
                draw_view(view, sample_rng(self.seed, epoch, i, which), *image.size)
                for which, view in enumerate((views.a, views.b))
            )
            pixels[:, slot] = self.make(image, (a, b))
        a, b = torch.from_numpy(pixels)
        missed = int((index != wanted).sum())
        return Views(a, b, torch.from_numpy(index), list(bad.items()), missed)

    def make(self, image: Image.Image, draws: Sequence[ViewDraw]) -> np.ndarray:
        """Both views of an image, or, of one draw, view a: (V, S, S, 3) uint8, by torchvision."""
        both = zip(draws, (self.views.a, self.views.b), strict=False)
        return np.stack([np.asarray(apply_view(image, d, self.views, view)) for d, view in both])


class CompiledViewReader(ViewReader):
    """A ``ViewReader`` whose views are made by the compiled operator, several times as fast."""

    def make(self, image: Image.Image, draws: Sequence[ViewDraw]) -> np.ndarray:
        return compiled_pixels(image, draws, self.views)


def first_readable(
    load: Callable[[int], _T], wanted: int, count: int, patience: int, bad: dict[int, str]
) -> tuple[_T | None, int]:
    """What ``load`` gives for the first readable image from ``wanted`` on, cyclically among
    ``count``, and its index. The others go to ``bad``; None where they are more than ``patience``.
    """
    for offset in range(patience + 1):
        index = (wanted + offset) % count
        try:
            return load(index), index
        except BadImage as error:
            bad[index] = str(error)
    return None, wanted


class Plain(NamedTuple):
    """A batch without augmentation as it leaves a worker."""

    images: Tensor  # (n, S, S, 3) uint8
    index: Tensor  # (n,) int64
    bad: list[tuple[int, str]]


class PlainReader:
    """Indices to those of the images that can be read."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, key: np.ndarray) -> Plain:
        pixels = np.empty((len(key), self.size, self.size, 3), np.uint8)
        good, bad = [], []
        for index in key.tolist():
            try:
                image = self.source.load(index)
            except BadImage as error:
                bad.append((index, str(error)))
                continue
            pixels[len(good)] = np.asarray(plain_view(image, self.size))
            good.append(index)
        return Plain(torch.from_numpy(pixels[: len(good)]), torch.tensor(good).long(), bad)


def plain_view(image: Image.Image, size: int) -> Image.Image:
    """The image as a network is evaluated on it (see ``EvalLoader``)."""
    width, height = image.size
    if size <= 64:
        resize = image.size != (size, size)
        return image.resize((size, size), Image.Resampling.BICUBIC) if resize else image
    # Resizing the part that is kept equals resizing all and cropping, and does not blow up a
    # panorama.
    short = round(size * 256 / 224)
    wide, high = (
        (short, short * height // width) if width < height else (short * width // height, short)
    )
    left, top = round((wide - size) / 2), round((high - size) / 2)
    x, y = width / wide, height / high
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
