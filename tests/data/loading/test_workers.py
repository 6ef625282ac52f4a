"""Batches read ahead: their order, what ends them, and processes that do not outlive them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sacl_fast.data.loading.waiting import Abandoned, NoBatch, Patience
from sacl_fast.data.loading.workers import Prefetcher, open_prefetcher, worker_count
from sacl_fast.errors import UserError


class Numbers(NamedTuple):
    value: torch.Tensor
    process: int


class Reader:
    def __getitem__(self, task: int) -> Numbers:
        return Numbers(torch.full((4,), task), os.getpid())


def prefetcher_of(
    reader=None,
    tasks: Iterable[int] = range(20),
    workers: int = 2,
    patience: Patience | None = None,
    **options,
) -> Prefetcher:
    return open_prefetcher(
        reader or Reader(), tasks, workers=workers, prefetch=options.pop("prefetch", 2),
        pin_memory=False, patience=patience or Patience(60), setting="data.workers",
        remedy="fewer take less", **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_every_task_in_order(workers: int, count: int) -> None:
    prefetcher = prefetcher_of(tasks=range(count), workers=workers)
    batches = list(prefetcher)
    prefetcher.close()
    assert [int(batch.value[0]) for batch in batches] == list(range(count))
    processes = {batch.process for batch in batches}
    assert processes == {os.getpid()} if not workers and count else len(processes) <= workers


def test_no_more_is_read_than_was_asked_for() -> None:
    drawn = []

    def tasks() -> Iterator[int]:
        for task in range(1000):
            drawn.append(task)
            yield task

    prefetcher = prefetcher_of(tasks=tasks(), workers=2, prefetch=3)
    assert len(drawn) == 6
    next(prefetcher)
    assert len(drawn) == 7
    prefetcher.close()


class Failing(Reader):
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getitem__(self, task: int) -> Numbers:
        if task == 3:
            raise self.error("the third")
        return super().__getitem__(task)


class Unportable(Exception):
    def __init__(self, *told: str) -> None:
        super().__init__()
        self.told = threading.Lock()  # cannot be pickled


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [UserError, KeyError, ConnectionError])
def test_what_a_reader_raises_is_raised(workers: int, error: type[Exception]) -> None:
    prefetcher = prefetcher_of(Failing(error), workers=workers)
    assert [int(next(prefetcher).value[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(error, match="the third") as caught:
        next(prefetcher)
    if workers:
        assert "in a worker process" in caught.value.__notes__[0]
    prefetcher.close()


def test_an_error_that_cannot_be_sent_is_told_of() -> None:
    prefetcher = prefetcher_of(Failing(Unportable))
    with pytest.raises(RuntimeError, match="Unportable") as caught:
        list(prefetcher)
    assert "in __getitem__" in caught.value.__notes__[0]
    prefetcher.close()


def test_a_worker_without_memory_is_a_sentence() -> None:
    prefetcher = prefetcher_of(Failing(MemoryError))
    with pytest.raises(NoBatch, match="ran out of memory: fewer take less"):
        list(prefetcher)
    prefetcher.close()


class Limited(Reader):
    def __getitem__(self, task: int) -> Numbers:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        return Numbers(torch.zeros(10_000, dtype=torch.uint8), 0)


def test_a_batch_that_cannot_be_handed_over_is_a_sentence() -> None:
    prefetcher = prefetcher_of(Limited())
    with pytest.raises(
        NoBatch, match=r"in shared memory: File too large .*ulimit -f.*data.workers 0"
    ):
        list(prefetcher)
    prefetcher.close()


# --- waits ---------------------------------------------------------------------------------------


class Slow(Reader):
    def __getitem__(self, task: int) -> Numbers:
        if task == 1:
            time.sleep(1000)
        return super().__getitem__(task)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_takes_too_long(workers: int) -> None:
    patience = Patience(60)
    prefetcher = prefetcher_of(Slow(), workers=workers, patience=patience)
    next(prefetcher)
    patience.limit = 0.3
    with pytest.raises(NoBatch, match=r"within 0.3 seconds.*data\.batch_timeout"):
        next(prefetcher)
    prefetcher.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wait_ends_at_a_request(workers: int) -> None:
    asked = iter([False, False, True])

    def check() -> None:
        if next(asked):
            raise InterruptedError

    prefetcher = prefetcher_of(Slow(), tasks=[1], workers=workers, patience=Patience(0, check))
    with pytest.raises(InterruptedError):
        next(prefetcher)
    prefetcher.close()


def test_a_wait_in_another_thread_ends_with_the_stream() -> None:
    patience = Patience()
    prefetcher = prefetcher_of(Slow(), patience=patience)
    next(prefetcher)
    caught = []

    def take() -> None:
        try:
            next(prefetcher)
        except Abandoned as error:
            caught.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    patience.over = True
    thread.join(30)
    assert caught
    prefetcher.close()


# --- workers -------------------------------------------------------------------------------------


def test_a_killed_worker_is_named() -> None:
    prefetcher = prefetcher_of(tasks=range(10**9))
    os.kill(next(prefetcher).process, signal.SIGKILL)
    with pytest.raises(NoBatch, match=r"was killed by SIGKILL.*fewer take less"):
        for _ in range(100):
            next(prefetcher)
    prefetcher.close()


class Leaving(Reader):
    def __getitem__(self, task: int) -> Numbers:
        os._exit(7)


def test_a_worker_that_leaves_is_named() -> None:
    prefetcher = prefetcher_of(Leaving())
    with pytest.raises(NoBatch, match="ended with status 7"):
        next(prefetcher)
    prefetcher.close()


def test_a_stopped_worker_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacl_fast.data.loading.workers._END_WITHIN", 0.2)
    patience = Patience(60)
    prefetcher = prefetcher_of(tasks=range(10**9), patience=patience)
    os.kill(next(prefetcher).process, signal.SIGSTOP)
    patience.limit = 0.5
    with pytest.raises(NoBatch, match=r"within 0\.5 seconds"):
        for _ in range(100):
            next(prefetcher)
    prefetcher.close()


def test_workers_end_with_a_stream_that_nobody_closes() -> None:
    prefetcher = prefetcher_of(Slow())
    next(prefetcher)
    assert multiprocessing.active_children()
    del prefetcher
    assert not multiprocessing.active_children()


def test_a_dead_worker_raises_nothing_elsewhere() -> None:
    """Its death is told where its batch is due, and by no signal's handler."""
    before = signal.getsignal(signal.SIGCHLD)
    prefetcher = prefetcher_of(tasks=range(10**9))
    process = next(prefetcher).process
    assert signal.getsignal(signal.SIGCHLD) is before
    os.kill(process, signal.SIGKILL)
    time.sleep(0.3)
    prefetcher.close()


