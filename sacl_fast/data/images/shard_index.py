"""Where the members of a shard lie: its index, in DALI's format (``wds2idx``).

An index beside a shard (``.idx`` for ``.tar``) was made by ``sacl-fast index`` or by DALI's tool,
or came with the shard. It is used if it is not older than the shard and agrees with it, as far as
that can be told without reading the shard. Otherwise the shard is read, and its index is kept in
the cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from sacl_fast.data.images.cache import cache_key, make_part
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.data.images.decode import BadImage, read_bytes
from sacl_fast.data.images.tar import BLOCK, WholeTar, unended
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import kind_of, whole_file

logger = logging.getLogger(__name__)

_VERSION = "v1.2"
_WIDTHS = {"v1.1": 3, _VERSION: 4}
_LARGEST = 2**32  # bytes of an index
_CHECKSUM = 65  # bytes at the end of an index in the cache: a line


class Member(NamedTuple):
    """A file within a shard."""

    extension: str
    offset: int
    size: int
    name: str


Sample = list[Member]


def find_shards(root: Path) -> list[Path]:
    """The shard ``root``, or those in the folder ``root``, sorted."""
    if kind_of(root) != "folder":
        return [root]
    try:
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {reason_and_remedy(error)}") from None
    shards = [root / name for name in names if name.lower().endswith(".tar")]
    if not shards:
        raise UserError(f"no shards in {root}: files that end in .tar count")
    return shards


def shard_index(shard: Path, cache: Path) -> list[Sample]:
    """The samples of a shard: by the index beside it, by the one in the cache, or by reading the
    shard.

    Raises:
        UserError: the shard cannot be read, or is not whole.
    """
    size, mtime_ns = _look_at(shard)
    beside, why = shard.with_suffix(".idx"), None
    if os.path.exists(beside) and beside.stat().st_mtime_ns >= mtime_ns:
        try:
            samples = _parsed(read_bytes(str(beside), _LARGEST))
            with shard.open("rb") as file:
                if not _check(samples, file, size):
                    logger.warning("%s", unended(shard))
            return samples
        except (BadImage, *DAMAGED) as error:
            why = reason_of(error)
    key = cache_key(os.path.realpath(shard), size, mtime_ns)
    kept = cache / "shards" / f"{shard.stem[:40]}-{key}.idx"
    if (samples := _kept(kept)) is None:
        samples, ended = _read(shard)
        if ended:  # else every run says so
            _keep(samples, shard, cache, kept)
    if why is not None:
        logger.warning(
            "not using the index %s (%s), but reading the shard; sacl-fast index makes it anew",
            *(beside, why),
        )
    return samples


def _keep(samples: Sequence[Sample], shard: Path, cache: Path, kept: Path) -> None:
    data = _text(samples)
    try:
        make_part(cache, "shards")
        with whole_file(kept) as file:
            file.write(data + _checksum(data))
    except OSError as error:
        logger.warning("cannot keep the index of %s: %s", shard, reason_of(error))


def index_shards(root: Path) -> Iterator[Path]:
    """Write the index of every shard at ``root`` beside it; yields the indices."""
    for shard in find_shards(root):
        path = shard.with_suffix(".idx")
        data = _text(_read(shard)[0])
        try:
            with whole_file(path) as file:
                file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason_and_remedy(error)}") from None
        yield path


def _look_at(shard: Path) -> tuple[int, int]:
    """Size and time of modification of a shard."""
    kind = kind_of(shard)
    if kind != "file":
        what = {None: "leads to nothing", "folder": "is a folder", "other": "is no file"}[kind]
        raise UserError(f"the shard {shard} {what}; a .tar file works")
    status = shard.stat()
    return status.st_size, status.st_mtime_ns


# --- DALI's format -------------------------------------------------------------------------------


def _text(samples: Sequence[Sample]) -> bytes:
    """Version and count, then a line a sample of (extension, offset, size, name)."""
    lines = [f"{_VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in s) for s in samples]
    return os.fsencode("\n".join(lines) + "\n")


def _parsed(data: bytes) -> list[Sample]:
    """ValueError for what is no index."""
    head, *lines = os.fsdecode(data).removesuffix("\n").split("\n")
    version, count = head.split()
    if version not in _WIDTHS or int(count) != len(lines):
        raise ValueError(f"it begins with {head[:40]!r} and has {len(lines)} samples")
    return [list(_members(line.split(" "), _WIDTHS[version])) for line in lines]


def _members(fields: list[str], width: int) -> Iterator[Member]:
    if len(fields) % width:
        raise ValueError(f"a line of {len(fields)} fields")
    for i in range(0, len(fields), width):
        name = fields[i + 3] if width == 4 else ""
        yield Member(fields[i], int(fields[i + 1]), int(fields[i + 2]), name)


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode() + b"\n"


def _kept(path: Path) -> list[Sample] | None:
    """The index in the cache, or None where there is none or it is damaged."""
    if not os.path.exists(path):
        return None
    try:
        data = read_bytes(str(path), _LARGEST)
        text, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
        if checksum != _checksum(text):
            raise ValueError("its checksum is another")
        return _parsed(text)
    except (BadImage, *DAMAGED) as error:
        logger.warning("ignoring the unreadable index %s: %s", path, reason_of(error))
        return None


# --- the shard -----------------------------------------------------------------------------------


def _read(shard: Path) -> tuple[list[Sample], bool]:
    """The samples, neighbours of one name, as WebDataset groups them; and whether the shard has an
    end. Says so where not."""
    samples: list[Sample] = []
    last, passed = None, 0
    _look_at(shard)
    try:
        file = shard.open("rb")
    except OSError as error:
        raise UserError(f"cannot read the shard {shard}: {reason_and_remedy(error)}") from None
    try:
        with file:
            whole = WholeTar(file, plain=True)
            for entry in whole:
                parts = _parts(entry.name)
                if parts is None or not _counts(entry):
                    passed += parts is not None and not entry.isdir()
                    continue
                key, extension = parts
                if key != last:
                    samples.append([])
                last = key
                name = _in_one_field(entry.name)
                samples[-1].append(
                    Member(_in_one_field(extension), entry.offset_data, entry.size, name)
                )
    except DAMAGED as error:
        raise UserError(
            f"{shard} is no readable shard: {reason_of(error)}; a whole, uncompressed .tar works"
        ) from None
    if passed:
        logger.warning("%s: skipped %d members that are links, or no plain files", shard, passed)
    if not whole.ended:
        logger.warning("%s", unended(shard))
    return samples, whole.ended


def _parts(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member by the convention: the first dot of the file's name parts them.
    None for names that do not count: hidden ones, and those without a dot."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}/{stem}", extension.lower()) if stem and dot else None


def _counts(entry: tarfile.TarInfo) -> bool:
    """Whether an index has the member."""
    return entry.isreg() and not entry.issparse() and _parts(entry.name) is not None


def _in_one_field(text: str) -> str:
    """A text without what would break a line of an index."""
    return text.replace(" ", "_").replace("\n", "_")


def _check(samples: Sequence[Sample], file: BinaryIO, size: int) -> bool:
    """Whether the shard ``file`` of ``size`` bytes has an end. ValueError where the index cannot be
    its.

    Members follow each other, a header before each. The gaps between them are alike but for a few,
    and in those few, and before the first and after the last member, headers are read: a member
    that the index does not have would be there.
    """
    members = [member for sample in samples for member in sample]
    for member in members:
        parts = _parts(member.name)
        if member.name and (parts is None or _in_one_field(parts[1]) != member.extension):
            raise ValueError(f"it calls {member.name} a {member.extension}")
    offsets = np.array([0, *(member.offset for member in members)], np.int64)
    sizes = np.array([0, *(member.size for member in members)], np.int64)
    ends = offsets + -(-sizes // BLOCK) * BLOCK
    if (sizes < 0).any() or (offsets % BLOCK).any() or (ends < offsets).any() or ends[-1] > size:
        raise ValueError(f"it names members outside the shard of {size} bytes")
    gaps = offsets[1:] - ends[:-1]
    if (gaps < BLOCK).any():
        raise ValueError("it names members that overlap")
    usual = Counter(gaps.tolist()).most_common(1)[0][0] if len(gaps) else 0
    for i in np.flatnonzero((gaps != usual) | (np.arange(len(gaps)) % 1000 == 0)).tolist():
        file.seek(int(ends[i]))
        found = next(filter(_counts, WholeTar(file, plain=True)), None)
        if not found or (found.offset_data, found.size) != (offsets[i + 1], sizes[i + 1]):
            raise ValueError(f"it does not know what follows byte {ends[i]}")
    file.seek(int(ends[-1]))
    rest = WholeTar(file, plain=True)
    if any(map(_counts, rest)):
        raise ValueError("it ends before the shard does")
    return rest.ended
