"""The file of decoded images that ``sacl-fast cache`` writes and ``pixel_file.py`` reads.

::

    0      header, 64 bytes: magic, version, start of the pixels, start and size of the index, seal
    4096   pixels: image after image, (height, width, 3) uint8, each at a multiple of 64 bytes
           index: NumPy's .npz with an array for each field of ``Index``

Numbers in the header are little-endian. The seal is a BLAKE2b digest of the rest of the header and
of the index, and the file ends with the index, so a file that was cut or whose index was altered is
told when it is opened. Pixels have a CRC-32 an image, which is compared when an image is first
read: an image is the block that can be damaged.

Of N images in all, those for training come first, then those for validation.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from sacl_fast.data.images.manifest import ends_of, packed

MAGIC = b"\x89SACLPX\n"
VERSION = 1
START = 4096
"""Where the pixels begin."""
ALIGNMENT = 64
HEADER = struct.Struct("<8sIIQQ32s")


@dataclass(frozen=True, eq=False)
class About:
    """What a cache was made of, and how."""

    train: int
    """Images for training."""
    val: int | None
    """Images for validation; None where there is no such split."""
    classes: tuple[str, ...]
    size: int
    """The shorter side of larger images was shrunk to this; 0: every image has its size."""
    shrunk: int
    """How many images were."""
    source: str
    """``data.source`` that was read."""
    root: str
    """What all names begin with."""
    made_by: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> About:
        """ValueError, TypeError or LookupError for what is not of this class."""
        values = json.loads(data)
        about = cls(**{**values, "classes": tuple(values["classes"])})
        counts = (about.train, about.val or 0, about.size, about.shrunk)
        texts = (*about.classes, about.source, about.root, about.made_by)
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("it counts other than in whole numbers")
        if not all(type(text) is str for text in texts):
            raise ValueError("a name in it is no text")
        return about


@dataclass(frozen=True, eq=False)
class Index:
    """All but the pixels of N images."""

    about: np.ndarray  # (bytes,) uint8: ``About`` as JSON
    sizes: np.ndarray  # (N, 2) uint32: height, width; 0, 0 of unreadable ones
    checksums: np.ndarray  # (N,) uint32: CRC-32 of the pixels
    labels: np.ndarray  # (N,) int32, -1 without
    names: np.ndarray  # (bytes,) uint8: packed as those of a ``Manifest``
    bad: np.ndarray  # (B,) int64: the unreadable images, in order
    reasons: np.ndarray  # (bytes,) uint8: why each of them is, packed

    def to_npz(self) -> bytes:
        file = io.BytesIO()
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        return file.getvalue()

    @classmethod
    def from_npz(cls, data: bytes) -> Index:
        """One of ``DAMAGED`` for what is none."""
        with np.load(io.BytesIO(data)) as file:
            index = cls(**{field.name: file[field.name] for field in fields(cls)})
        index.check()
        return index

    def check(self) -> None:
        """ValueError where the arrays do not belong together."""
        about, count = About.from_json(self.about.tobytes()), len(self.sizes)
        if count != about.train + (about.val or 0):
            raise ValueError(f"it has the sizes of {count} images, and counts others")
        expected = {
            "about": (np.uint8, self.about.shape[:1]),
            "sizes": (np.uint32, (count, 2)),
            "checksums": (np.uint32, (count,)),
            "labels": (np.int32, (count,)),
            "names": (np.uint8, self.names.shape[:1]),
            "bad": (np.int64, (int((self.sizes[:, 0] == 0).sum()),)),
            "reasons": (np.uint8, self.reasons.shape[:1]),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"its {name} are {array.dtype} {array.shape}")
        if len(ends_of(self.names)) != count or len(ends_of(self.reasons)) != len(self.bad):
            raise ValueError("it has another number of names or reasons than of images")
        if not np.array_equal(self.bad, np.flatnonzero(self.sizes[:, 0] == 0)):
            raise ValueError("it names other images unreadable than those without pixels")
        if ((self.sizes == 0).any(1) != (self.sizes == 0).all(1)).any():
            raise ValueError("it has an image with one side")
        low = -1 if not about.classes else 0
        if ((self.labels < low) | (self.labels >= max(len(about.classes), low + 1))).any():
            raise ValueError("it has labels that are no classes")


class Header(NamedTuple):
    version: int
    start: int
    index_offset: int
    index_bytes: int
    seal: bytes


def pack_header(index_offset: int, index: bytes) -> bytes:
    """The header of a file whose ``index`` lies at ``index_offset``, with its seal."""
    unsealed = HEADER.pack(MAGIC, VERSION, START, index_offset, len(index), b"")
    return unsealed[:-32] + seal_of(unsealed, index)


def unpack_header(data: bytes) -> Header | None:
    """None where ``data``, the first bytes of a file, is not the header of such a one."""
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        return None
    return Header(*HEADER.unpack_from(data)[1:])


def seal_of(header: bytes, index: bytes) -> bytes:
    """32 bytes that stand for a header, whatever its seal, and an index."""
    return hashlib.blake2b(header[: HEADER.size - 32] + index, digest_size=32).digest()


def padded(count: Any) -> Any:
    """``count`` bytes, or an array of such counts, with those up to the next image."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def placement_of(sizes: np.ndarray) -> np.ndarray:
    """(N, 3) int64: offset among the pixels, height and width, by sizes (N, 2); zeros for an
    unreadable image."""
    sizes = sizes.astype(np.int64)
    room = padded(sizes[:, 0] * sizes[:, 1] * 3)
    offsets = np.where(room > 0, np.cumsum(room) - room, 0)
    return np.column_stack((offsets, sizes))


def one_line(texts: Sequence[str]) -> np.ndarray:
    """``texts`` packed; a zero byte in one, which would end it, becomes a question mark."""
    return packed(text.replace("\0", "?") for text in texts)
