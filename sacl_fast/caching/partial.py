"""A cache that is being made, in a folder beside its file: ``OUT.partial``.

``pixels`` becomes the file. ``journal`` has a line for what it is made of, then one for each run of
images whose pixels are on the disk, with their sizes and checksums; a line begins with its own
CRC-32. Whatever ends the process, the lines that are whole tell what was done. The process that
makes the cache holds a lock on the journal (``lockf``: the workers do not inherit it).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sacl_fast.caching.decoding import Decoded
from sacl_fast.data.images.pixel_format import START, Index, pack_header, padded
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import kind_of

logger = logging.getLogger(__name__)

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_SETTLE = 2**26  # bytes of pixels between two waits for the disk


class Partial:
    """The cache ``out`` of ``count`` images in the making, on with what an earlier process has
    done.

    Args:
        plan: what the pixels depend on; a partial cache of another plan is not gone on with.

    Raises:
        UserError: another process makes it, it was begun by another plan, ``out`` exists, or it
            cannot be written.
    """

    def __init__(self, out: Path, count: int, plan: dict[str, Any]) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self.plan = plan
        self.sizes = np.zeros((count, 2), np.uint32)
        self.checksums = np.zeros(count, np.uint32)
        self.bad: dict[int, str] = {}
        self.shrunk = self.done = self.written = 0
        """how many images were shrunk, are done, and bytes of their pixels"""
        self._unsettled: list[bytes] = []
        self._since = 0
        self._journal = self._pixels = -1
        self._ours = False
        refuse_existing(out)
        try:
            with self.explained():
                self._open(plan)
        except BaseException:
            self._close()
            raise

    def _open(self, plan: dict[str, Any]) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._journal = self._take()
        self._ours = not (self.folder / "pixels").exists()  # what a process has left that was done
        refuse_existing(self.out)
        with open(self._journal, "rb", closefd=False) as file:
            first, *records = _whole_lines(file) or [b""]
        if not first:
            os.ftruncate(self._journal, 0)
            _write(self._journal, _line(plan))
        elif (begun := json.loads(first)) != plan:
            others = ", ".join(key for key in plan if begun.get(key) != plan[key])
            raise UserError(
                f"{self.folder} was begun with other {others}; the same as then work, another OUT "
                "does, and so does this one after that folder is removed"
            )
        self._ours = True
        self._pixels = os.open(self.folder / "pixels", _FLAGS, 0o666)
        there = os.fstat(self._pixels).st_size - START
        kept = len(_line(plan))
        for record in records:
            if not self._apply(json.loads(record), there):
                break
            kept += len(record) + _PREFIX + 1
        os.ftruncate(self._journal, kept)
        os.lseek(self._journal, 0, os.SEEK_END)
        os.ftruncate(self._pixels, START + self.written)
        os.lseek(self._pixels, 0, os.SEEK_END)

    def _take(self) -> int:
        """The journal, locked."""
        while True:
            self.folder.mkdir(exist_ok=True)
            journal = os.open(self.folder / "journal", _FLAGS, 0o666)
            try:
                fcntl.lockf(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(journal)
                raise UserError(
                    f"another process is making {self.out}; wait for it, or name another OUT"
                ) from None
            except OSError as error:
                logger.warning("cannot lock %s (%s); going on", self.folder, reason_of(error))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(journal), os.stat(self.folder / "journal")):
                    return journal
            os.close(journal)  # the other process was done, and removed it

    def _apply(self, record: dict[str, Any], there: int) -> bool:
        """Count the images of a line as done, if their pixels are among the ``there`` bytes."""
        sizes = np.array(record["sizes"], np.int64).reshape(-1, 2)
        room = int(padded(sizes.prod(1) * 3).sum())
        stop = self.done + len(sizes)
        if record["first"] != self.done or stop > len(self.sizes) or self.written + room > there:
            return False
        self.sizes[self.done : stop] = sizes
        self.checksums[self.done : stop] = record["checksums"]
        self.bad.update({self.done + slot: reason for slot, reason in record["bad"]})
        self.shrunk += record["shrunk"]
        self.done, self.written = stop, self.written + room
        return True

    def append(self, decoded: Decoded) -> None:
        """Write the pixels of the next images."""
        record = {
            "first": self.done,
            "sizes": decoded.sizes.tolist(),
            "checksums": decoded.checksums.tolist(),
            "shrunk": decoded.shrunk,
            "bad": decoded.bad,
        }
        with self.explained():
            _write(self._pixels, decoded.pixels.numpy())
            self._unsettled.append(_line(record))
            self._since += len(decoded.pixels)
            if self._since >= _SETTLE:
                self._settle()
        applied = self._apply(record, self.written + len(decoded.pixels))
        assert applied, record["first"]

    def _settle(self) -> None:
        """Have the disk know of all that was appended: of pixels first, then of the journal."""
        if not self._unsettled:
            return
        os.fdatasync(self._pixels)
        end = os.lseek(self._journal, 0, os.SEEK_CUR)
        try:
            _write(self._journal, b"".join(self._unsettled))
            os.fdatasync(self._journal)
        except OSError:
            os.ftruncate(self._journal, end)
            os.lseek(self._journal, end, os.SEEK_SET)
            raise
        self._unsettled.clear()
        self._since = 0

    def seal(self, index: Index) -> None:
        """Add the index, and give the file its name."""
        data = index.to_npz()
        with self.explained():
            self._settle()
            _write(self._pixels, data)
            os.fsync(self._pixels)
            os.pwrite(self._pixels, pack_header(START + self.written, data), 0)
            os.fsync(self._pixels)
            refuse_existing(self.out)
            os.rename(self.folder / "pixels", self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What the disk refuses, as a UserError."""
        try:
            yield
        except OSError as error:
            kept = self._kept if self.written else "nothing is left of it; another OUT works"
            raise UserError(f"cannot write {self.out}: {reason_of(error)}; {kept}") from None

    @property
    def _kept(self) -> str:
        return f"what is done is kept in {self.folder}, and the same command goes on from there"

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._pixels >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._pixels, START + self.written)  # room for the journal
                self._settle()
        self._close()
        if isinstance(error, UserError) and self.written and str(self.folder) not in str(error):
            raise UserError(f"{error}; {self._kept}") from error

    def _close(self) -> None:
        """Let go of the folder, and remove it where no pixels are in it."""
        if self._ours and not self.written:
            shutil.rmtree(self.folder, ignore_errors=True)
        for descriptor in (self._pixels, self._journal):
            if descriptor >= 0:
                os.close(descriptor)


def refuse_existing(out: Path) -> None:
    if kind_of(out) is not None or os.path.islink(out):
        raise UserError(f"{out} exists already; another name works, or remove it first")


# --- the journal ---------------------------------------------------------------------------------

_PREFIX = 9  # bytes: the CRC-32 in hexadecimal digits, and a space


def _line(values: dict[str, Any]) -> bytes:
    data = json.dumps(values, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _whole_lines(file: Any) -> list[bytes]:
    """The JSON of the lines up to the first that is not whole."""
    found = []
    for line in file:
        data = line[_PREFIX:-1]
        if line[:_PREFIX] + data + b"\n" != b"%08x %s\n" % (zlib.crc32(data), data):
            break
        found.append(data)
    return found


def _write(descriptor: int, data: Any) -> None:
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]
