"""How fast a run goes, and how much of its time it waits for data.

On a GPU the host runs ahead of the device, so that how long it waits for a batch says little: the
device may be busy all the while, or idle long after. There the time is taken by the device, between
two events on the stream of the step: one after all that was launched before the wait, one before
all that is launched after it. Events are read when the device is waited for anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Event(Protocol):
    """A point in time, as ``torch.cuda.Event``."""

    def record(self) -> Any:
        """Now, or as soon as the device has done what was launched before."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later event; both have happened."""
        ...


class HostEvent:
    """An ``Event`` on the host, where nothing runs ahead."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event.seconds - self.seconds)


class Clock:
    """Images per second and the share of time spent waiting for data, between readings."""

    def __init__(
        self,
        images_per_step: int,
        device: torch.device,
        *,
        event: Callable[[], Event] | None = None,
    ) -> None:
        """``event`` makes events; None: the device's."""
        on_gpu = device.type == "cuda"
        self.images_per_step = images_per_step
        self._event = event or (
            partial(torch.cuda.Event, enable_timing=True) if on_gpu else HostEvent
        )
        self._reset()

    def _reset(self) -> None:
        self.start = time.perf_counter()
        self.waits: list[tuple[Event, Event]] = []

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time each was waited for is counted."""
        while True:
            asked, there = self._event(), self._event()
            asked.record()
            try:
                batch = next(batches)
            except StopIteration:
                return
            there.record()
            self.waits.append((asked, there))
            yield batch

    def read(self) -> dict[str, float]:
        """The figures since the last reading, as metrics. The device has done the last step."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        waited = sum(asked.elapsed_time(there) for asked, there in self.waits) / 1e3
        reading = {
            "images_per_second": len(self.waits) * self.images_per_step / elapsed,
            "data_wait": min(waited / elapsed, 1.0),
        }
        self._reset()
        return reading