def test_workers_that_cannot_be_started_are_a_sentence() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_ones = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_ones + 20, hard))
    try:
        with pytest.raises(UserError, match=r"data.workers is 100.*open files"):
            prefetcher_of(workers=100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_signals_are_handled_as_before() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    prefetcher = prefetcher_of()
    next(prefetcher)
    prefetcher.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


ORPHAN = """
import os, signal, sys
from sacl_fast.data.loading.workers import open_prefetcher
from sacl_fast.data.loading.waiting import Patience

class Reader:
    def __getitem__(self, task):
        {reading}

def early(*_):  # in the worker, before anything of its own
    os.write(1, b"%d\\n" % os.getpid())
    {starting}

os.register_at_fork(after_in_child=early)
prefetcher = open_prefetcher(
    Reader(), range(9), workers=1, prefetch=1, pin_memory=False, patience=Patience(),
    setting="", remedy="",
)
next(prefetcher)
"""


@pytest.mark.parametrize(
    ("starting", "reading"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "pass"),
        ("pass", "import time; time.sleep(1000)"),
        ("pass", "signal.sigwait({signal.SIGUSR2})"),
    ],
    ids=["while it started", "while it slept", "within a call"],
)
def test_a_worker_ends_with_its_parent(starting: str, reading: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN.format(starting=starting, reading=reading)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while _lives(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(worker)
    process.stdout.close()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_end_of_the_thread_that_started_it_does_not_end_a_worker() -> None:
    prefetchers = []
    thread = threading.Thread(target=lambda: prefetchers.append(prefetcher_of()))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert len(list(prefetchers[0])) == 20
    prefetchers[0].close()


SMALL = """
import os, sys, numpy as np, torch
from sacl_fast.config import Config, DataConfig, ViewsConfig
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.data.loading.open import open_view_loader
from sacl_fast.data.images.open import open_sources

data = DataConfig(source="demo", loader="torchvision", workers=2, limit=256)
config = Config(batch_size=128, views=ViewsConfig(size=64), data=data)
source = open_sources(data, 0).train
loader = open_view_loader(source, config, device=torch.device("cpu"))
steps = sum(1 for epoch in range(3) for _ in loader.epoch(epoch))
loader.close()
batches = sum(1 for _ in EvalLoader(source, np.arange(256), config, torch.device("cpu")))
print(steps, batches)
"""


@pytest.mark.parametrize("size", ["64k", "full"])
def test_a_small_or_full_shared_memory_is_enough(size: str) -> None:
    """A batch of these is 3 MB, and containers give 64 for all of them."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    fill = "&& { cat /dev/zero >/dev/shm/all 2>/dev/null || true; }" if size == "full" else ""
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(
        [
            "unshare",
            "-Urm",
            "sh",
            "-c",
            f'{mount} {fill} && exec "$0" -c "$1"',
            sys.executable,
            SMALL,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split()[:1] == ["6"], done.stderr


def test_workers_are_the_cores_shared_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [worker_count(n) for n in (0, 3, -1)] == [0, 3, 16]
    for ranks, share in ((4, 4), (5, 3), (64, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert worker_count(-1) == share
