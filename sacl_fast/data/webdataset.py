"""WebDataset shards: .tar files of images, read where they are, by offset.

An image and its label are neighbours that share a name: ``0001.jpg``, ``0001.cls`` (the position of
the class, or its name, as text). What else a sample has does not matter here.

The index of a shard says where its members lie. It is DALI's own (``wds2idx``): beside the shard,
``.idx`` for ``.tar``, made by ``sacl-fast index`` or by DALI's tool. A shard without a valid index
is indexed when it is opened, and the index kept in the cache folder.
"""

from __future__ import annotations

import logging
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sacl_fast.data.cache import cache_key
from sacl_fast.data.decode import BadImage, decode_rgb
from sacl_fast.data.manifest import EXTENSIONS
from sacl_fast.errors import UserError

logger = logging.getLogger(__name__)

_VERSION = "v1.2"
_LABEL = "cls"


class Member(NamedTuple):
    """A file within a shard."""

    extension: str
    offset: int
    size: int
    name: str


Sample = list[Member]


class WebDatasetSource:
    """The N images of some shards."""

    decoded = False

    def __init__(
        self,
        shards: Sequence[Path],
        shard_of: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
    ) -> None:
        self.shards = tuple(map(str, shards))
        self.shard_of, self.offsets, self.sizes = shard_of, offsets, sizes
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.offsets)

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index))

    def read(self, index: int) -> bytes:
        size = int(self.sizes[index])
        try:
            with open(self.shards[self.shard_of[index]], "rb") as file:
                file.seek(int(self.offsets[index]))
                data = file.read(size)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImage("the shard ends before it")
        return data

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard_of[index]]}@{self.offsets[index]}"

    def identity(self, index: int) -> bytes:
        shard = os.path.basename(self.shards[self.shard_of[index]])
        return os.fsencode(f"{shard}\0{self.offsets[index]}\0{self.sizes[index]}")


def find_shards(root: Path) -> list[Path]:
    """The shard ``root``, or those in the folder ``root``, sorted."""
    shards = sorted(root.glob("*.tar")) if root.is_dir() else [root]
    if not shards:
        raise UserError(f"no shards in {root}: files that end in .tar count")
    return shards


def open_shards(root: Path, cache: Path, classes: tuple[str, ...] | None) -> WebDatasetSource:
    """The images of the shards at ``root``. ``classes``: those that labels may name; (): no labels;
    None: all that occur, where every image has one."""
    shards = find_shards(root)
    rows, names = [], []
    for number, shard in enumerate(shards):
        labels = []
        for sample in shard_index(shard, cache):
            image = next(member for member in sample if member.extension in EXTENSIONS)
            rows.append((number, image.offset, image.size))
            labels.append(next((m for m in sample if m.extension == _LABEL), None))
        if classes != ():
            names += _texts(shard, labels)
    if not rows:
        raise UserError(
            f"no images in the shards of {root}: files in them that end in "
            f"{', '.join(EXTENSIONS)} count"
        )
    shard_of, offsets, sizes = np.array(rows, np.int64).T
    if classes is None:
        found = set(names)
        classes = () if None in found or len(found) < 2 else tuple(sorted(found, key=_natural))
    position = {name: i for i, name in enumerate(classes)}
    if classes and (unknown := sorted(set(map(str, names)) - position.keys())):
        raise UserError(
            f"the shards of {root} have images of class {', '.join(unknown[:5])}, which those for "
            "training have not; data.labels none works (no kNN evaluation)"
        )
    labels = [position[name] for name in names] if classes else [-1] * len(rows)
    return WebDatasetSource(shards, shard_of, offsets, sizes, np.array(labels, np.int64), classes)


def _natural(name: str) -> tuple[int, str]:
    """Numbers in their order, before words."""
    return (int(name), "") if name.isdecimal() else (2**62, name)


def _texts(shard: Path, members: Sequence[Member | None]) -> list[str | None]:
    with shard.open("rb") as file:
        found = []
        for member in members:
            if member is not None:
                file.seek(member.offset)
            text = None if member is None else file.read(member.size).decode(errors="replace")
            found.append(text if text is None else text.strip())
        return found


# --- the index -----------------------------------------------------------------------------------


def shard_index(shard: Path, cache: Path) -> list[Sample]:
    """The samples of a shard that have an image: by the index beside it, by the one in the cache,
    or by reading the shard, which then is kept in the cache."""
    status = shard.stat()
    key = cache_key(shard.resolve(), status.st_size, status.st_mtime_ns)
    kept = cache / "shards" / f"{shard.stem[:40]}-{key}.idx"
    beside = shard.with_suffix(".idx")
    if beside.exists() and beside.stat().st_mtime_ns >= status.st_mtime_ns:
        samples = _read_index(beside)
    elif kept.exists():
        samples = _read_index(kept)
    else:
        samples = list(_samples(shard))
        try:
            write_index(samples, kept)
        except OSError as error:
            logger.warning("cannot keep the index of %s: %s", shard, error)
    return [s for s in samples if any(m.extension in EXTENSIONS for m in s)]


def index_shards(root: Path) -> Iterator[Path]:
    """Write the index of every shard at ``root`` beside it; yields the indices."""
    for shard in find_shards(root):
        path = shard.with_suffix(".idx")
        try:
            write_index(list(_samples(shard)), path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        yield path


def write_index(samples: Sequence[Sample], path: Path) -> None:
    """DALI's format: version and count, then a line a sample of (extension, offset, size, name)."""
    lines = [f"{_VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in s) for s in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, delete=False, encoding="utf-8", errors="surrogateescape"
    ) as file:
        try:
            file.write("\n".join(lines) + "\n")
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _read_index(path: Path) -> list[Sample]:
    try:
        head, *lines = path.read_text("utf-8", "surrogateescape").splitlines()
        version, count = head.split()
        if version not in ("v1.1", _VERSION) or int(count) != len(lines):
            raise ValueError(f"it begins with {head!r}")
        return [list(_members(line.split(" "), 4 if version == _VERSION else 3)) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"the index {path} cannot be used ({error}); sacl-fast index {path.parent} makes it "
            "anew, and without it the shard is read"
        ) from None


def _members(fields: list[str], width: int) -> Iterator[Member]:
    if len(fields) % width:
        raise ValueError(f"a line of {len(fields)} fields")
    for i in range(0, len(fields), width):
        yield Member(
            fields[i], int(fields[i + 1]), int(fields[i + 2]), "".join(fields[i + 3 : i + width])
        )


def _samples(shard: Path) -> Iterator[Sample]:
    """Neighbours of one name, as WebDataset groups them."""
    sample: Sample = []
    last = None
    try:
        with tarfile.open(shard, "r:") as file:
            for entry in file:
                base = os.path.basename(entry.name)
                if not entry.isfile() or base.startswith(".") or "." not in base:
                    continue
                stem, _, extension = base.partition(".")
                key = os.path.join(os.path.dirname(entry.name), stem)
                if key != last and sample:
                    yield sample
                    sample = []
                last = key
                name = entry.name.replace(" ", "_").replace("\n", "_")
                extension = extension.lower().replace(" ", "_")
                sample.append(Member(extension, entry.offset_data, entry.size, name))
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard} is no readable shard: {error}; an uncompressed .tar works"
        ) from None
    if sample:
        yield sample
