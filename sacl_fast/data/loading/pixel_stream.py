"""Views of images that are pixels already (a cache, CIFAR): no worker processes and no decoder, but
the compiled operator and a thread that works ahead.

Plan, draws and substitutes for unreadable images are those of the other streams, so batches are the
same, bit for bit, as those of ``pillow`` or of DALI with the compiled operator.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import Config, ViewsConfig
from sacl_fast.data.images.source import Packed, Source, as_packed
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Normalise, Plan
from sacl_fast.data.loading.readers import Views, first_readable
from sacl_fast.data.loading.residence import (
    Pixels,
    choose,
    free_memory,
    is_mapped,
    pixel_bytes,
    processes_here,
)
from sacl_fast.data.loading.torchvision_stream import input_dtype
from sacl_fast.data.loading.view_loader import NormalisedViews
from sacl_fast.data.loading.waiting import Patience, no_stop
from sacl_fast.data.loading.workers import Prefetcher, open_prefetcher, worker_count
from sacl_fast.data.views.ahead import Ahead
from sacl_fast.data.views.draws import draw_rows
from sacl_fast.data.views.operator import are_compiled
from sacl_fast.data.views.packed import PackedViews

logger = logging.getLogger(__name__)

_AHEAD_BYTES = 2**30  # that views prepared ahead may take; one batch always is
_TOLD = 2  # batches of which a disk is told before they are read

_CPU = torch.device("cpu")


class Drawn(NamedTuple):
    """What the views of a batch are made of."""

    pixels: Tensor
    """(bytes,) uint8"""
    images: Tensor
    """(n, 3) int64: offset in ``pixels``, height, width"""
    draws: Tensor
    """(2, n, 16) float64"""
    index: Tensor
    """(n,) int64"""
    bad: list[tuple[int, str]]
    """unreadable images met, and why"""
    missed: int = 0
    """images that others stand for"""


class PixelReader:
    """(epoch, indices) to what the views of those images are made of.

    For an unreadable image the next readable one is taken, cyclically.
    """

    def __init__(self, pixels: Pixels, config: Config) -> None:
        self._pixels, self._views, self._seed = pixels, config.views, config.seed
        self._count = len(pixels.placement)
        self._patience = int(config.data.max_bad_share * self._count)

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Drawn:
        epoch, wanted = key
        index, bad = wanted, {}
        if not self._pixels.are_readable(wanted):
            index = wanted.copy()
            for slot, i in enumerate(wanted.tolist()):
                found, index[slot] = first_readable(
                    self._pixels.readable, i, self._count, self._patience, bad
                )
                if found is None:  # more are bad than may be: the loader will say so
                    nothing = torch.empty(0)
                    return Drawn(nothing, nothing, nothing, nothing, list(bad.items()))
        sizes = self._pixels.placement[index, 1:]
        draws = draw_rows(self._views, self._seed, epoch, wanted, sizes)
        made_of = self._pixels.batch(index, draws)
        missed = int((index != wanted).sum())
        return Drawn(*made_of, torch.from_numpy(index.copy()), list(bad.items()), missed)


class PixelStream:
    """A ``Stream`` (``view_loader.py``) of a packed source. While a batch is waited for, ``check``
    is called, and what it raises ends the wait.

    On a GPU that the operator is not built for, the CPU makes the views, and the device normalises
    them.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        plan: Plan,
        bad: BadImages,
        *,
        device: torch.device,
        check: Callable[[], None] = no_stop,
    ) -> None:
        packed = as_packed(source)
        assert packed is not None, "its images are no pixels"
        self._config, self._plan, self._bad, self._check = config, plan, bad, check
        on_device = are_compiled(config, device)
        made_on = device if on_device else _CPU
        self._pixels = open_pixels(packed, config, device, on_device=on_device)
        self._reader = PixelReader(self._pixels, config)
        dtype = input_dtype(config, device)
        self._normalise = (
            None if on_device else Normalise(config.views, device, config.channels_last, dtype)
        )
        self._views = PackedViews(
            config.views if on_device else _plain(config.views),
            made_on,
            dtype if on_device else torch.float32,
            threads=max(1, worker_count(config.data.workers)),
        )
        self._device, self._made_on = device, made_on
        self._ahead_count = batches_ahead(config, plan.share, dtype)
        self._waits = Patience()  # for what a batch is made of
        self._drawn: Prefetcher | None = None
        self._ahead: Ahead | None = None
        self._made: deque[Drawn] = deque()  # what the batches ahead are made of, oldest first

    def enter(self, step: int) -> None:
        self.close()
        self._waits = Patience(self._config.data.batch_timeout, self._check)
        self._drawn = open_prefetcher(
            self._reader,
            announced(self._plan.tasks(step), self._pixels.expect),
            workers=0,
            prefetch=1,
            pin_memory=False,
            patience=self._waits,
            setting="data.workers",
            remedy="a smaller data.prefetch takes less",
        )
        self._ahead = Ahead(self._make, ahead=self._ahead_count, device=self._made_on)

    def take(self, step: int) -> NormalisedViews:
        assert self._ahead is not None
        a, b = self._ahead.take()
        made = self._made.popleft()
        if self._normalise is not None:
            a, b = self._normalise(a), self._normalise(b)
        elif not self._config.channels_last:
            a, b = a.contiguous(), b.contiguous()
        return NormalisedViews(a, b, made.index, made.missed)

    def close(self) -> None:
        self._waits.over = True  # the thread may be waiting
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._made.clear()
        if self._drawn is not None:
            self._drawn.close()
            self._drawn = None

    def _make(self) -> Tensor:
        assert self._drawn is not None
        drawn: Drawn = next(self._drawn)
        self._bad.add(drawn.bad)
        self._made.append(drawn)
        views = self._views(drawn.pixels, drawn.images, drawn.draws)
        if self._normalise is None:
            return views
        pixels = _eight_bits(views)
        return pixels.pin_memory() if self._device.type == "cuda" else pixels


