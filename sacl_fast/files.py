"""Paths as users give them, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from sacl_fast.errors import UserError, reason_and_remedy

Kind = Literal["file", "folder", "other"]

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_TEMPORARY = ".tmp"


def user_path(given: str | os.PathLike[str], setting: str) -> Path:
    """The path that a user gave for ``setting`` (such as ``data.root``), ``~`` made a home folder.

    Raises:
        UserError: it is no path, is empty, holds a zero byte, or names an unknown home folder.
    """
    try:
        text = os.fsdecode(given)
    except TypeError:
        raise UserError(f"{setting} is {given!r}, no path; a text works") from None
    if not text:
        raise UserError(f"{setting} is empty; a path works")
    if "\0" in text:
        raise UserError(f"{setting} is {text!r}, which holds a zero byte; a path without one works")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user; no HOME and no entry for this user
        raise UserError(
            f"{setting} is {text}, but no home folder is known for "
            f"{text.partition('/')[0]}; a path without ~ works"
        ) from None


def user_cache() -> Path | None:
    """Where what can be found out again is kept for this user; None where no home is known. Not
    created here."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # its specification has others ignored
        return given / "sacl-fast"
    try:
        return Path("~/.cache/sacl-fast").expanduser()
    except RuntimeError:
        return None


def kind_of(path: Path) -> Kind | None:
    """What is at ``path``, links followed: ``other`` is a pipe, a socket or a device; None:
    nothing, or a link to nothing.

    Raises:
        UserError: it cannot be told: no permission, a name that is too long, links in a circle.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise UserError(f"cannot look at {_shown(path)}: {reason_and_remedy(error)}") from None
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"


def shown_names(folder: Path) -> set[str]:
    """What is in a folder, hidden files left out; nothing where there is no folder.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    except OSError as error:
        if error.errno in _ABSENT:
            return set()
        raise UserError(
            f"cannot read folder {_shown(folder)}: {reason_and_remedy(error)}"
        ) from None


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-100:]}"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears as ``path`` when all of it is on the disk, or not at all.

    It is written under a name of its own in the same folder (which exists), through no link, and
    has the mode that the umask gives. A process that is killed leaves that file behind;
    ``remove_leftovers`` removes it.

    Raises:
        OSError: it cannot be written; what was at ``path`` is as it was. That is so as well where
            a library that writes to the file reports it as an error of its own.
    """
    temporary = _temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = _Writer(os.open(temporary, flags, 0o666))
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if file.failed is not None and not isinstance(error, OSError):
            raise file.failed from error
        raise


def write_whole_files(contents: Mapping[Path, bytes]) -> None:
    """Write files (whose folders exist) that appear all of them, each whole, or none.

    Raises:
        OSError: one cannot be written, which is its ``filename``; what was there is as it was.
    """
    path = None
    try:
        with contextlib.ExitStack() as opened:
            for path, content in contents.items():
                file = opened.enter_context(whole_file(path))
                file.write(content)
                file.flush()  # what does not fit is known before the first one appears
                os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def whole_copy(source: Path, path: Path) -> None:
    """Make ``path`` a second name of the file ``source``, or a copy where the file system knows no
    hard links.

    Raises:
        OSError: it cannot be written; what was at ``path`` is as it was.
    """
    temporary = _temporary(path)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as whole, whole_file(path) as file:
            shutil.copyfileobj(whole, file)
        return
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # renaming does nothing between names of one file
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{_TEMPORARY}")


class _Writer(io.BufferedWriter):
    """Remembers why it could not write."""

    failed: OSError | None = None

    def __init__(self, descriptor: int) -> None:
        super().__init__(io.FileIO(descriptor, "wb"))

    def write(self, data, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


def _sync_folder(folder: Path) -> None:
    """Have the disk know of a rename, where the file system can be asked."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of ``whole_file`` in ``folder``. Only for whoever knows
    that no other process writes there."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f".*.{'[0-9a-f]' * 16}{_TEMPORARY}"):
            left.unlink(missing_ok=True)
