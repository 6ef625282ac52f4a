"""One run to a folder: a lock file that says which process writes there.

``run.lock`` holds the writer's process, host and start; it is there while the run is. A process
that died without removing it is told from one that runs by what can be known, in this order:

- The lock on the file, which the kernel drops when a process dies. It is ``lockf``'s and not
  ``flock``'s, because children inherit the latter: a worker that outlives its killed parent would
  hold on to it. Network file systems know ``lockf`` between machines, if they know any lock.
- On the same machine, the process itself: its number and the time it started.
- On another machine, the file's time of change, which the writer renews every ``BEAT`` seconds:
  it is watched for ``PATIENCE`` seconds. Clocks are not compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from sacl_fast.errors import UserError, reason_of

logger = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT = 10.0
PATIENCE = 35.0
_SETTLE = 1.0  # seconds within which a process that opened the file has written into it

_HELD = (errno.EACCES, errno.EAGAIN)


@dataclass(frozen=True)
class Process:
    """A process, told from all others that ever were."""

    pid: int
    machine: str
    """The boot of the machine, which containers with their own host name have in common."""
    start: int
    """Ticks after that boot."""
    host: str = field(compare=False)
    since: str = field(compare=False)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, which started at {self.since}"


class RunLock:
    """The folder's lock, held until ``release``.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self.owner = _this_process()
        self._stop = threading.Event()
        try:
            self._file = self._take()
        except OSError as error:
            raise UserError(
                f"cannot write to run folder {folder}: {reason_of(error)}; --out names another"
            ) from error
        self._beat = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._beat.start()

    def check(self) -> None:
        """Make sure that nothing is written into a folder that another process took over, as it
        does where this one was silent for too long.

        Raises:
            UserError: one did.
        """
        other = _read(self._file)
        if other is not None and other != self.owner:
            raise UserError(
                f"{self.folder} was taken over by {other}, because this process had stood still; "
                "it stops and writes nothing more"
            )

    def release(self) -> None:
        """Let go of the folder. May be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            if _read(self._file) == self.owner and _is_at(self._file, self.path):
                self.path.unlink()
        os.close(self._file)

    def _take(self) -> int:
        """The lock file, opened, locked where the file system can, and ours by its content."""
        dead: Process | None = None
        end = time.monotonic() + PATIENCE
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(self.path, flags, 0o666)
            try:
                locked = _lock(file)
                if locked is False:
                    other = _read_soon(file)
                    if other is None or _runs(other) or time.monotonic() > end:
                        raise self._in_use(other)
                    os.close(file)  # it was killed, and takes a while to let go
                    file = -1
                    time.sleep(0.05)
                    continue
                other = _read(file)
                if other is not None and other != dead:
                    if _runs(other):
                        raise self._in_use(other)
                    if other.machine != self.owner.machine or locked is None:
                        dead = other
                        # Closed meanwhile: network file systems tell news to those who open.
                        os.close(file)
                        file = -1
                        if self._changes(other):
                            raise self._in_use(other)
                        continue
                if not _is_at(file, self.path):  # removed by its owner as we opened it
                    os.close(file)
                    file = -1
                    continue
                _write(file, self.owner)
                if locked is None:  # two may have come here; the one that wrote last has it
                    time.sleep(_SETTLE)
                    if (winner := _read(file)) != self.owner:
                        raise self._in_use(winner)
            except BaseException:
                if file >= 0:
                    os.close(file)
                raise
            if other is not None:
                logger.warning("%s was left by %s, which is no more", self.folder, other)
            return file

    def _in_use(self, other: Process | None) -> UserError:
        who = "another process" if other is None else str(other)
        if other == self.owner:
            who = "this process already"
        return UserError(
            f"{self.folder} is in use by {who}; wait for that run or end it, or name another "
            "folder with --out"
        )

    def _changes(self, other: Process) -> bool:
        """Whether the file's time of change moves while we watch."""
        logger.warning(
            "%s was last written by %s; watching for %.0f s whether it still runs",
            self.folder, other, PATIENCE,
        )  # fmt: skip
        before, end = _changed(self.path), time.monotonic() + PATIENCE
        while (now := _changed(self.path)) is not None and time.monotonic() < end:
            if now != before:
                return True
            time.sleep(min(1.0, PATIENCE / 5))
        return False

    def _renew(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def _lock(file: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _read(file: int) -> Process | None:
    """The process that wrote the file; None if it is empty or damaged."""
    try:
        return Process(**json.loads(os.pread(file, 4096, 0)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _read_soon(file: int) -> Process | None:
    """The same of a file that another process has just locked."""
    end = time.monotonic() + _SETTLE
    while (other := _read(file)) is None and time.monotonic() < end:
        time.sleep(0.02)
    return other


def _write(file: int, owner: Process) -> None:
    content = json.dumps(asdict(owner)).encode() + b"\n"
    os.pwrite(file, content, 0)
    os.ftruncate(file, len(content))
    os.fsync(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the opened file is (still) the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _changed(path: Path) -> int | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.fstat(file).st_mtime_ns
    finally:
        os.close(file)


def _this_process() -> Process:
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    host = socket.gethostname()
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = host
    pid = os.getpid()
    return Process(pid, machine, _start_of(pid) or 0, host, since=now)


def _runs(process: Process) -> bool:
    """Whether it is a process of this machine that runs."""
    here = _this_process()
    return process.machine == here.machine and process.start == _start_of(process.pid)


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks after boot; None of one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
