"""Batches for training and for evaluation: PyTorch's DataLoader over a source.

The sampler yields whole batches as (epoch, image indices), and every view is drawn from (seed,
epoch, index), so batches do not depend on the number of workers or ranks, nor on the step at which
an epoch is entered. Workers send 8-bit pixels; the device converts and normalises them, which
moves a quarter of the bytes.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sacl_fast.config import Config, ViewsConfig
from sacl_fast.data.augment import epoch_order
from sacl_fast.data.readers import PlainReader, ViewReader, Views
from sacl_fast.data.sources import Source
from sacl_fast.errors import UserError

_T = TypeVar("_T")
logger = logging.getLogger(__name__)


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
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_batch(len(source), config.batch_size, world_size)
        self.steps_per_epoch = len(source) // config.batch_size
        self._labels = torch.from_numpy(source.labels)
        self._bad = _BadImages(source, config.data.max_bad_share)
        self._normalise = Normalise(config.views, device, config.channels_last)
        self._plan = _Plan(config, len(source), rank, world_size)
        self._loader = self._make_loader(source, config, device)
        self._stream: Iterator[Any] = iter(())
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

    def _make_loader(self, source: Source, config: Config, device: torch.device) -> DataLoader:
        """What prepares batches; its workers live until ``close``."""
        return data_loader(
            ViewReader(source, config),
            self._plan,
            workers=worker_count(config.data.workers),
            prefetch=config.data.prefetch,
            pin_memory=device.type == "cuda",
        )

    def _enter(self, step: int) -> None:
        """Begin anew at a step, counted from the first of epoch 0."""
        self._plan.start = step
        self._stream = iter(self._loader)

    def _take(self, step: int) -> Batch:
        """The batch of the next step, which is ``step``."""
        views: Views = next_of(self._stream)
        self._bad.add(views.bad)
        return Batch(
            self._normalise(views.a),
            self._normalise(views.b),
            views.index,
            self._labels[views.index],
        )

    def close(self) -> None:
        """End the worker processes; a later ``epoch`` starts new ones."""
        iterator, self._stream, self._next_step = self._loader._iterator, iter(()), -1
        self._loader._iterator = None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            _end_workers(iterator)  # now, whoever else still refers to it


class EvalLoader:
    """The images ``indices`` of a source as a network is evaluated on them, in order.

    Up to 64 px: resized to ``views.size``. Above: the shorter side to size * 256 / 224, then the
    central square. Yields (images (n, 3, S, S) float32 on the device, labels (n,) int64 on the
    CPU) of up to ``eval.batch_size`` images; unreadable ones are left out.
    """

    def __init__(
        self, source: Source, indices: np.ndarray, config: Config, device: torch.device
    ) -> None:
        size = config.eval.batch_size
        self._labels = torch.from_numpy(source.labels)
        self._bad = _BadImages(source, config.data.max_bad_share, count=len(indices))
        self._normalise = Normalise(config.views, device, config.channels_last)
        self._chunks = [np.asarray(indices[i : i + size]) for i in range(0, len(indices), size)]
        self._loader = data_loader(
            PlainReader(source, config.views.size),
            self._chunks,
            workers=worker_count(config.data.workers),
            prefetch=config.data.prefetch,
            pin_memory=device.type == "cuda",
            persistent=False,
        )

    @property
    def bad(self) -> dict[int, str]:
        """The unreadable images seen so far: index to reason."""
        return self._bad.reasons

    def __len__(self) -> int:
        """Batches, those without a readable image included."""
        return len(self._chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        stream = iter(self._loader)
        for _ in self._chunks:
            plain = next_of(stream)
            self._bad.add(plain.bad)
            if len(plain.index):
                yield self._normalise(plain.images), self._labels[plain.index]


# --- between them --------------------------------------------------------------------------------


class _Plan(Sampler[tuple[int, np.ndarray]]):
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


def data_loader(
    reader: Dataset,
    batches: Iterable,
    *,
    workers: int,
    prefetch: int,
    pin_memory: bool,
    persistent: bool = True,
) -> DataLoader:
    """PyTorch's loader over a reader that maps each element of ``batches`` to a whole batch."""
    return DataLoader(
        reader,
        sampler=batches,
        batch_size=None,  # the sampler yields batches, and the reader reads them whole
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the default would draw from the global stream
        collate_fn=_as_is,
    )


def _as_is(batch):
    return batch


def _start_worker(worker: int) -> None:
    gc.freeze()  # what was the parent's must not be collected here: DALI's pipelines abort then
    _leave_signals_to_parent()


def _leave_signals_to_parent() -> None:
    """What is sent to all processes of a run is for the main one, which ends its workers when it is
    done: after Ctrl-C without a traceback each, after SIGTERM with a checkpoint written."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_termination, daemon=True).start()


def _await_termination() -> None:
    """End the process at a SIGTERM of its parent, which else would wait for it for ever."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def worker_count(given: int) -> int:
    """A number of workers or threads; -1 is the cores of this process shared among the ranks of its
    machine."""
    if given >= 0:
        return given
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _end_workers(iterator: _MultiProcessingDataLoaderIter) -> None:
    try:
        iterator._shutdown_workers()
    except RuntimeError as error:
        # torch's signal handler tells of a worker that was killed, wherever the process then is.
        if _DIED not in str(error):
            raise
        for worker in iterator._workers:
            worker.terminate()
            worker.join()


_DIED = "DataLoader worker (pid"


def next_of(stream: Iterator[_T]) -> _T:
    """The next batch of a ``data_loader``; clear words where a worker died."""
    try:
        return next(stream)
    except (RuntimeError, ConnectionError, EOFError) as error:
        # All but the first of these: it died while it handed over a batch.
        signs = (_DIED, "ancdata")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise RuntimeError(
            f"a worker process that loads images died: {reason}. It may have run out of memory: "
            "fewer data.workers or a smaller data.prefetch take less"
        ) from error


class _BadImages:
    """Counts unreadable images, names each once, and fails where they are too many."""

    def __init__(self, source: Source, max_share: float, count: int | None = None) -> None:
        self.source, self.count = source, len(source) if count is None else count
        self.max_share, self.most = max_share, max_share * self.count
        self.reasons: dict[int, str] = {}

    def add(self, found: list[tuple[int, str]]) -> None:
        for index, reason in found:
            if index in self.reasons:
                continue
            self.reasons[index] = reason
            name, nth = self.source.name(index), len(self.reasons)
            logger.warning(
                "skipped unreadable image %s: %s (%d of %d)", name, reason, nth, self.count
            )
        bad = len(self.reasons)
        if found and (bad > self.most or bad == self.count):
            names = [f"{self.source.name(i)} ({why})" for i, why in list(self.reasons.items())[:3]]
            raise UserError(
                f"at least {bad} of {self.count} images are unreadable, which is too many "
                f"(data.max_bad_share is {self.max_share:g}): {', '.join(names)}"
                f"{', ...' if bad > len(names) else ''}"
            )


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
