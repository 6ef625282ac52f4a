"""What a person sees of a run: a live display in a terminal, plain lines everywhere else.

The trainer talks to one object and does not ask where its output goes. Log records of
``sacl_fast`` pass through it, so that they appear above the display and do not tear it. Output is
a courtesy: a terminal that is gone and a full disk behind ``> log`` do not end a run.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console, ConsoleOptions, OverflowMethod, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sacl_fast.output import plain_text

_REFRESH = 0.2  # seconds between drawings of the live display, at least
_WAIT_WARNING = 0.2  # share of the time spent waiting for data from which it is highlighted


class RunConsole:
    """Progress of one run. ``update`` at every reading, ``message`` for everything else.

    Usable as a context manager. The live display starts with the first ``update`` and is drawn
    by the calling thread only: data-loader workers can be forked at any time.

    Args:
        epochs: of the whole run.
        steps_per_epoch: optimiser steps.
        images_per_step: over all processes; for the time left and images/s.
        start_step: steps done before this process (a resumed run).
        stream: default: standard output.
        steps: of the whole run, where that is not a whole number of epochs.
        quiet: write nothing and leave logging alone (all processes but the first).
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        images_per_step: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        *,
        steps: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.status = _Status(epochs, steps_per_epoch, images_per_step, start_step)
        self.status.steps = self.status.steps if steps is None else steps
        self._quiet = quiet
        self._stream = stream or sys.stdout
        self._rich: Console | None = None
        self._live: Live | None = None
        self._drawn = 0.0
        self._closed = False
        self._busy = False
        self._waiting: list[Callable[[], object]] = []
        self._handler = _Handler(self)
        self._logger = logging.getLogger("sacl_fast")
        self._logger_before = self._logger.level, self._logger.propagate
        if quiet:
            return
        if self._stream.isatty():
            rich = _Console(file=self._stream, highlight=False)
            self._rich = None if rich.is_dumb_terminal else rich
        self._logger.addHandler(self._handler)
        self._logger.propagate = False  # a handler further up would print it again
        if self._logger.level == logging.NOTSET:
            self._logger.setLevel(logging.INFO)

    def update(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Show a reading; what it does not mention keeps its last value in the live display.

        Args:
            step: steps done.
            epoch: epochs done, counted from 0 (0.5: in the middle of the first).
            metrics: any of ``loss``, ``on_diagonal``, ``off_diagonal``, ``distillation``, ``lr``,
                ``images_per_second``, ``data_wait`` (0 to 1), ``peak_memory_bytes``,
                ``embedding_std``, ``effective_rank``, ``knn_dense``, ``knn_slim``, ``accuracy``,
                ``precision`` (mean average precision; percent all), ``rankme_dense``,
                ``lidar_dense``; others are not shown.
        """
        if self._quiet or self._closed:
            return
        self.status.read(step, epoch, metrics)
        if self._rich is None:
            self._print_plain(self.status.plain_line(metrics))
        else:
            self._draw(now=False)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Have the live display say what is going on, where no step is."""
        self.status.doing = what
        self._draw(now=True)
        try:
            yield
        finally:
            self.status.doing = ""
            self._draw(now=True)

    def message(self, text: str, *, warning: bool = False) -> None:
        """Print a line above the live display; warnings stand out. A signal handler may call it."""
        if self._quiet:
            return
        text = ("warning: " if warning else "") + self._encodable(plain_text(text, keep="\n\t"))
        rich = self._rich
        if rich is None:
            self._print_plain(text)
        else:
            style = "bold yellow" if warning else ""
            # A command that is copied from it must not be broken into lines.
            self._write(lambda: rich.print(Text(text, style=style), soft_wrap=True))

    def close(self) -> None:
        """Leave the last state of the display standing, and logging as it was before."""
        if self._closed:
            return
        self._closed = True
        if not self._quiet:
            self._logger.removeHandler(self._handler)
            level, self._logger.propagate = self._logger_before
            self._logger.setLevel(level)
        if self._live is not None:
            self._write(self._live.refresh)
            self._write(self._live.stop)

    def __enter__(self) -> RunConsole:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, *, now: bool) -> None:
        """Draw the live display, started where need be; not too often, but for ``now``."""
        if self._quiet or self._closed or self._rich is None:
            return
        if self._live is None:
            self._live = Live(self.status, console=self._rich, auto_refresh=False)
            self._write(self._live.start)
            # A process that is killed cannot bring the cursor back.
            self._write(self._rich.show_cursor)
        if now or time.monotonic() - self._drawn >= _REFRESH:
            self._write(self._live.refresh)
            self._drawn = time.monotonic()

    def _print_plain(self, text: str) -> None:
        text = self._encodable(text)
        self._write(lambda: print(text, file=self._stream, flush=True))

    def _encodable(self, text: str) -> str:
        encoding = self._stream.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _write(self, write: Callable[[], object]) -> None:
        """Write, or drop what cannot be written. What a signal handler writes in the midst of that
        comes after it: streams cannot be entered twice."""
        self._waiting.append(write)
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                with suppress(OSError, ValueError):  # full or gone; closed
                    self._waiting.pop(0)()
        finally:
            self._busy = False


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A terminal that nobody reads is no reason to exit, which is what rich would do."""


class _Handler(logging.Handler):
    """Log records as messages."""

    def __init__(self, console: RunConsole) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.message(self.format(record), warning=record.levelno >= logging.WARNING)
        except Exception:
            self.handleError(record)  # logging's own way: reported, and the run goes on


class _Status:
    """The last readings, and how they are drawn."""

    def __init__(
        self, epochs: int, steps_per_epoch: int, images_per_step: int, start_step: int
    ) -> None:
        self.epochs = epochs
        self.steps = epochs * steps_per_epoch
        self.images_per_step = images_per_step
        self.step = start_step
        self.epoch = min(start_step // max(steps_per_epoch, 1) + 1, epochs)
        self.metrics: dict[str, float] = {}
        self.doing = ""
        """What is going on where no step is."""
        # Long enough to hold evaluations and checkpoints, which belong to the time left.
        self._times: deque[tuple[float, int]] = deque(maxlen=500)

    def read(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        self.step = step
        self.epoch = min(max(1, math.ceil(epoch)), self.epochs)
        self.metrics.update(metrics)
        self._times.append((time.monotonic(), step))

    def images_per_second(self) -> float | None:
        return self.metrics.get("images_per_second") or self._measured_rate()

    def seconds_left(self) -> float | None:
        rate = self._measured_rate() or self.metrics.get("images_per_second")
        return (self.steps - self.step) * self.images_per_step / rate if rate else None

    def _measured_rate(self) -> float | None:
        """Images per second over the last readings, all pauses included."""
        if len(self._times) < 2:
            return None
        (begin, first), (end, last) = self._times[0], self._times[-1]
        done = (last - first) * self.images_per_step
        return done / (end - begin) if done > 0 and end > begin else None

    def plain_line(self, metrics: Mapping[str, float]) -> str:
        """One reading on one line, in columns that stay where they are."""
        e, s = len(str(self.epochs)), len(str(self.steps))
        cells = [f"epoch {self.epoch:>{e}}/{self.epochs} step {self.step:>{s}}/{self.steps}"]
        for key, (label, width) in _PLAIN.items():
            if key in metrics:
                cells.append(f"{label} {_value(key, metrics[key]):>{width}}")
        left = self.seconds_left()
        if left is not None and "loss" in metrics:
            cells.append(f"left {_duration(left)}")
        return "  ".join(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bar(options.max_width)
        yield from _flow(self._cells(), options.max_width, "crop" if options.ascii_only else None)

    def _bar(self, width: int) -> Table:
        done = self.step / self.steps if self.steps else 1.0
        left = self.seconds_left()
        parts = [Text(f"epoch {self.epoch}/{self.epochs}", style="bold")]
        parts.append(Text(f"{done:4.0%}"))
        if width >= 80:
            parts.append(Text(f"step {self.step:,}/{self.steps:,}", style="dim"))
        if self.doing:
            parts.append(Text(self.doing, style="cyan"))
        elif width >= 50:
            parts.append(Text(f"{_duration(left)} left" if left is not None else "", style="cyan"))
        grid = Table.grid(padding=(0, 1), expand=True)
        for index in range(len(parts) + 1):
            grid.add_column(no_wrap=True, ratio=1 if index == 1 else None)
        grid.add_row(parts[0], ProgressBar(max(self.steps, 1), self.step), *parts[1:])
        return grid

    def _cells(self) -> Iterator[Text]:
        def cell(label: str, key: str, style: str = "", suffix: str = "") -> Iterator[Text]:
            if key in self.metrics:
                value = _value(key, self.metrics[key]) + suffix
                yield Text.assemble((f"{label} ", "dim"), (value, style))

        yield from cell("loss", "loss", "bold")
        yield from cell("on-diagonal", "on_diagonal")
        yield from cell("off-diagonal", "off_diagonal")
        yield from cell("distillation", "distillation")
        yield from cell("lr", "lr")
        speed = self.images_per_second()
        if speed is not None:
            yield Text.assemble((f"{speed:,.0f}", "bold green"), (" images/s", "dim"))
        slow = self.metrics.get("data_wait", 0.0) > _WAIT_WARNING
        yield from cell("waiting for data", "data_wait", "bold yellow" if slow else "")
        yield from cell("memory", "peak_memory_bytes", suffix=" GiB")
        yield from cell("std", "embedding_std")
        yield from cell("rank", "effective_rank")
        yield from cell("kNN dense", "knn_dense", "bold magenta", " %")
        yield from cell("kNN slim", "knn_slim", "magenta", " %")
        yield from cell("RankMe", "rankme_dense", "magenta")
        yield from cell("LiDAR", "lidar_dense", "magenta")
        yield from cell("accuracy", "accuracy", "bold magenta", " %")
        yield from cell("mAP", "precision", "bold magenta", " %")


_PLAIN = {
    "loss": ("loss", 7),
    "on_diagonal": ("on", 7),
    "off_diagonal": ("off", 7),
    "distillation": ("xd", 7),
    "lr": ("lr", 8),
    "images_per_second": ("img/s", 6),
    "data_wait": ("wait", 4),
    "peak_memory_bytes": ("GiB", 5),
    "embedding_std": ("std", 5),
    "effective_rank": ("rank", 6),
    "knn_dense": ("kNN dense %", 5),
    "knn_slim": ("kNN slim %", 5),
    "rankme_dense": ("RankMe", 5),
    "lidar_dense": ("LiDAR", 5),
    "accuracy": ("accuracy %", 5),
    "precision": ("mAP %", 5),
}


def _value(key: str, value: float) -> str:
    match key:
        case "images_per_second":
            return f"{value:.0f}"
        case "data_wait":
            return f"{value:.0%}"
        case "peak_memory_bytes":
            return f"{value / 2**30:.2f}"
        case "embedding_std":
            return f"{value:.3f}"
        case "effective_rank" | "rankme_dense" | "lidar_dense" | "knn_dense" | "knn_slim":
            return f"{value:.1f}"
        case "accuracy" | "precision":
            return f"{value:.1f}"
        case _:
            return f"{value:#.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"


def _flow(
    cells: Iterator[Text], width: int, overflow: OverflowMethod | None = None
) -> Iterator[Text]:
    """Cells side by side, as many on a line as it holds; one wider than the line is cut."""
    line = Text()
    for cell in cells:
        if line and line.cell_len + 3 + cell.cell_len > width:
            yield line
            line = Text()
        line.append_text(Text("   ") + cell if line else cell)
        line.no_wrap, line.overflow = True, overflow or "ellipsis"
    if line:
        yield line
