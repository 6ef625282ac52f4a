"""The listing of an image folder, made once and kept.

Walking a folder of a million files takes seconds on a local disk and minutes on a network one,
so a large listing is cached. It is valid while no directory of the tree changed: files that come,
go or are renamed change the times of their directory, so a stat of every directory says it all. A
listing that is damaged, or that names what no listing can name, is made anew.

In memory a listing is three arrays and the folder names instead of a million ``str``: worker
processes share its pages, because nothing in it has a reference count to touch, and it is pickled
at the speed of a copy.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.data.images.cache import cache_key, make_part
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import whole_file

logger = logging.getLogger(__name__)

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")
_SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)

# Kinds of images that are not read, whose being skipped is worth more than a note.
_UNREAD = (
    *(
        "heic",
        "heif",
        "avif",
        "jxl",
        "jp2",
        "j2k",
        "jpe",
        "jfif",
        "tga",
        "svg",
        "psd",
        "exr",
        "hdr",
    ),
    *("dng", "cr2", "cr3", "nef", "arw", "raw", "dcm", "nii", "npy", "pbm", "pnm", "mpo", "ico"),
)

_VERSION = 2
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
    skipped: tuple[tuple[str, int], ...] = ()  # kinds of other files (".heic"), and how many

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def folder_of(self) -> np.ndarray:
        """(N,) int32: the folder of every file."""
        return np.repeat(np.arange(len(self.folders), dtype=np.int32), self.counts)

    def name(self, index: int) -> str:
        """The name of file ``index`` in its folder."""
        return unpacked(self.names, self.ends, index)

    def paths(self) -> Iterator[str]:
        """Every file as a POSIX path relative to ``root``, in order."""
        for index, folder in enumerate(self.folder_of):
            yield _join(self.folders[folder], self.name(index))


def packed(names: Iterable[str]) -> np.ndarray:
    """(bytes,) uint8: the names, each ended by a zero."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def ends_of(names: np.ndarray) -> np.ndarray:
    """(N,) int64: where the zeros of packed names are."""
    return np.flatnonzero(names == 0)


def unpacked(names: np.ndarray, ends: np.ndarray, index: int) -> str:
    """One of the packed ``names``."""
    start = ends[index - 1] + 1 if index > 0 else 0
    return os.fsdecode(names[start : ends[index]].tobytes())


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
        return _told(manifest)
    began, ticks = time.time_ns(), time.perf_counter()
    found = sorted(_walk(path), key=lambda folder: folder.path.split("/"))
    manifest = _manifest(path, found)
    seconds = time.perf_counter() - ticks
    logger.info("listed %s below %s in %.1f s", counted(len(manifest), "image"), path, seconds)
    settled = max(folder.times_ns[0] for folder in found) < began - _SETTLED_NS
    if cache and kept and settled and len(manifest) >= cache_from:
        try:
            make_part(cache, "listings")
            _save(kept, manifest, [folder.times_ns for folder in found])
        except OSError as error:
            logger.warning("cannot keep the listing of %s: %s", path, reason_of(error))
    return _told(manifest)


def _told(manifest: Manifest) -> Manifest:
    if manifest.skipped:
        images = any(kind[1:] in _UNREAD for kind, _ in manifest.skipped)
        logger.log(
            logging.WARNING if images else logging.INFO,
            "skipped %s below %s, no images by name: %s (images end in %s)",
            counted(sum(count for _, count in manifest.skipped), "file"),
            manifest.root,
            describe_kinds(manifest.skipped),
            ", ".join(EXTENSIONS),
        )
    return manifest


def describe_kinds(kinds: Sequence[tuple[str, int]], show: int = 6) -> str:
    more = f" and {len(kinds) - show} more kinds" if len(kinds) > show else ""
    shown = [f"{count} {kind or 'without an ending'}" for kind, count in kinds[:show]]
    return ", ".join(shown) + more


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(_SUFFIXES)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, links followed; no where that cannot be told."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where we may not look
        return False


class _Folder(NamedTuple):
    path: str
    times_ns: tuple[int, int]  # of modification and of change: the latter cannot be set back
    names: list[str]
    skipped: Counter[str]


