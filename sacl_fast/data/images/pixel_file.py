"""Images that ``sacl-fast cache`` has decoded: one file, mapped into memory.

The format is told in ``pixel_format.py``. Nothing is read but the index until an image is asked
for, and what processes read of a file they share.
"""

from __future__ import annotations

import logging
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sacl_fast._version import __version__
from sacl_fast.config import DataConfig
from sacl_fast.config.choices import Split
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.manifest import ends_of, unpacked
from sacl_fast.data.images.pixel_format import (
    HEADER,
    START,
    VERSION,
    About,
    Header,
    Index,
    padded,
    placement_of,
    seal_of,
    unpack_header,
)
from sacl_fast.data.images.source import Source, Splits, Subset
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import kind_of, user_path

logger = logging.getLogger(__name__)

_MAKES = "sacl-fast cache makes such a file"
_AGAIN = "sacl-fast cache makes it anew"
CUT = (
    "was cut or written over while its images were read; a file that is moved to its name works "
    "(mv, not cp), since this process then keeps the old one"
)


@dataclass(frozen=True, eq=False)
class _Opened:
    """A file whose index is whole: N images."""

    path: str
    seal: bytes
    about: About
    index: Index
    memory: mmap.mmap  # the whole file
    pixels: np.ndarray  # (bytes,) uint8, in the file
    placement: np.ndarray  # (N, 3) int64
    ends: np.ndarray  # (N,) int64: of the names
    intact: np.ndarray  # (N,) bool: whose checksum was right; shared with forked processes

    def require_whole(self) -> None:
        """UserError where the file was cut since: reading what is gone would kill the process."""
        if is_cut(self.memory):
            raise UserError(f"{self.path} {CUT}")


