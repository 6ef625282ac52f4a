"""The cache folder on disk: where it is, whom it can be trusted to, and a lock for what several
processes make in it.

Listings (``manifest.py``), unpacked archives (``archives.py``) and indices (``shard_index.py``) are
kept there between runs. Whoever can write there decides what is trained on, so a cache that others
can write, or that belongs to somebody else, is not used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import user_path

logger = logging.getLogger(__name__)

Part = Literal["listings", "shards", "unpacked"]
_PARTS: tuple[Part, ...] = ("listings", "shards", "unpacked")


def cache_folder(given: str | None) -> Path:
    """``given``, or ``sacl-fast`` in the user's cache folder, or, where that cannot be trusted or
    the user has no home, a folder of this user's own for temporary files. Not created here.

    Raises:
        UserError: ``given``, or the last resort, cannot be trusted.
    """
    if given is not None:
        folder = user_path(given, "data.cache_dir")
        if why := _distrusted(folder):
            raise UserError(
                f"data.cache_dir is {folder}: {why}, so others decide what would be trained on; a "
                "folder that belongs to you and that only you can write works"
            )
        return folder
    try:
        home = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")
    except UserError:  # no home
        return _temporary()
    folder = home / "sacl-fast"
    if why := _distrusted(folder):
        instead = _temporary()
        logger.warning("not using the cache folder %s: %s; using %s", folder, why, instead)
        return instead
    return folder


def _temporary() -> Path:
    folder = Path(tempfile.gettempdir(), f"sacl-fast-{os.getuid()}")
    if why := _distrusted(folder, links=False):
        raise UserError(f"there is no cache folder: {folder}: {why}; data.cache_dir names another")
    return folder


def _distrusted(folder: Path, links: bool = True) -> str:
    """Why ``folder`` is not to be trusted with what is kept in it, "" where it is."""
    for path in (folder, *(folder / part for part in _PARTS)):
        try:
            status = path.stat() if links else path.lstat()
        except OSError:
            continue  # it is not there, or whoever needs it will say why it cannot be had
        if status.st_uid not in (os.getuid(), 0):
            return f"{path} belongs to user {status.st_uid}"
        if status.st_mode & stat.S_IWOTH and stat.S_ISDIR(status.st_mode):
            return f"everybody can write {path} (mode {stat.S_IMODE(status.st_mode):o})"
        if stat.S_ISLNK(status.st_mode):
            return f"{path} is a link"
    return ""


def make_part(cache: Path, part: Part) -> Path:
    """The folder ``part`` of the cache folder ``cache``, made for this user alone where it is not
    there."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.mkdir(mode=0o700, exist_ok=True)
    folder = cache / part
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def cache_key(*parts: object) -> str:
    """16 hexadecimal digits that stand for ``parts``."""
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[bool]:
    """Hold the lock file ``lock``, in a folder that exists, among all processes of this machine;
    the lock ends with its holder.

    Yields False where the file system knows no locks: the work is then done unprotected.

    Raises:
        OSError: it cannot be opened, as where it is a link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(lock, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
        except OSError as error:
            logger.warning("cannot lock %s (%s); going on without", lock, reason_of(error))
            held = False
        yield held
    finally:
        os.close(descriptor)
