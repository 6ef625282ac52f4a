"""What this process may use of its machine: cores and memory, as containers and job managers limit
them.

Linux tells limits apart: a process's affinity, and the quotas of the control groups that it is in
(``docker run --cpus 2 --memory 8g``, a pod's limits, a Slurm job's). Neither ``os.cpu_count`` nor
torch asks for quotas: in a container of two cores on a machine of 64, 64 threads would wait for one
another, and two of them run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SPINS = 20_000  # tens of microseconds; with fewer, a step of small operators is slower alone


class Memory(NamedTuple):
    """Bytes of memory that are there in all, and that are free now."""

    total: int
    free: int


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its affinity, or fewer by quotas, rounded up.

    Args:
        root: the folder of ``proc`` and ``sys``.
    """
    cores = _cores_of_affinity()
    for group in _groups("cpu", root):
        with suppress(OSError, ValueError):  # no such file; "max", of no quota
            if (group / "cpu.max").exists():
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota = _number(group, "cpu.cfs_quota_us")
                period = _number(group, "cpu.cfs_period_us")
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def usable_memory(root: Path = Path("/")) -> Memory:
    """Of the machine, or less by limits. Files that the system keeps in memory count as free."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = free = page * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text()
        free = 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    for group in _groups("memory", root):
        with suppress(OSError, ValueError):
            new = (group / "memory.max").exists()
            most = _number(group, "memory.max" if new else "memory.limit_in_bytes")
            used = _number(group, "memory.current" if new else "memory.usage_in_bytes")
            given = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            prefix = "" if new else "total_"
            files = sum(
                int(given.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")
            )
            total, free = min(total, most), min(free, most - used + files)
    return Memory(total, max(0, free))


def limit_threads(environ: MutableMapping[str, str], root: Path = Path("/")) -> None:
    """Set what OpenMP reads when torch is imported, unless it is set.

    No more threads than there are cores by quota. And a thread that waits for others sleeps soon,
    where GNU's OpenMP has it look for a millisecond or more, as long as a whole operator takes:
    if anything else wants the core, the thread that is waited for cannot run meanwhile, and a
    step of two threads takes 20 to 100 times as long.
    """
    if (cores := usable_cores(root)) < _cores_of_affinity():
        environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def _cores_of_affinity() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, the innermost first; of version 2 and
    of version 1. Within a container they may be told by a path that only its host has: the
    container's own group is the outermost there."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            mounted = root / "sys/fs/cgroup" / names
            inner = mounted / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(mounted) and folder.is_dir():
                    yield folder


def _number(group: Path, name: str) -> int:
    return int((group / name).read_text())
