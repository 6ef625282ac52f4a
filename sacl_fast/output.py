"""Standard streams that a long run can rely on: what cannot be written is dropped.

A terminal goes away, the disk behind ``> log`` fills up, ``| head`` has seen enough: none of that
is a reason to end a training run, nor to change its exit status. For a command whose output is the
result (``doctor``, ``--dry-run``), only standard error is treated so.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TextIO

_PATIENCE = 10.0  # seconds for a reader who is slow (less, Ctrl-S) until lines are dropped
_AT_ONCE = 512  # bytes: every system takes this much where ``select`` says that it takes any


class _Plain(logging.Formatter):
    """Names of files and classes may hold anything, such as what steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_text(super().format(record), keep="\n\t")


class _Courtesy(io.RawIOBase):
    """The bytes of a file descriptor. Errors are kept in mind, not raised."""

    def __init__(self, descriptor: int, failed: Callable[[OSError], None]) -> None:
        self._descriptor, self._failed = descriptor, failed
        self._patience = _PATIENCE
        self._told = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        part = memoryview(data)[:_AT_ONCE]
        try:
            if not self._is_taken():
                raise OSError(errno.ETIMEDOUT, "its reader waits")
            return os.write(self._descriptor, part)
        except OSError as error:
            if not self._told:
                self._told = True  # first: telling may come back here
                self._failed(error)
            return len(data)

    def _is_taken(self) -> bool:
        """Whether somebody takes bytes, soon; once somebody did not, now."""
        deadline = time.monotonic() + self._patience
        while not select.select([], [self._descriptor], [], max(0, deadline - time.monotonic()))[1]:
            if time.monotonic() >= deadline:
                self._patience = 0.0
                return False
        self._patience = _PATIENCE
        return True


def open_standard_streams() -> None:
    """Have descriptors 0, 1 and 2 and Python's streams over them, whatever this process was given.

    A descriptor that was closed would be given to the next file, and what is printed would be
    written into that. What a stream's encoding cannot express is escaped.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != descriptor:
                os.dup2(nothing, descriptor)
                os.close(nothing)
        if getattr(sys, name) is None:
            mode = "r" if descriptor == 0 else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def make_courtesy(name: str) -> None:
    """Make ``sys.stdout`` or ``sys.stderr`` drop what it cannot write, and say so once on standard
    error. A stream that a test or a notebook has put there is left alone."""
    stream: TextIO = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
        return

    def failed(error: OSError) -> None:
        line = (
            f"sacl-fast: standard output is not written to any more ({error.strerror}); "
            "training goes on\n"
        )
        if name == "stdout":  # not by sys.stderr: a live display hands that on to this stream
            with contextlib.suppress(OSError):
                os.write(2, line.encode())

    with contextlib.suppress(OSError):
        stream.flush()
    courtesy = io.TextIOWrapper(
        io.BufferedWriter(_Courtesy(stream.fileno(), failed)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=name == "stderr" or stream.line_buffering,
        write_through=False,
    )
    setattr(sys, name, courtesy)


def is_courtesy(stream: TextIO) -> bool:
    """Whether a stream drops what it cannot write."""
    buffer = getattr(stream, "buffer", None)
    return isinstance(getattr(buffer, "raw", None), _Courtesy)


def plain_text(name: str, keep: str = "") -> str:
    """A name, or a sentence with some, for a file or a screen: bytes that are no UTF-8 (of file
    names), as ``\\udcff``, and control characters but for those to ``keep`` are escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def show_log(level: int = logging.INFO) -> None:
    """Have lines of the log from ``level`` on appear on standard error, as plain text."""
    if not (root := logging.getLogger()).handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain("%(message)s"))
        root.addHandler(handler)
    logging.getLogger("sacl_fast").setLevel(level)
