"""SIGTERM and SIGUSR1 as a request to stop after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """``name``: the signal this process got. ``everywhere``: all processes know of one."""

    name: str | None = None
    everywhere = False


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGUSR1 into a request, where this thread may."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: Python leaves signals to that one
        pass
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
