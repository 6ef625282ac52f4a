"""The cache folder on disk: where it is, and a lock for what several processes make in it.

Listings (``manifest.py``) and unpacked archives (``archives.py``) are kept there between runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder(given: str | None) -> Path:
    """``given``, or ``sacl-fast`` in the user's cache folder. Not created here."""
    if given is not None:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "sacl-fast"


def cache_key(*parts: object) -> str:
    """16 hexadecimal digits that stand for ``parts``."""
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[bool]:
    """Hold the lock file ``lock`` among all processes of this machine; it vanishes with its holder.

    Yields False where the file system knows no locks: the work is then done unprotected.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError as error:
            logger.warning("cannot lock %s (%s); going on without", lock, error)
            held = False
        yield held
