"""Images as a network is evaluated on them, batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import Config
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Normalise
from sacl_fast.data.loading.readers import CompiledViewReader, PlainReader, ViewReader
from sacl_fast.data.loading.waiting import Patience, no_stop
from sacl_fast.data.loading.workers import by_data_workers
from sacl_fast.data.views.operator import are_compiled

_T = TypeVar("_T")
_CPU = torch.device("cpu")


class EvalLoader:
    """The images ``indices`` of a source as a network is evaluated on them, in order.

    Up to 64 px: resized to ``views.size``. Above: the shorter side to size * 256 / 224, then the
    central square. Yields (images (n, 3, S, S) float32 on the device, labels (n,) int64 on the
    CPU) of up to ``eval.batch_size`` images; unreadable ones are left out. Batches that do not come
    are as with ``ViewLoader``.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        config: Config,
        device: torch.device,
        *,
        check: Callable[[], None] = no_stop,
    ) -> None:
        size = config.eval.batch_size
        self._labels = torch.from_numpy(source.labels)
        self._bad = BadImages(source, config.data.max_bad_share, sample=len(indices))
        self._normalise = Normalise(config.views, device, config.channels_last)
        self._chunks = [np.asarray(indices[i : i + size]) for i in range(0, len(indices), size)]
        self._source, self._config, self._device = source, config, device
        self._check = check

    def share(self, rank: int, world_size: int) -> EvalLoader:
        """The same for one of several ranks: of the batches, in order, as many as for the others or
        one more. All ranks' batches, in rank order, are these."""
        shared = copy(self)
        shared._chunks = _share(self._chunks, rank, world_size)
        return shared

    @property
    def bad(self) -> dict[int, str]:
        """The unreadable images seen so far: index to reason."""
        return self._bad.reasons

    def __len__(self) -> int:
        """Batches, those without a readable image included."""
        return len(self._chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, index in self.indexed():
            yield images, self._labels[index]

    def indexed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each batch, and their positions (n,) int64 in the source."""
        config = self._config
        reader = PlainReader(self._source, config.views.size)
        waits = Patience(config.data.batch_timeout, self._check)
        batches = by_data_workers(reader, self._chunks, config, self._device, waits)
        try:
            for plain in batches:
                self._bad.add(plain.bad)
                if len(plain.index):
                    yield self._normalise(plain.images), plain.index
        finally:
            batches.close()


class ReadableImages:
    """Tells which images of a source can be read, by reading them.

    Args:
        count: images that those asked about are drawn from.
    """

    def __init__(self, source: Source, count: int, config: Config, device: torch.device) -> None:
        self._bad = BadImages(source, config.data.max_bad_share, sample=count)
        self._source, self._config, self._device = source, config, device

    def unreadable(self, indices: np.ndarray) -> set[int]:
        """Those of ``indices`` (n,) that cannot be read.

        Raises:
            UserError: they are too many.
        """
        config, size = self._config, self._config.eval.batch_size
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
        reader = PlainReader(self._source, config.views.size)
        waits, found = Patience(config.data.batch_timeout), set()
        batches = by_data_workers(reader, chunks, config, self._device, waits)
        try:
            for chunk, plain in zip(chunks, batches, strict=True):
                self._bad.add(plain.bad)
                self._bad.drew(len(chunk), len(plain.bad))
                found |= {index for index, _ in plain.bad}
        finally:
            batches.close()
        return found


class AugmentedLoader:
    """Random views of the images ``indices`` of a source, the same ones each time: those of the
    first ``epochs`` epochs of training, view a and view b of each.

    Yields (views (m, 3, S, S) as an ``EvalLoader``'s images, positions (m,) int64 in ``indices``),
    in the order of ``indices`` but for a batch; each image is there 2 * ``epochs`` times. For an
    unreadable image the next readable one stands.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        config: Config,
        device: torch.device,
        *,
        epochs: int,
        check: Callable[[], None] = no_stop,
    ) -> None:
        self.count, self.views = len(indices), 2 * epochs
        size = max(1, config.eval.batch_size // 2)
        self._indices, positions = np.asarray(indices), np.arange(len(indices))
        chunks = [positions[i : i + size] for i in range(0, len(positions), size)]
        self._tasks = [(epoch, chunk) for chunk in chunks for epoch in range(epochs)]
        self._bad = BadImages(source, config.data.max_bad_share)
        self._normalise = Normalise(config.views, device, config.channels_last)
        self._source, self._config, self._device = source, config, device
        self._check = check

    def share(self, rank: int, world_size: int) -> AugmentedLoader:
        """The same for one of several ranks, as ``EvalLoader.share``."""
        shared = copy(self)
        shared._tasks = _share(self._tasks, rank, world_size)
        return shared

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self._config
        kind = CompiledViewReader if are_compiled(config, _CPU) else ViewReader
        waits = Patience(config.data.batch_timeout, self._check)
        tasks = [(epoch, self._indices[chunk]) for epoch, chunk in self._tasks]
        batches = by_data_workers(kind(self._source, config), tasks, config, self._device, waits)
        try:
            for (_, chunk), views in zip(self._tasks, batches, strict=True):
                self._bad.add(views.bad)
                yield (
                    self._normalise(torch.cat([views.a, views.b])),
                    torch.from_numpy(chunk).tile(2),
                )
        finally:
            batches.close()


def _share(batches: list[_T], rank: int, world_size: int) -> list[_T]:
    count = len(batches)
    return batches[count * rank // world_size : count * (rank + 1) // world_size]
