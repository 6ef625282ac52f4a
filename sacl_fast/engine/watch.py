"""Whether the other ranks are there: each says so every few seconds, in a thread of its own.

Of a process that was killed the others learn from a connection that closes, if they wait in a
collective of gloo. Whoever waits for work of rank 0, for another's address or in NCCL would wait
for long, or for ever.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

import torch.distributed as dist

from sacl_fast.errors import reason_of

FAILED = "failed"
"""The key of the store under which a rank says why it leaves."""

_BEAT = 5.0  # seconds
_SILENT = 120.0  # a machine that swaps can keep a thread waiting for long
_GRACE = 60.0  # from a failure until this process is ended where it does not end by itself


class Watch:
    """Notices a rank that is gone, and ends this process where another's failure cannot.

    Args:
        store: where all ranks say that they are there; it is read by a connection of its own.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.found = ""
        """What this rank was the first to notice, for a person."""
        self.working = False
        """Whether the main thread does what is to be finished, such as writing a file."""
        # Rank 0 watches all and tells them; they watch rank 0. All by all would be too many.
        self._others = range(1, world_size) if rank == 0 else [0]
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined] - torch's stub lacks it
        self._heard: dict[int, tuple[int, float]] = {}  # by rank: its count, and since when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="other ranks", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """This rank leaves, and not by a failure that others are yet to notice."""
        self._over.set()
        self._thread.join(_BEAT)  # the store's process may be gone without a word
        with contextlib.suppress(RuntimeError):
            self._store.set(_beat(self.rank), "-1")

    def _watch(self) -> None:
        why, since, before = "", 0.0, time.monotonic()
        while not self._over.wait(_BEAT):
            now = time.monotonic()
            if now - before > _SILENT / 2:
                self._heard.clear()  # it was this process that stood still
            before = now
            if not why:
                why = self._listen(now)
            if not why or self.working:
                since = now
            elif now - since > _GRACE:
                os.write(2, f"sacl-fast: rank {self.rank} ends, since {why}\n".encode())
                os._exit(1)

    def _listen(self, now: float) -> str:
        """Why this rank is to end; empty where nothing is wrong."""
        try:
            self._store.add(_beat(self.rank), 1)
            if self._store.check([FAILED]):
                return self._store.get(FAILED).decode()
            for rank in self._others:
                count = self._store.add(_beat(rank), 0)
                known, when = self._heard.get(rank, (None, now))
                if count != known:
                    self._heard[rank] = (count, now)
                elif count >= 0 and now - when > _SILENT:
                    self.found = (
                        f"rank {rank} was lost: rank {self.rank} has not heard of it for "
                        f"{_SILENT:g} seconds, so it was killed or its machine is gone; "
                        "--resume auto goes on from the last checkpoint"
                    )
                    return self._store.compare_set(FAILED, "", self.found).decode()
        except RuntimeError as error:
            return (
                f"the process that ranks meet at, rank 0 or torchrun, is gone ({reason_of(error)})"
            )
        return ""


def _beat(rank: int) -> str:
    return f"beat {rank}"