def _times(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_ctime_ns


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _walk(root: str) -> Iterator[_Folder]:
    """Every folder at and below ``root``. A link back to a folder that leads there is not followed:
    it would never end."""
    ahead: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while ahead:
        path, above = ahead.pop()
        absolute = os.path.join(root, path) if path else root
        try:
            status = os.stat(absolute)  # before the listing: a change during it is seen next time
            with os.scandir(absolute) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(
                f"cannot read the folder {absolute}: {reason_and_remedy(error)}"
            ) from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        folder = _Folder(path, _times(status), [], Counter())
        for entry in visible:
            if is_folder(entry):
                ahead.append((_join(path, entry.name), above | {identity}))
            elif is_image(entry.name):  # a broken link and a pipe too: reported when they are read
                folder.names.append(entry.name)
            else:
                kind = "link to nothing" if _leads_nowhere(entry) else _kind(entry.name)
                folder.skipped[kind] += 1
        folder.names.sort()
        yield folder


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _manifest(root: str, found: list[_Folder]) -> Manifest:
    names = packed(name for folder in found for name in folder.names)
    counts = np.array([len(folder.names) for folder in found], np.int64)
    skipped = sum((folder.skipped for folder in found), Counter())
    folders = tuple(folder.path for folder in found)
    return Manifest(root, folders, counts, names, ends_of(names), tuple(skipped.most_common()))


# --- kept ----------------------------------------------------------------------------------------


def _save(file: Path, manifest: Manifest, times_ns: list[tuple[int, int]]) -> None:
    with whole_file(file) as written:
        np.savez(
            written,
            version=_VERSION,
            folders=packed(manifest.folders),
            times_ns=np.array(times_ns, np.int64),
            counts=manifest.counts,
            names=manifest.names,
            skipped=packed(kind for kind, _ in manifest.skipped),
            skipped_counts=np.array([count for _, count in manifest.skipped], np.int64),
        )


def _all_unpacked(names: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(names.tobytes()).split("\0")[:-1])


def _load(file: Path, root: str) -> Manifest | None:
    """The kept listing of ``root``, or None where there is none or the tree changed since."""
    if not os.path.exists(file):
        return None
    try:
        with np.load(file) as data:
            if data["version"] != _VERSION:
                return None
            folders, skipped = _all_unpacked(data["folders"]), _all_unpacked(data["skipped"])
            times_ns, counts, names = data["times_ns"], data["counts"], data["names"]
            skipped = tuple(zip(skipped, data["skipped_counts"].tolist(), strict=True))
        manifest = Manifest(root, folders, counts, names, ends_of(names), skipped)
        _check(manifest, times_ns)
    except DAMAGED as error:
        logger.warning("ignoring the unreadable listing %s: %s", file, reason_of(error))
        return None
    try:
        for folder, known in zip(folders, times_ns.tolist(), strict=True):
            if list(_times(os.stat(os.path.join(root, folder)))) != known:
                return None
    except OSError:
        return None  # a folder went away
    return manifest


def _check(manifest: Manifest, times_ns: np.ndarray) -> None:
    """ValueError for what cannot be a listing: counts that do not add up, paths that lead
    elsewhere."""
    folders, counts = manifest.folders, manifest.counts
    names, ends = manifest.names, manifest.ends
    if not (counts.dtype == times_ns.dtype == np.int64 and names.dtype == np.uint8):
        raise ValueError("it holds numbers of another kind")
    if counts.shape != (len(folders),) or times_ns.shape != (len(folders), 2) or names.ndim != 1:
        raise ValueError("it has another number of times or counts than of folders")
    if (counts < 0).any() or counts.sum() != len(ends) or (len(names) and names[-1] != 0):
        raise ValueError("it counts other than it names")
    if len(set(folders)) < len(folders) or folders[:1] != ("",):
        raise ValueError("it names a folder twice")
    # As of hidden ones, which are in no listing, a path upwards begins with a dot.
    if any(part[:1] in ("", ".") for folder in folders[1:] for part in folder.split("/")):
        raise ValueError("it names a folder elsewhere")
    first = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    if (names == ord("/")).any() or np.isin(names[first], (0, ord("."))).any():
        raise ValueError("it names a file elsewhere")
