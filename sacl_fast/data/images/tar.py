"""Tar archives read to their true end.

Python's ``tarfile`` takes a damaged header for the end of the archive, and also the end of a file
that was cut between two members: it then leaves out members without a word. A whole archive ends
with blocks of zeros and nothing after them. Where these are missing, either the file was cut, or
its writer did not close it; the user is told.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

BLOCK = 512
_CHUNK = 1 << 20
_LONGEST_HEADER = 1 << 24  # bytes; of extended headers, which are read whole


class TooMuch(Exception):
    """An archive holds more than it may."""


class WholeTar:
    """The members of a tar archive from where ``file`` stands, in order, and its end.

    Unless ``plain``, it may be compressed. Beyond ``most`` bytes of contents, headers included,
    comes TooMuch; where the archive is damaged, or goes on after its end, one of ``DAMAGED``.
    """

    ended = False
    """Whether it has come to its end, and that is marked as one."""

    def __init__(self, file: BinaryIO, most: float = float("inf"), *, plain: bool = False) -> None:
        self._blocks = _Blocks(file if plain else _decompressed(file), most)
        self.tar = tarfile.TarFile(fileobj=self._blocks, mode="r")

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        before = -1
        while (member := self.tar.next()) is not None:
            if member.offset <= before or member.size < 0:
                raise tarfile.ReadError("a header leads back to an earlier one")
            before = member.offset
            # Else it remembers all of a million members.
            self.tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            yield member
        self._check_end()

    def _check_end(self) -> None:
        last = self._blocks.last
        if not last:
            return
        if len(last) < BLOCK:
            raise tarfile.ReadError("it was cut in the header of a member")
        if last.strip(b"\0"):
            raise tarfile.ReadError("the header of a member is damaged")
        while rest := self._blocks.read(_CHUNK):  # to the checksum of what compressed it, as well
            if rest.strip(b"\0"):
                raise tarfile.ReadError(
                    "more follows after its end, as in archives that cat has joined; tar "
                    "--concatenate joins them"
                )
        self.ended = True


def unended(path: Path) -> str:
    """What to say of a tar archive that stops after a member."""
    return (
        f"{path} lacks the blocks of zeros that end a tar archive: it was cut, and images are "
        "missing, or it was not closed by what wrote it"
    )


class _Blocks(io.RawIOBase):
    """A file that remembers what was read last: for ``tarfile`` at the end, a block of zeros."""

    def __init__(self, file: BinaryIO, most: float) -> None:
        self.file, self.most, self.last = file, most, b""

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self.file.read(size)
        if self.file.tell() > self.most:
            raise TooMuch
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if offset > self.most:
            raise TooMuch
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _decompressed(file: BinaryIO) -> BinaryIO:
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(file))
    if start.startswith(b"\xfd7zXZ\0"):
        return cast(BinaryIO, lzma.LZMAFile(file))
    return file
