"""How fast a run goes, and how much of its time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Images per second and the share of time spent waiting for data, between readings."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time each was waited for is counted."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def read(self) -> dict[str, float]:
        """The figures since the last reading, as metrics."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        reading = {
            "images_per_second": self.steps * self.images_per_step / elapsed,
            "data_wait": self.waited / elapsed,
        }
        self._reset()
        return reading
