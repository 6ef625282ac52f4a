"""What is printed: plain lines into files, a display that is never torn in a terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import re
import threading
import tty
from collections.abc import Iterator

import pytest
from rich.console import Console

from sacl_fast.engine.console import RunConsole, _duration

READING = dict(
    loss=12.3456,
    on_diagonal=10.2,
    off_diagonal=1.9,
    distillation=0.25,
    lr=0.0123,
    images_per_second=31204.0,
    data_wait=0.02,
    embedding_std=0.934,
    effective_rank=120.26,
)
LOGGER = logging.getLogger("sacl_fast")


def plain(**options: bool) -> tuple[RunConsole, io.StringIO]:
    stream = io.StringIO()
    return RunConsole(10, 100, 256, stream=stream, **options), stream


@contextlib.contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int = 100, encoding: str = "utf-8"
) -> Iterator[tuple]:
    """A stream that is a terminal of that width, and a function that returns what was written."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    tty.setraw(slave)
    written: list[bytes] = []

    def drain() -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while data := os.read(master, 65536):
                written.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    stream = os.fdopen(slave, "w", encoding=encoding)

    def text() -> str:
        if not stream.closed:
            stream.close()
            reader.join(timeout=20)
        return b"".join(written).decode()

    try:
        yield stream, text
    finally:
        text()
        os.close(master)


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_plain_lines_are_aligned_and_free_of_control_codes():
    console, stream = plain()
    with console:
        console.message("run folder [brackets] runs/x")
        for step in (10, 100, 990):
            console.update(step, step / 100, READING | {"loss": 12.3456 / step})
    first, *lines = stream.getvalue().splitlines()
    assert first == "run folder [brackets] runs/x"
    assert len(lines) == 3
    assert all(c.isprintable() for line in lines for c in line)
    assert lines[0].startswith("epoch  1/10 step   10/1000  loss   1.235  on   10.20")
    assert lines[2].startswith("epoch 10/10 step  990/1000  loss ")
    assert len({line.index("lr") for line in lines}) == 1
    assert len({line.index("rank") for line in lines}) == 1
    for part in ("img/s  31204", "wait   2%", "std 0.934", "rank  120.3", "left 0:00:08"):
        assert part in lines[0]


def test_epochs_are_counted_from_1_and_end_at_the_last():
    console, stream = plain()
    with console:
        for step, epoch in ((1, 0), (50, 0.5), (100, 1), (101, 1.01), (1000, 10.0)):
            console.update(step, epoch, {"loss": 1.0})
    shown = [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines()]
    assert shown == [1, 1, 1, 2, 10]


def test_knn_alone_makes_a_line():
    console, stream = plain()
    with console:
        console.update(100, 1.0, {"knn_dense": 71.234, "knn_slim": 69.8})
    assert stream.getvalue() == "epoch  1/10 step  100/1000  kNN dense %  71.2  kNN slim %  69.8\n"


def test_quiet_writes_nothing_and_leaves_logging_alone():
    before = (LOGGER.level, list(LOGGER.handlers))
    console, stream = plain(quiet=True)
    with console:
        assert (LOGGER.level, LOGGER.handlers) == before
        console.update(10, 0.1, READING)
        console.message("text", warning=True)
    assert stream.getvalue() == ""


def test_log_records_pass_through_and_logging_is_put_back():
    LOGGER.setLevel(logging.NOTSET)
    before = (LOGGER.level, list(LOGGER.handlers))
    console, stream = plain()
    with console:
        logging.getLogger("sacl_fast.data.x").info("filters chosen: %d", 3)
        logging.getLogger("sacl_fast.data.x").warning("unreadable")
        logging.getLogger("other").info("not ours")
    assert stream.getvalue() == "filters chosen: 3\nwarning: unreadable\n"
    assert (LOGGER.level, LOGGER.handlers) == before
    console.close()  # twice is fine
    console.update(20, 0.2, READING)
    assert stream.getvalue().count("\n") == 2


def test_closed_after_an_exception():
    before = list(LOGGER.handlers)
    with pytest.raises(KeyError), plain()[0]:
        raise KeyError
    assert before == LOGGER.handlers


def test_file_names_cannot_bring_control_codes_or_break_the_encoding():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with RunConsole(1, 10, 8, stream=stream) as console:
        console.message("caf\u00e9 \x1b[31m \udcff.jpg")
    stream.flush()
    assert raw.getvalue() == b"caf\\xe9 \\x1b[31m \\udcff.jpg\n"


def test_terminal_shows_everything(monkeypatch: pytest.MonkeyPatch):
    with terminal(monkeypatch, 120) as (stream, text):
        with RunConsole(10, 100, 256, stream=stream) as console:
            console.update(10, 0.1, READING | {"data_wait": 0.4})
            console.message("[red]kept[/red] \udcff", warning=True)
            LOGGER.info("a record")
            console.update(100, 1.0, {"knn_dense": 71.2, "knn_slim": 69.8})
        shown = text()
    assert "\x1b[?25l" in shown  # the cursor is hidden ...
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # ... and comes back
    clean = without_codes(shown)
    assert "warning: [red]kept[/red] \\udcff" in clean
    assert "a record" in clean
    last = clean[clean.rindex("epoch 1/10") :]
    for part in (
        "10%",
        "step 100/1,000",
        "left",
        "loss 12.35",
        "on-diagonal 10.20",
        "off-diagonal 1.900",
        "distillation 0.2500",
        "lr 0.01230",
        "31,204 images/s",
        "waiting for data 40%",
        "std 0.934",
        "rank 120.3",
        "kNN dense 71.2 %",
        "kNN slim 69.8 %",
    ):
        assert part in last, part


