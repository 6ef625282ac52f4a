"""The listing of an image folder, made once and kept.

Walking a folder of a million files takes seconds on a local disk and minutes on a network one,
so a large listing is cached. It is valid while no directory of the tree changed: files that come,
go or are renamed change the modification time of their directory, so a stat of every directory
says it all.

In memory a listing is three arrays and the folder names instead of a million ``str``: worker
processes share its pages, because nothing in it has a reference count to touch, and it is pickled
at the speed of a copy.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sacl_fast.data.cache import cache_key
from sacl_fast.errors import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")
_SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)

_VERSION = 1
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError)
# A directory changed within the clock's granularity of being listed may change again and keep its
# modification time: such a listing is not kept.
_SETTLED_NS = 100_000_000


@dataclass(frozen=True, eq=False)
class Manifest:
    """The N image files below ``root``, folder by folder, names sorted within each.

    ``folders`` are all directories of the tree, depth first and sorted, as POSIX paths relative
    to ``root`` (its own is "").
    """

    root: str
    folders: tuple[str, ...]
    counts: np.ndarray  # (F,) int64: images directly in each folder
    names: np.ndarray  # (bytes,) uint8: the file names, each ended by a zero
    ends: np.ndarray  # (N,) int64: where those zeros are

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def folder_of(self) -> np.ndarray:
        """(N,) int32: the folder of every file."""
        return np.repeat(np.arange(len(self.folders), dtype=np.int32), self.counts)

    def name(self, index: int) -> str:
        """The name of file ``index`` in its folder."""
        start = self.ends[index - 1] + 1 if index > 0 else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())

    def paths(self) -> Iterator[str]:
        """Every file as a POSIX path relative to ``root``, in order."""
        for index, folder in enumerate(self.folder_of):
            yield _join(self.folders[folder], self.name(index))


def list_images(root: Path, cache: Path | None = None, cache_from: int = 10_000) -> Manifest:
    """The image files below ``root``: from the cache folder ``cache`` if it holds a valid listing,
    else from the disk. Listings of ``cache_from`` files and more are kept there.

    Hidden files and folders are skipped, symbolic links to folders followed. A folder that cannot
    be read is a UserError; an unusable cache is not.
    """
    path = os.path.abspath(root)
    name = f"{os.path.basename(path)[:40]}-{cache_key(path)}.npz"
    kept = cache / "listings" / name if cache else None
    if kept and (manifest := _load(kept, path)):
        return manifest
    began, ticks = time.time_ns(), time.perf_counter()
    found = sorted(_walk(path), key=lambda folder: folder.path.split("/"))
    manifest = _manifest(path, found)
    seconds = time.perf_counter() - ticks
    logger.info("listed %d images below %s in %.1f s", len(manifest), path, seconds)
    settled = max(folder.mtime_ns for folder in found) < began - _SETTLED_NS
    if kept and settled and len(manifest) >= cache_from:
        _save(kept, manifest, [folder.mtime_ns for folder in found])
    return manifest


class _Folder(NamedTuple):
    path: str
    mtime_ns: int
    names: list[str]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _walk(root: str, path: str = "", above: frozenset[tuple[int, int]] = frozenset()):
    """Every folder at and below ``path``. ``above`` identifies the folders that lead there: a link
    back to one of them would never end."""
    absolute = os.path.join(root, path) if path else root
    try:
        status = os.stat(absolute)  # before the listing: a change during it is seen next time
        with os.scandir(absolute) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {absolute}: {error.strerror}") from None
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    names, folders = [], []
    for entry in visible:
        if entry.is_dir():
            folders.append(entry.name)
        elif entry.name.lower().endswith(_SUFFIXES) and (entry.is_file() or entry.is_symlink()):
            names.append(entry.name)  # a broken link too: it is reported when it is read
    yield _Folder(path, status.st_mtime_ns, sorted(names))
    for name in folders:
        yield from _walk(root, _join(path, name), above | {identity})


def _manifest(root: str, found: list[_Folder]) -> Manifest:
    joined = b"".join(os.fsencode(name) + b"\0" for folder in found for name in folder.names)
    names = np.frombuffer(joined, np.uint8)
    counts = np.array([len(folder.names) for folder in found], np.int64)
    return Manifest(root, tuple(folder.path for folder in found), counts, names, _ends(names))


def _ends(names: np.ndarray) -> np.ndarray:
    return np.flatnonzero(names == 0)


def _save(file: Path, manifest: Manifest, mtimes_ns: list[int]) -> None:
    folders = "\0".join(manifest.folders)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            try:
                np.savez(
                    temporary,
                    version=_VERSION,
                    folders=np.frombuffer(os.fsencode(folders), np.uint8),
                    mtimes_ns=np.array(mtimes_ns, np.int64),
                    counts=manifest.counts,
                    names=manifest.names,
                )
                temporary.close()
                os.replace(temporary.name, file)
            except BaseException:
                os.unlink(temporary.name)
                raise
    except OSError as error:
        logger.warning("cannot keep the listing of %s: %s", manifest.root, error)


def _load(file: Path, root: str) -> Manifest | None:
    """The kept listing of ``root``, or None where there is none or the tree changed since."""
    if not os.path.exists(file):
        return None
    try:
        with np.load(file) as data:
            if data["version"] != _VERSION:
                return None
            folders = tuple(os.fsdecode(data["folders"].tobytes()).split("\0"))
            mtimes_ns, counts, names = data["mtimes_ns"], data["counts"], data["names"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, *_BROKEN_ZIP) as error:
        logger.warning("ignoring the unreadable listing %s: %s", file, error)
        return None
    ends = _ends(names)
    if not len(folders) == len(mtimes_ns) == len(counts) or counts.sum() != len(ends):
        logger.warning("ignoring the inconsistent listing %s", file)
        return None
    try:
        for folder, mtime_ns in zip(folders, mtimes_ns.tolist(), strict=True):
            if os.stat(os.path.join(root, folder)).st_mtime_ns != mtime_ns:
                return None
    except OSError:
        return None  # a folder went away
    return Manifest(root, folders, counts, names, ends)