class PixelFile:
    """The N decoded images of one split of a file, a ``Source``.

    Args:
        path: of a file that ``sacl-fast cache`` has written.
        split: the images for training or for validation.
        labelled: False does without the labels.

    Raises:
        UserError: there is no such file, it is another kind of file, or it is not whole.
    """

    decoded = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: Split = "train",
        labelled: bool = True,
    ) -> None:
        self._set(_opened(Path(path)), split, labelled)

    def _set(self, opened: _Opened, split: Split, labelled: bool) -> None:
        self._opened, self._split, self._labelled = opened, split, labelled
        self.path, self.about = opened.path, opened.about
        train, val = self.about.train, self.about.val
        assert split == "train" or val is not None, "the file has no images for validation"
        part = slice(0, train) if split == "train" else slice(train, None)
        self._first = part.start
        self.pixels = opened.pixels
        """(bytes,) uint8: all images of the file, read-only"""
        self.placement = opened.placement[part]
        """(N, 3) int64: where an image lies in ``pixels``, its height and width; 0, 0, 0 where it
        was unreadable when the file was made"""
        self.classes = self.about.classes if labelled else ()
        labels = opened.index.labels[part].astype(np.int64)
        self.labels = labels if labelled else np.full_like(labels, -1)

    def __reduce__(self) -> tuple:
        return _reopened, (self.path, self._split, self._labelled, self._opened.seal)

    def __len__(self) -> int:
        return len(self.placement)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.read(index))

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, in the file."""
        offset, height, width = self.placement[index].tolist()
        if not height:
            raise BadImage(self._reason(index))
        self._opened.require_whole()
        if not self._opened.intact[self._first + index]:
            self._compare(index)
        pixels = self.pixels[offset : offset + height * width * 3]
        return pixels.reshape(height, width, 3)

    def check(self, indices: np.ndarray) -> None:
        """Compare the pixels of the images ``indices`` with their checksums, where that was not
        done yet, by this process or one that shares the file with it. Any threads may at once.

        Raises:
            BadImage: they differ; names the image and where it lies in the file.
        """
        indices = np.asarray(indices, np.int64)
        for index in indices[~self._opened.intact[self._first + indices]].tolist():
            self._compare(index)

    def _compare(self, index: int) -> None:
        self._opened.require_whole()
        offset, height, width = self.placement[index].tolist()
        size = height * width * 3
        block, pixels = self._first + index, self.pixels[offset : offset + size]
        if zlib.crc32(pixels.data) != self._opened.index.checksums[block]:
            raise BadImage(
                f"block {block} of {self.path} is damaged: its bytes {START + offset} to "
                f"{START + offset + size - 1} are not those that were written; {_AGAIN}"
            )
        self._opened.intact[block] = True

    def _reason(self, index: int) -> str:
        bad, reasons = self._opened.index.bad, self._opened.index.reasons
        position = int(np.searchsorted(bad, self._first + index))
        return unpacked(reasons, ends_of(reasons), position)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """What the image was called where it came from."""
        return self.about.root + self._name(index)

    def identity(self, index: int) -> bytes:
        """Its name within the data set, its size and the checksum of its pixels."""
        _, height, width = self.placement[index].tolist()
        checksum = self._opened.index.checksums[self._first + index]
        return os.fsencode(f"{self._name(index)}\0{height}\0{width}\0{checksum}")

    def _name(self, index: int) -> str:
        return unpacked(self._opened.index.names, self._opened.ends, self._first + index)


def open_cache(config: DataConfig, _download: bool) -> Splits:
    """The images in the file ``data.root``."""
    if not config.root:
        raise UserError(f"no images given: data.root takes the file of a cache; {_MAKES}")
    opened = _opened(user_path(config.root, "data.root"))
    about = opened.about
    if config.labels == "folder" and not about.classes:
        raise UserError(
            f"data.labels is folder, but {opened.path} was made without labels; data.labels none "
            "works"
        )
    labelled = config.labels != "none" and bool(about.classes)
    logger.info("%s", _described(opened))
    train = _split(opened, "train", labelled)
    return Splits(train, _split(opened, "val", labelled) if about.val and labelled else None)


def shrunk_to(source: Source) -> int:
    """The side to which the shorter side of larger images was shrunk when a cache was made of them;
    0 where images have their size."""
    while isinstance(source, Subset):
        source = source.source
    return source.about.size if isinstance(source, PixelFile) else 0


def _described(opened: _Opened) -> str:
    about = opened.about
    origin = f"decoded images of {about.root or about.source}"
    size = (
        f"{about.shrunk} of {len(opened.placement)} were shrunk to {about.size} px on the shorter "
        "side"
        if about.size
        else "in their own size"
    )
    return f"{opened.path}: {origin}, {size} (by {about.made_by})"


def _split(opened: _Opened, split: Split, labelled: bool) -> PixelFile:
    source = PixelFile.__new__(PixelFile)
    source._set(opened, split, labelled)
    return source


def _reopened(path: str, split: Split, labelled: bool, seal: bytes) -> PixelFile:
    """A pickled ``PixelFile``, in another process."""
    opened = _opened(Path(path))
    if opened.seal != seal:
        raise UserError(f"{path} was replaced since it was opened")
    return _split(opened, split, labelled)


# --- opening -------------------------------------------------------------------------------------


def _opened(path: Path) -> _Opened:
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{path} does not exist (from {Path.cwd()}); --data.root names the cache, and {_MAKES}"
        )
    if kind != "file":
        what = "a folder" if kind == "folder" else "a pipe, a socket or a device"
        raise UserError(
            f"{path} is {what}, and data.source cache takes a file, which --data.root names; "
            f"{_MAKES}, and data.source folder takes folders"
        )
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(START)
            header = unpack_header(head)
            if header is None:
                what = "is empty" if not size else "is no cache of decoded images"
                raise UserError(f"{path} {what}; {_MAKES}")
            _check_header(path, header, size)
            file.seek(header.index_offset)
            data = file.read(header.index_bytes)
            if seal_of(head, data) != header.seal or head[HEADER.size :].strip(b"\0"):
                raise UserError(f"the index of {path} is damaged: its checksum differs; {_AGAIN}")
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, OverflowError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {reason_and_remedy(error)}") from None
    pixels = np.frombuffer(memory, np.uint8)[START : header.index_offset]
    try:
        index = Index.from_npz(data)
        about = About.from_json(index.about.tobytes())
        placement = placement_of(index.sizes)
        if int(padded(placement[:, 1] * placement[:, 2] * 3).sum()) != len(pixels):
            raise ValueError("its images have other sizes than the file")
    except DAMAGED as error:
        raise UserError(f"{path} is no cache that works: {reason_of(error)}; {_AGAIN}") from None
    if not about.train:
        raise UserError(f"{path} holds no images for training; {_MAKES}")
    intact = np.frombuffer(mmap.mmap(-1, len(placement)), np.bool_)
    ends = ends_of(index.names)
    text = os.fspath(path)
    return _Opened(text, header.seal, about, index, memory, pixels, placement, ends, intact)


def _check_header(path: Path, header: Header, size: int) -> None:
    if header.version != VERSION:
        raise UserError(
            f"{path} has version {header.version} of the format, and sacl-fast {__version__} reads "
            f"version {VERSION}; a version of sacl-fast like the one that wrote it works, and "
            f"{_AGAIN}"
        )
    end = header.index_offset + header.index_bytes
    if header.start != START or header.index_offset < START or end != size:
        changed = "was cut, or more was written to it" if header.start == START else "is damaged"
        raise UserError(f"{path} has {size} bytes, and {end} by its header: it {changed}; {_AGAIN}")


def is_cut(memory: mmap.mmap) -> bool:
    """Whether a file that is mapped from its start became shorter than that."""
    return memory.size() < len(memory)


def is_cache(path: Path) -> bool:
    """Whether the file ``path`` begins as such a file does."""
    try:
        with open(path, "rb") as file:
            return unpack_header(file.read(HEADER.size)) is not None
    except OSError:
        return False
