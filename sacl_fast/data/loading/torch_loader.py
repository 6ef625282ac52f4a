"""Batches for training and for evaluation: a stream of them (``workers.py``) over a source.

The plan yields whole batches as (epoch, image indices), and every view is drawn from (seed,
epoch, index), so batches do not depend on the number of workers or ranks, nor on the step at which
an epoch is entered. Workers send 8-bit pixels; the device converts and normalises them, which
moves a quarter of the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import Config, ViewsConfig
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.readers import PlainReader, ViewReader, Views
from sacl_fast.data.loading.waiting import Patience, no_stop
from sacl_fast.data.loading.worker_process import Reader
from sacl_fast.data.loading.workers import Stream, open_stream
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError


class Batch(NamedTuple):
    """Two views of each of n images, and which images they are."""

    view_a: Tensor
    """(n, 3, S, S) on the device, normalised; float32, or float16 from DALI where the encoder runs
    in half precision"""
    view_b: Tensor
    index: Tensor
    """(n,) int64 on the CPU: positions in the source"""
    label: Tensor
    """(n,) int64 on the CPU, -1 without labels"""


class ViewLoader:
    """The batches of pre-training, for one rank, by torchvision.

    Rank r gets the r-th slice of every global batch of ``config.batch_size`` images, so that all
    ranks together see what one process would. Worker processes live until ``close``.

    A batch that does not come within ``data.batch_timeout`` is a NoBatch (``waiting.py``), and
    so is the death of a worker. While one is waited for, ``check`` is called, and what it raises
    ends the wait.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        check: Callable[[], None] = no_stop,
    ) -> None:
        _check_batch(len(source), config.batch_size, world_size)
        self.steps_per_epoch = len(source) // config.batch_size
        self._labels = torch.from_numpy(source.labels)
        self._bad = BadImages(source, config.data.max_bad_share)
        self._normalise = Normalise(config.views, device, config.channels_last)
        self._plan = _Plan(config, len(source), rank, world_size)
        self._source, self._config, self._device = source, config, device
        self._check = check
        self._stream: Stream | None = None
        self._waits = Patience()  # for a batch of the stream
        self._next_step = -1  # of the stream, counted from the first step of epoch 0

    @property
    def bad(self) -> dict[int, str]:
        """The unreadable images seen so far: index to reason."""
        return self._bad.reasons

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``start_step`` on; the steps before cost nothing.

        Where one epoch follows the other, the workers prepare the next before it is asked for.
        """
        first = epoch * self.steps_per_epoch
        for step in range(first + start_step, first + self.steps_per_epoch):
            if step != self._next_step:
                self._enter(step)
            batch = self._take(step)
            self._next_step = step + 1
            yield batch

    def _open(self, waits: Patience) -> Stream:
        """What prepares the batches of the plan."""
        return _stream(
            ViewReader(self._source, self._config), self._plan, self._config, self._device, waits
        )

    def _enter(self, step: int) -> None:
        """Begin anew at a step, counted from the first of epoch 0."""
        self._end()
        self._plan.start = step
        self._waits = Patience(self._config.data.batch_timeout, self._check)
        self._stream = self._open(self._waits)

    def _end(self) -> None:
        self._waits.over = True
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _take(self, step: int) -> Batch:
        """The batch of the next step, which is ``step``."""
        assert self._stream is not None
        views: Views = next(self._stream)
        self._bad.add(views.bad)
        self._bad.drew(len(views.index), views.missed)
        return Batch(
            self._normalise(views.a),
            self._normalise(views.b),
            views.index,
            self._labels[views.index],
        )

    def close(self) -> None:
        """End the worker processes; a later ``epoch`` starts new ones."""
        self._next_step = -1
        self._end()


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

    @property
    def bad(self) -> dict[int, str]:
        """The unreadable images seen so far: index to reason."""
        return self._bad.reasons

    def __len__(self) -> int:
        """Batches, those without a readable image included."""
        return len(self._chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self._config
        reader = PlainReader(self._source, config.views.size)
        waits = Patience(config.data.batch_timeout, self._check)
        stream = _stream(reader, self._chunks, config, self._device, waits)
        try:
            for plain in stream:
                self._bad.add(plain.bad)
                if len(plain.index):
                    yield self._normalise(plain.images), self._labels[plain.index]
        finally:
            stream.close()


# --- between them --------------------------------------------------------------------------------


class _Plan:
    """What to load, step after step without end: (epoch, indices (batch / world_size,))."""

    def __init__(self, config: Config, count: int, rank: int, world_size: int) -> None:
        self.seed, self.count = config.seed, count
        self.batch, self.share = config.batch_size, config.batch_size // world_size
        self.offset = rank * self.share
        self.start = 0  # the first step, counted from epoch 0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch, step = divmod(self.start, self.count // self.batch)
        while True:
            order = epoch_order(self.seed, epoch, self.count)
            for begin in range(step * self.batch, self.count - self.batch + 1, self.batch):
                yield epoch, order[begin + self.offset :][: self.share]
            epoch, step = epoch + 1, 0


def _stream(
    reader: Reader, tasks: Iterable[Any], config: Config, device: torch.device, waits: Patience
) -> Stream:
    """Batches decoded and augmented in Python, by ``data.workers`` processes."""
    return open_stream(
        reader,
        tasks,
        workers=worker_count(config.data.workers),
        prefetch=config.data.prefetch,
        pin_memory=device.type == "cuda",
        patience=waits,
        setting="data.workers",
        remedy="fewer data.workers or a smaller data.prefetch take less",
    )


def _check_batch(count: int, batch: int, world_size: int) -> None:
    if batch % world_size:
        works = batch - batch % world_size or world_size
        raise UserError(
            f"batch_size is {batch} over {world_size} processes; a multiple of {world_size} "
            f"works, such as {works}"
        )
    if batch < 2 * world_size:
        raise UserError(
            f"batch_size is {batch} over {world_size} processes; 2 or more images each work "
            f"(batch_size {2 * world_size})"
        )
    if batch > count:
        works = f"at most {count}" if count >= 2 else "2 or more images and batch_size 2"
        raise UserError(
            f"batch_size is {batch}, but there are only {count} training images; {works} works"
        )


def worker_count(given: int) -> int:
    """A number of workers or threads; -1 is the cores of this process shared among the ranks of its
    machine."""
    if given >= 0:
        return given
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Normalise:
    """uint8 (n, S, S, 3) to float32 (n, 3, S, S) on the device: (x / 255 - mean) / std."""

    def __init__(self, views: ViewsConfig, device: torch.device, channels_last: bool) -> None:
        self.device = device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = 255 * torch.tensor(views.mean, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(views.std, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        on_device = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return on_device.to(torch.float32, memory_format=self.format).sub_(self.mean).div_(self.std)
