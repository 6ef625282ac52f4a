"""The progress of an evaluation, on standard error: standard output is for the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class EvaluationProgress:
    """A bar for each piece of work in a terminal, elsewhere a line of the log. ``quiet``: neither.

    The bar is drawn by the calling thread only, since data workers may be forked at any time.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def steps(self, title: str, total: int, done: int = 0) -> Callable[..., None]:
        """A new piece of work of ``total`` steps, of which ``done`` were done before; call what is
        returned after each step, or with a number after so many."""
        if self._bar.disable and not self._quiet:
            logger.info("%s", title)
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        task = self._bar.add_task(title, total=total, completed=done)
        self._bar.refresh()

        def advance(count: int = 1) -> None:
            self._bar.advance(task, count)
            self._bar.refresh()

        return advance

    def over(self, batches: Iterable[_T], title: str, total: int) -> Iterator[_T]:
        """The batches, as a piece of work."""
        done = self.steps(title, total)
        for batch in batches:
            yield batch
            done()
