"""Signals: a run stops after its step with a checkpoint, everything else ends at once.

SIGINT (Ctrl-C), SIGTERM and SIGUSR1 are requests to stop; a second Ctrl-C or SIGTERM ends the
process there and then. SIGHUP, the terminal that goes away, stops nothing: output is a courtesy.
Nothing is raised by a handler, because Python prints and drops what is raised while it collects
garbage or imports, and the run would go on. Whoever waits asks ``StopRequest.requested``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from sacl_fast.errors import Stopped

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_Handler = Callable[[int, FrameType | None], None]


class StopRequest:
    """Asks a run to stop after the current step.

    Args:
        patience: seconds after a signal until waits end. Among several processes the others may
            still be about to agree on a step to stop at.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.number = 0
        """The signal that this process got, 0 while there is none."""
        self.patience = patience
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether waiting for something should end, by ``Stopped``."""
        return self.number != 0 and time.monotonic() - self._since >= self.patience

    def check(self) -> None:
        """Raise ``Stopped`` if asked to; for whoever keeps no other process waiting."""
        if self.number:
            raise Stopped(self.number)

    def check_wait(self) -> None:
        """Raise ``Stopped`` where waiting should end; for whoever other processes may wait for."""
        if self.requested:
            raise Stopped(self.number)

    def ask(self, number: int) -> None:
        """What a signal does; any thread may."""
        if not self.number:
            self._since = time.monotonic()
            self.number = number

    @contextmanager
    def by_signals(
        self,
        tell: Callable[[str], None],
        *,
        first: str = "stopping after this step with a checkpoint; again ends at once",
        second: str = "the last checkpoint is what --resume auto goes on from",
        work: str = "training",
    ) -> Iterator[None]:
        """Have signals ask, where this thread may handle them. ``tell`` is for a person to read,
        and is called where the signal interrupts; ``first`` is what is said of the first signal,
        ``second`` of one that ends the process, and ``work`` of what goes on."""

        def say(text: str) -> None:
            with contextlib.suppress(RuntimeError):  # it interrupted a write to the same stream
                tell(text)

        def stop(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            if not self.number:
                self.ask(number)
                say(f"{name}: {first}")
            elif number in again(self.number) and time.monotonic() - self._since > _one_signal():
                end_at_once(number, second)

        def again(earlier: int) -> tuple[int, ...]:
            # A scheduler warns by SIGUSR1 and sends SIGTERM while the checkpoint is written.
            return (signal.SIGINT, earlier) if earlier == signal.SIGTERM else (signal.SIGINT,)

        def hang_up(number: int, frame: FrameType | None) -> None:
            say(f"the terminal is gone; {work} goes on as process {os.getpid()}")

        with _handled({**dict.fromkeys(_STOP, stop), **_of_terminal(stop, hang_up)}):
            yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal ends this process at once: there is nothing to save, before training and after."""

    def end(number: int, frame: FrameType | None) -> None:
        end_at_once(number, "what had been saved is whole")

    def hang_up(number: int, frame: FrameType | None) -> None:
        pass

    with _handled({**dict.fromkeys(_STOP, end), **_of_terminal(end, hang_up)}):
        yield


def end_at_once(number: int, state: str) -> NoReturn:
    """End this process with a sentence and no cleaning up, which could take long."""
    if os.environ.get("RANK", "0") == "0":
        line = f"\nsacl-fast: ended by {signal.Signals(number).name}; {state}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
    die_of(number)


def die_of(number: int) -> NoReturn:
    """Exit with status 128 + number. Of Ctrl-C die in fact: a shell whose loop this program is in
    ends the loop then, and only then."""
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number)


def _one_signal() -> float:
    """Seconds within which the same request can arrive twice. A terminal and a wrapper both send
    Ctrl-C on; torchrun repeats what the scheduler has sent to all processes."""
    return 5.0 if _by_torchrun() else 0.3


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _of_terminal(stop: _Handler, hang_up: _Handler) -> dict[signal.Signals, _Handler]:
    """What SIGHUP does. torchrun passes it on and ends what is left after 30 s."""
    return {signal.SIGHUP: stop if _by_torchrun() else hang_up}


@contextmanager
def _handled(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    """Install handlers in the main thread, but for signals that this process is to ignore (nohup,
    a script's background jobs)."""
    owner = os.getpid()

    def in_this_process(handler: _Handler) -> _Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() == owner:  # else a worker, forked a moment ago: its parent ends it
                handler(number, frame)

        return handle

    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, in_this_process(handler))
    except ValueError:  # not the main thread: Python leaves signals to that one
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
