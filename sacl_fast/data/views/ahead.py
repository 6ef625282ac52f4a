"""Batches made in the background: by a thread of its own, and on a GPU by a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor


class Ahead:
    """Calls ``make`` for one batch after another, ``ahead`` of them before they are taken.

    On a GPU, ``make`` finds a stream of the thread's own to be the current one, and need not wait
    for what it puts there. A batch that is taken is ordered after that by an event, and its memory
    is not used again before the work that was put on the taker's stream meanwhile is done: the
    host waits for neither. It waits only in the thread, for the steps before the batch that was
    taken last, so that not more than ``ahead`` batches and the one in use are in memory where the
    host runs ahead of the GPU.
    """

    def __init__(
        self, make: Callable[[], Tensor], *, ahead: int, device: torch.device, name: str = "views"
    ) -> None:
        self._make, self._device = make, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._executor = ThreadPoolExecutor(1, name)
        self._failed = False
        self._batches: deque[Future[tuple[Tensor, torch.cuda.Event | None]]] = deque(
            self._executor.submit(self._made, None) for _ in range(ahead)
        )

    def take(self) -> Tensor:
        """The next batch, or what ``make`` raised; nothing is to be taken after that."""
        used = None
        if self._stream is not None:
            used = torch.cuda.Event(blocking=True)
            used.record(torch.cuda.current_stream(self._device))
        self._batches.append(self._executor.submit(self._made, used))
        batch, made = self._batches.popleft().result()
        if made is not None:
            step = torch.cuda.current_stream(self._device)
            step.wait_event(made)
            batch.record_stream(step)
        return batch

    def close(self) -> None:
        """End the thread when it is done with what it has begun."""
        self._executor.shutdown(cancel_futures=True)

    def _made(self, used: torch.cuda.Event | None) -> tuple[Tensor, torch.cuda.Event | None]:
        assert not self._failed, "batches after one that failed are not asked for"
        self._failed = True  # unless it returns
        if used is not None:
            used.synchronize()
        made = None
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = self._make()
            if self._stream is not None:
                made = torch.cuda.Event()
                made.record(self._stream)
        self._failed = False
        return batch, made
