"""What a process may use of its machine, and how many threads of OpenMP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sacl_fast.machine import limit_threads, usable_cores, usable_memory

GIB = 2**30


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A folder with ``proc`` and ``sys`` of a machine with 100 GiB that are free."""
    text = {"proc/self/cgroup": groups, "proc/meminfo": f"MemAvailable: {100 * GIB // 1024} kB\n"}
    for name, content in {**text, **{f"sys/fs/cgroup/{n}": c for n, c in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.fixture(autouse=True)
def of_64_cores_and_200_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    known = {"SC_PAGE_SIZE": page, "SC_PHYS_PAGES": 200 * GIB // page}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "sysconf", known.__getitem__)


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, 64),  # no control groups
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # a container: docker run --cpus 2
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "12800000 100000\n"}, 64),  # more than there are
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "900000 100000\n"}, 4),
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "5:cpu,cpuacct:/job\n0::/\n",  # version 1
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "600000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "200000",
            },
            3,
        ),
        (
            "5:cpu:/docker/0123\n4:memory:/docker/0123\n",  # a path of the host's
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("5:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "1"}, 64),
    ],
)
def test_cores(tmp_path: Path, groups: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(machine(tmp_path, groups, files)) == cores


def test_cores_without_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert usable_cores(tmp_path) == 10
    assert usable_memory(tmp_path) == (200 * GIB, 200 * GIB)


def limits(
    folder: str, names: tuple[str, str], most: int | str, used: int, prefix: str = ""
) -> dict:
    of_files = f"anon 1\n{prefix}inactive_file {2 * GIB}\n{prefix}active_file {GIB}"
    values = {names[0]: most, names[1]: used, "memory.stat": of_files}
    return {f"{folder}{name}": f"{value}\n" for name, value in values.items()}


NEW, OLD = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("groups", "files", "total", "free"),
    [
        ("0::/\n", {}, 200, 100),
        ("0::/\n", limits("", NEW, "max", 20 * GIB), 200, 100),
        # 20 GiB are taken, 3 of them by files that were read
        ("0::/\n", limits("", NEW, 32 * GIB, 20 * GIB), 32, 15),
        ("0::/\n", limits("", NEW, 150 * GIB, 20 * GIB), 150, 100),
        ("0::/a/b\n", limits("a/", NEW, 32 * GIB, 20 * GIB), 32, 15),
        ("0::/\n", limits("", NEW, 8 * GIB, 12 * GIB), 8, 0),  # as a limit that was lowered
        ("3:memory:/x\n", limits("memory/x/", OLD, 16 * GIB, 4 * GIB, "total_"), 16, 15),
        ("3:memory:/x\n", limits("memory/", OLD, 2**63 - 4096, 4 * GIB, "total_"), 200, 100),
    ],
)
def test_memory(tmp_path: Path, groups: str, files: dict[str, str], total: int, free: int) -> None:
    assert usable_memory(machine(tmp_path, groups, files)) == (total * GIB, free * GIB)


@pytest.mark.parametrize(
    ("given", "threads", "spins"),
    [
        ({}, "2", "20000"),
        ({"OMP_NUM_THREADS": "7"}, "7", "20000"),
        ({"GOMP_SPINCOUNT": "5"}, "2", "5"),
        ({"OMP_WAIT_POLICY": "active"}, "2", None),
    ],
)
def test_threads(tmp_path: Path, given: dict[str, str], threads: str, spins: str | None) -> None:
    environ = dict(given)
    limit_threads(environ, machine(tmp_path, "0::/\n", {"cpu.max": "200000 100000\n"}))
    assert environ["OMP_NUM_THREADS"] == threads
    assert environ.get("GOMP_SPINCOUNT") == spins


def test_all_cores_without_a_quota(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    limit_threads(environ, tmp_path)
    assert "OMP_NUM_THREADS" not in environ  # torch leaves out the second threads of cores


def test_openmp_reads_it_when_a_command_imports_torch() -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "sacl_fast", "doctor"],
        env={**environ, "OMP_DISPLAY_ENV": "verbose", "SACL_FAST_SELF_CHECK": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP is not GNU's")
    assert "GOMP_SPINCOUNT = '20000'" in done.stderr