def open_pixels(
    source: Packed, config: Config, device: torch.device, *, on_device: bool = True
) -> Pixels:
    """The pixels of ``source`` where ``data.residence`` says, for views that are made on
    ``device``, or else on the CPU."""
    size = pixel_bytes(source.placement)
    choice = choose(
        config.data.residence,
        size,
        mapped=is_mapped(source.pixels),
        device=device,
        on_device=on_device,
        free=free_memory(device),
        processes=processes_here(),
    )
    logger.info("pixels: %s (%s)", choice.residence, choice.reason)
    return Pixels(source, choice.residence, device if on_device else _CPU)


def announced(
    tasks: Iterable[tuple[int, np.ndarray]], tell: Callable[[np.ndarray], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """``tasks``, of each of which ``tell`` is told the images, ``_TOLD`` tasks before."""
    ahead: deque[tuple[int, np.ndarray]] = deque()
    for task in tasks:
        tell(task[1])
        ahead.append(task)
        if len(ahead) > _TOLD:
            yield ahead.popleft()
    yield from ahead


def batches_ahead(config: Config, share: int, dtype: torch.dtype) -> int:
    """``data.prefetch``, or fewer batches of ``share`` images, where both views of those would take
    more than a GiB."""
    batch_bytes = 2 * share * 3 * config.views.size**2 * dtype.itemsize
    return max(1, min(config.data.prefetch, _AHEAD_BYTES // batch_bytes))


def pixel_views(source: Packed, config: Config, epoch: int, indices: np.ndarray) -> Views:
    """Both views of some images as ``ViewReader`` gives them, by the compiled operator."""
    where = "disk" if is_mapped(source.pixels) else "ram"
    drawn = PixelReader(Pixels(source, where, _CPU), config)[epoch, indices]
    if not len(drawn.index):
        return Views(torch.empty(0), torch.empty(0), drawn.index, drawn.bad)
    views = PackedViews(_plain(config.views), _CPU)
    a, b = _eight_bits(views(drawn.pixels, drawn.images, drawn.draws))
    return Views(a, b, drawn.index, drawn.bad, drawn.missed)


def _plain(views: ViewsConfig) -> ViewsConfig:
    """The same, whose values are those of the pixels."""
    return replace(views, mean=(0, 0, 0), std=(1 / 255,) * 3)


def _eight_bits(views: Tensor) -> Tensor:
    """(2, n, 3, S, S) of ``_plain`` to (2, n, S, S, 3) uint8."""
    return views.permute(0, 1, 3, 4, 2).round().to(torch.uint8)
