"""Errors that users cause and can mend, as opposed to bugs."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one clear sentence that says what was given and what works.

    The command line prints it without a traceback and exits with status 2. Any other
    exception is a bug and keeps its traceback.
    """


class SaidByAnother(UserError):
    """The same on a process beside the one that prints the sentence."""


class OtherRankFailed(RuntimeError):
    """Another process of this run failed, so this one ends; what it says is the other's reason."""

    def __init__(self, why: str, *, said: bool) -> None:
        super().__init__(why)
        self.said = said
        """Whether the other process, or another that lost it, tells people."""


class Stopped(Exception):
    """A wait was ended because the run is to stop. Not an error: the trainer saves and ends."""

    def __init__(self, number: int, *, everywhere: bool = False) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number
        """The signal that asked for it."""
        self.everywhere = everywhere
        """Whether all processes of the run stop at the same step."""


def nearest(given: str, valid: Iterable[str], *, show: int = 12) -> str:
    """The tail of an "unknown name" sentence: the nearest valid names, or the first few."""
    valid = sorted(valid)
    close = difflib.get_close_matches(given, valid, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f" and {len(valid) - show} more" if len(valid) > show else ""
    return f"valid: {', '.join(valid[:show])}{more}"


def reason_of(error: BaseException) -> str:
    """Why something failed, in a few words: the first line of what the system or a library says."""
    if isinstance(error, OSError) and error.strerror:
        there = error.filename if error.errno == errno.EEXIST else None
        if there is not None and not os.path.isdir(there):  # where a folder was to be made
            return f"{os.fsdecode(there)} is no folder"
        if error.errno == errno.EFBIG:
            return f"{error.strerror} (more than 'ulimit -f' or the file system allows)"
        return error.strerror
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


_REMEDIES = {
    errno.EACCES: "a path for which this user has the permission works",
    errno.EPERM: "a path for which this user has the permission works",
    errno.EROFS: "a path on a disk that can be written works",
    errno.ENOSPC: "room on that disk, or a path on another works",
    errno.EDQUOT: "room on that disk, or a path on another works",
    errno.ENAMETOOLONG: "a shorter path works",
    errno.ELOOP: "a path without links that lead in a circle works",
    errno.ENOENT: "a path that is there works",
    errno.ENOTDIR: "a path through folders alone works",
    errno.EISDIR: "the path of a file works",
    errno.EEXIST: "a path that is not there yet works",
}


def reason_and_remedy(error: BaseException) -> str:
    """``reason_of``, and of what the system says of a path what works: for sentences that name the
    path and have no advice of their own."""
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    return reason_of(error) + (f"; {remedy}" if remedy else "")


def in_one_line(error: BaseException) -> str:
    """What an error says, in a line: of a path with a line break or a colour code, its escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
