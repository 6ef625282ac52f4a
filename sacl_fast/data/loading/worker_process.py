"""A worker process: reads the batches it is told to, and lives no longer than its parent.

Workers ignore signals that go to all processes of a run (Ctrl-C, a scheduler's SIGTERM): the main
process writes a checkpoint and then ends its workers, so that none of them prints a traceback.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import resource
import signal
import socket
import threading
import traceback
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch

from sacl_fast.data.loading.handover import receive_task, send_batch
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.errors import reason_of

FOR_THE_PARENT = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})

_AWAITED = frozenset({signal.SIGTERM, signal.SIGHUP})

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY = 5.0  # seconds


class Reader(Protocol):
    """What is done in a worker: a task to a batch, which can be pickled."""

    def __getitem__(self, key: Any, /) -> Any: ...


class Failure(NamedTuple):
    """What a reader raised, in place of a batch."""

    error: Exception


def work(
    reader: Reader, channel: socket.socket, parent: int, inherited: Iterable[socket.socket]
) -> None:
    """Read batches until ``parent`` closes the ``channel`` or ends. The signals of
    ``FOR_THE_PARENT`` are blocked already; ``inherited``: the parent's own ends of channels."""
    _live_with(parent)
    for other in inherited:
        other.close()
    gc.freeze()  # what was the parent's must not be collected here: DALI's pipelines abort then
    torch.set_num_threads(1)
    _allow_files()
    try:
        while True:
            task = receive_task(channel)
            _answer(channel, reader, task)
    except (EOFError, ConnectionError):  # nobody wants batches any more
        pass


def _live_with(parent: int) -> None:
    """End with the ``parent``, or at a SIGTERM of it, whatever this process is at."""
    # Where a parent has ended before this call, no signal comes, and where the kernel refuses it,
    # none ever does: so it is looked for as well.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGHUP))
    if os.getppid() != parent:
        os._exit(0)
    for number in FOR_THE_PARENT - _AWAITED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, _AWAITED)
    threading.Thread(target=_await_end, args=(parent,), daemon=True).start()


def _await_end(parent: int) -> None:
    """SIGHUP may also tell that only the thread which started this process has ended."""
    while True:
        got = signal.sigtimedwait(_AWAITED, _LOOK_EVERY)
        told = got is not None and got.si_signo == signal.SIGTERM and got.si_pid == parent
        if told or os.getppid() != parent:
            os._exit(0)


def _allow_files() -> None:
    """As many open files as this process may have: batches that nobody took yet count as such."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _answer(channel: socket.socket, reader: Reader, task: Any) -> None:
    try:
        batch = reader[task]
    except Exception as error:  # the main process raises it
        batch = Failure(_portable(error))
    try:
        send_batch(channel, batch)
    except ConnectionError:
        raise
    except OSError as error:
        told = NoBatch(
            f"a worker process cannot hand over a batch in shared memory: {reason_of(error)}; "
            "data.workers 0 works without"
        )
        send_batch(channel, Failure(told))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be pickled."""
    error.add_note(f"in a worker process:\n{traceback.format_exc()}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        told = RuntimeError(repr(error))
        told.add_note(error.__notes__[-1])
        return told
