"""The loader of pre-training: batches of two views, epoch after epoch.

A ``Stream`` makes the views: torchvision in worker processes (``torchvision_stream.py``), or DALI
(``dali_stream.py``). Both follow the same ``Plan``, so a batch holds the same images with the same
draws, whichever makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Batch, Plan


class NormalisedViews(NamedTuple):
    """What a stream gives: a ``Batch`` without its labels."""

    a: Tensor
    """(n, 3, S, S) on the device"""
    b: Tensor
    index: Tensor
    """(n,) int64 on the CPU"""
    missed: int
    """images that others stand for"""


class Stream(Protocol):
    """The batches of a ``Plan``, one step after the other.

    Unreadable images are added to the loader's ``BadImages`` as soon as they are met, which may be
    batches before the one that they are missing from.
    """

    def enter(self, step: int) -> None:
        """Begin anew at ``step``, counted from the first of epoch 0."""
        ...

    def take(self, step: int) -> NormalisedViews:
        """The batch of ``step``, which is the one entered at or follows the last one taken.

        NoBatch (``waiting.py``) where it does not come within ``data.batch_timeout``, or a worker
        died; or what ends the wait.
        """
        ...

    def close(self) -> None:
        """End what works in the background; ``enter`` starts it again."""
        ...


class ViewLoader:
    """The batches of pre-training, for one rank.

    Rank r gets the r-th slice of every global batch of ``config.batch_size`` images, so that all
    ranks together see what one process would. Worker processes live until ``close``.
    """

    def __init__(self, source: Source, plan: Plan, bad: BadImages, stream: Stream) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self._labels = torch.from_numpy(source.labels)
        self._bad, self._stream = bad, stream
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
                self._stream.enter(step)
            views = self._stream.take(step)
            self._bad.drew(len(views.index), views.missed)
            self._next_step = step + 1
            yield Batch(views.a, views.b, views.index, self._labels[views.index])

    def close(self) -> None:
        """End the worker processes; a later ``epoch`` starts new ones."""
        self._next_step = -1
        self._stream.close()