@pytest.mark.parametrize("columns", [1, 2, 5, 13, 20, 40, 79, 200])
def test_no_width_breaks_it(monkeypatch: pytest.MonkeyPatch, columns: int):
    with terminal(monkeypatch, columns) as (stream, text):
        with RunConsole(10, 100, 256, stream=stream) as console:
            console.update(10, 0.1, READING)
            console.message("text")
            console.update(990, 9.9, READING | {"knn_dense": 71.2})
        last = without_codes(text()).split("text")[-1]
    assert all(len(line) <= columns for line in re.split(r"[\r\n]+", last)), last


@pytest.mark.parametrize(("columns", "lines"), [(5, 10), (24, 9), (200, 2)])
def test_readings_flow_into_lines_and_long_ones_are_cut(columns: int, lines: int):
    console, _ = plain()
    with console:
        console.update(10, 0.1, READING)
    rich = Console(file=io.StringIO(), width=columns)
    assert len(rich.render_lines(console.status)) == lines


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    with terminal(monkeypatch) as (stream, text):
        monkeypatch.setenv("TERM", "dumb")
        with RunConsole(10, 100, 256, stream=stream) as console:
            console.update(10, 0.1, READING)
        assert "\x1b" not in text()
        assert text().startswith("epoch  1/10 step   10/1000")


def test_time_left_is_measured_from_the_steps(monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console, stream = plain()
    with console:
        console.update(500, 5.0, {"loss": 1.0})  # resumed: only steps of this process count
        now[0] += 30
        console.update(510, 5.1, {"loss": 1.0})
    first, second = stream.getvalue().splitlines()
    assert "left" not in first
    assert second.endswith("left 0:24:30")  # 490 steps of 3 s
    assert console.status.images_per_second() == pytest.approx(10 * 256 / 30)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3_599, "0:59:59"),
        (86_399, "23:59:59"),
        (200_000, "2d 7:33:20"),
    ],
)
def test_durations(seconds: float, text: str):
    assert _duration(seconds) == text


class _Fails(io.StringIO):
    """A stream that cannot be written: a full disk, a pipe nobody reads, a closed file."""

    def __init__(self, error: Exception, tty: bool = False) -> None:
        super().__init__()
        self.error, self.tty = error, tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str, /) -> int:
        raise self.error


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        OSError(28, "No space left on device"),
        OSError(5, "Input/output error"),
        BlockingIOError(11, "Resource temporarily unavailable"),
        ValueError("I/O operation on closed file"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_cannot_be_written_is_dropped(monkeypatch, error, tty):
    monkeypatch.setenv("TERM", "xterm")
    with RunConsole(10, 100, 256, stream=_Fails(error, tty)) as console:
        console.message("a line")
        LOGGER.warning("a warning")
        with console.doing("evaluating"):
            console.update(10, 0.1, READING)
        console.update(20, 0.2, READING)
    console.message("after the end")


def test_a_terminal_that_goes_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    stream = os.fdopen(slave, "w")
    with RunConsole(10, 100, 256, stream=stream) as console:
        console.update(10, 0.1, READING)
        os.close(master)
        console.update(20, 0.2, READING)
        with console.doing("evaluating"):
            console.message("nobody reads this")
    with contextlib.suppress(OSError):  # of what is left in its buffer
        stream.close()


def test_an_ascii_terminal(monkeypatch):
    with terminal(monkeypatch, columns=30, encoding="ascii") as (stream, text):
        with RunConsole(10, 100, 256, stream=stream) as console:
            console.message("run folder rün")
            console.update(10, 0.1, READING)
        said = without_codes(text())
    assert r"run folder r\xfcn" in said and "loss 12.35" in said


def test_the_display_says_what_is_going_on_where_no_step_is(monkeypatch):
    with terminal(monkeypatch) as (stream, text), RunConsole(1, 100, 256, stream=stream) as console:
        with console.doing("evaluating by kNN"):
            pass
        console.update(50, 0.5, READING)
        console.update(100, 1.0, READING)
        with console.doing("evaluating by kNN"):
            pass
        console.close()
        drawn = without_codes(text())
    assert drawn.count("100% step 100/100 evaluating by kNN") == 1
    assert "  0% step 0/100 evaluating by kNN" in drawn


def test_the_cursor_is_there_while_the_display_is(monkeypatch):
    """A process that is killed cannot bring it back."""
    with terminal(monkeypatch) as (stream, text), RunConsole(1, 9, 256, stream=stream) as console:
        console.update(5, 0.5, READING)
        console.close()
        written = text()
    hidden, shown = written.index("\x1b[?25l"), written.index("\x1b[?25h")
    assert hidden < shown < written.index("loss")


def test_a_message_in_the_midst_of_another_comes_after_it():
    """A signal handler's; streams cannot be entered twice."""

    class Interrupted(io.StringIO):
        def write(self, text: str, /) -> int:
            if text == "first":
                console.message("second")
            return super().write(text)

    stream = Interrupted()
    console = RunConsole(1, 9, 256, stream=stream)
    with console:
        console.message("first")
    assert stream.getvalue() == "first\nsecond\n"
