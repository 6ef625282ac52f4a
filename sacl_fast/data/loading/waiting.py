"""Waits that end: for a batch, however the images, the disk or another process behave.

Python runs a signal's handler between two instructions of the main thread, and ours only sets a
flag. So nobody here waits without a bound: a wait is cut into slices, and after each slice three
things are checked: whether the run is to stop, whether the wait has taken too long, and whether
anyone still wants the batch. Work that cannot be cut (a read from a disk that does not answer) is
done by a thread that nobody has to wait for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from sacl_fast.errors import UserError

_T = TypeVar("_T")

_SLICE = 0.2  # seconds


class NoBatch(UserError):
    """The next batch cannot be had, and the sentence says why; the steps before it are whole."""


class Abandoned(Exception):
    """A thread waits for a batch that nobody wants any more."""


def no_stop() -> None:
    """A ``check`` for waits that only their time limit ends."""


class Patience:
    """How long to wait for a batch: ``limit`` seconds (0: for ever). The wait ends earlier where
    ``check`` raises an exception, or where ``over`` says that nobody wants the batch any more."""

    def __init__(self, limit: float = 0, check: Callable[[], None] = no_stop) -> None:
        self.limit, self.check = limit, check
        self.over = False

    def slices(self) -> Iterator[float]:
        """Seconds to wait for the same batch, again and again. NoBatch when it took too long,
        Abandoned, or what ``check`` raises."""
        began = time.monotonic()
        while True:
            yield _SLICE
            self.check()
            if self.over:
                raise Abandoned
            if self.limit and time.monotonic() - began >= self.limit:
                raise NoBatch(
                    f"no batch of images came within {self.limit:g} seconds: the disk does not "
                    "answer, or it takes longer; a larger data.batch_timeout waits longer"
                )


class Background(Generic[_T]):
    """``work``, begun at once by a thread of its own, which does not hold up the process's end."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="images", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error
        self._done.set()

    def result(self, patience: Patience) -> _T:
        """What ``work`` gives or raises; NoBatch where that takes too long."""
        for seconds in patience.slices():
            if self._done.wait(seconds):
                break
        return self.value()

    def wait(self) -> None:
        """Until it is done, however long it takes."""
        self._done.wait()

    def value(self) -> _T:
        """What ``work`` gives or raises, however long it takes."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value
