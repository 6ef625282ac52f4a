"""Batches read ahead by worker processes, or in this process, in order.

PyTorch's ``DataLoader`` is not used. It hands batches over through /dev/shm. Its workers share one
pipe, so a worker that is killed can leave the main process waiting for the rest of a message. And
it reports a dead worker by an exception out of a signal handler, wherever the process then is.
Here each worker has a socket of its own, which shows when the worker ends, and every wait is one
of ``waiting.py``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import torch

from sacl_fast.config import Config
from sacl_fast.data.loading.handover import receive_batch, send_task
from sacl_fast.data.loading.waiting import Background, NoBatch, Patience
from sacl_fast.data.loading.worker_process import FOR_THE_PARENT, Failure, Reader, work
from sacl_fast.errors import UserError, reason_of
from sacl_fast.machine import usable_cores

_END_WITHIN = 2.0  # seconds that workers have to end


class Prefetcher(Protocol):
    """Batches of tensors (named tuples), one for each task, in the order of the tasks."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any:
        """NoBatch where none can be had, what the reader raises, or what ends the wait."""
        ...

    def close(self) -> None:
        """End it, and whoever waits for it in another thread."""
        ...


def open_prefetcher(
    reader: Reader,
    tasks: Iterable[Any],
    *,
    workers: int,
    prefetch: int,
    pin_memory: bool,
    patience: Patience,
    setting: str,
    remedy: str,
) -> Prefetcher:
    """``reader[task]`` for each task. ``workers`` processes prepare ``prefetch`` batches each; with
    0, this process reads a batch when it is asked for. Errors name ``setting``, the option that
    says how many workers there are, and ``remedy``, what takes less memory."""
    if workers == 0:
        return _Here(reader, tasks, pin_memory, patience)
    batches = _ByWorkers(reader, tasks, workers, prefetch, patience, setting, remedy)
    return _PinnedAhead(batches, patience) if pin_memory else batches


def by_data_workers(
    reader: Reader, tasks: Iterable[Any], config: Config, device: torch.device, patience: Patience
) -> Prefetcher:
    """``reader[task]`` for each task, by ``data.workers`` processes."""
    return open_prefetcher(
        reader,
        tasks,
        workers=worker_count(config.data.workers),
        prefetch=config.data.prefetch,
        pin_memory=device.type == "cuda",
        patience=patience,
        setting="data.workers",
        remedy="fewer data.workers or a smaller data.prefetch take less",
    )


def worker_count(given: int) -> int:
    """A number of workers or threads; -1 is the cores of this process shared among the ranks of its
    machine."""
    if given >= 0:
        return given
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Here:
    """Batches read when they are asked for, in a thread: it may wait for a disk for ever."""

    def __init__(
        self, reader: Reader, tasks: Iterable[Any], pin_memory: bool, patience: Patience
    ) -> None:
        self._reader, self._tasks, self._pin_memory = reader, iter(tasks), pin_memory
        self._patience = patience

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        task = next(self._tasks)
        return Background(lambda: self._read(task)).result(self._patience)

    def _read(self, task: Any) -> Any:
        batch = self._reader[task]
        return _pinned(batch) if self._pin_memory else batch

    def close(self) -> None:
        self._patience.over = True


class _PinnedAhead:
    """Batches in pinned memory, one of them copied there ahead, by a thread."""

    def __init__(self, batches: _ByWorkers, patience: Patience) -> None:
        self._batches, self._patience = batches, patience
        self._ahead = Background(self._take)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = self._ahead.value()  # the wait in it ends, as all do
        if batch is None:
            raise StopIteration
        self._ahead = Background(self._take)
        return batch

    def _take(self) -> Any | None:
        batch = next(self._batches, None)
        return batch if batch is None else _pinned(batch)

    def close(self) -> None:
        self._patience.over = True
        self._ahead.wait()
        self._batches.close()


def _pinned(batch: Any) -> Any:
    return type(batch)(*(x.pin_memory() if isinstance(x, torch.Tensor) else x for x in batch))


class _Worker(NamedTuple):
    process: BaseProcess
    channel: socket.socket


class _ByWorkers:
    """Batches by worker processes, which take turns."""

    def __init__(
        self,
        reader: Reader,
        tasks: Iterable[Any],
        workers: int,
        prefetch: int,
        patience: Patience,
        setting: str,
        remedy: str,
    ) -> None:
        self._tasks, self._patience, self._remedy = iter(tasks), patience, remedy
        self._workers: list[_Worker] = []
        self._due: deque[_Worker] = deque()  # who has the next batches, in their order
        # Also where nobody closes it: at its own end, or at the process's.
        self._end = weakref.finalize(self, _end, self._workers, os.getpid())
        try:
            for _ in range(workers):
                self._workers.append(_start(reader, [worker.channel for worker in self._workers]))
        except OSError as error:
            self.close()
            raise UserError(
                f"cannot start worker processes ({setting} is {workers}): {reason_of(error)}; "
                f"{setting} 0 works, and so may fewer"
            ) from error
        for _ in range(prefetch):
            for worker in self._workers:
                self._assign(worker)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._due:
            raise StopIteration
        worker = self._due[0]
        batch = self._receive(worker)
        self._due.popleft()
        if isinstance(batch, Failure):
            if isinstance(batch.error, MemoryError):
                told = f"a worker process that loads images ran out of memory: {self._remedy}"
                raise NoBatch(told) from batch.error
            raise batch.error
        self._assign(worker)
        return batch

    def _assign(self, worker: _Worker) -> None:
        for task in self._tasks:
            with contextlib.suppress(ConnectionError):  # if it has died: told when its batch is due
                send_task(worker.channel, task, self._patience)
            self._due.append(worker)
            return

    def _receive(self, worker: _Worker) -> Any:
        for seconds in self._patience.slices():
            ready = wait([worker.channel, worker.process.sentinel], seconds)
            if worker.channel in ready:
                try:
                    return receive_batch(worker.channel)
                except (EOFError, ConnectionError):
                    raise self._died(worker) from None
                except OSError as error:
                    raise NoBatch(
                        f"cannot take a batch from a worker process: {reason_of(error)}; "
                        f"{self._remedy}"
                    ) from error
            if ready:
                raise self._died(worker)
        raise AssertionError("slices have no end")

    def _died(self, worker: _Worker) -> NoBatch:
        worker.process.join(1)
        code = worker.process.exitcode
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = "ended" if code is None else f"ended with status {code}"
        return NoBatch(
            f"a worker process that loads images {how}; it may have run out of memory: "
            f"{self._remedy}"
        )

    def close(self) -> None:
        self._patience.over = True
        self._due.clear()
        self._end()


def _end(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a worker inherits what its parent has, other workers included
        return
    for worker in workers:
        worker.channel.close()
        worker.process.terminate()
    deadline = time.monotonic() + _END_WITHIN
    for worker in workers:
        worker.process.join(max(0, deadline - time.monotonic()))
        if worker.process.is_alive():  # stopped, or within a call that does not return
            worker.process.kill()
            worker.process.join(1)


def _start(reader: Reader, others: list[socket.socket]) -> _Worker:
    """``others``: this process's ends of channels to other workers."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = multiprocessing.get_context("fork").Process(
            target=work, args=(reader, theirs, os.getpid(), [*others, ours]), daemon=True
        )
        # Until the worker has its own ways with them, signals wait for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)
        try:
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Worker(process, ours)
