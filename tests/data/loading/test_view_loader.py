"""Batches: the same for any workers, ranks and starting step; bad images; ends of processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Batch, Plan
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.data.loading.view_loader import NormalisedViews, ViewLoader
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.errors import UserError
from tests.data.loading.cases import (
    CPU,
    assert_same,
    batches_by,
    loader_by,
    random_source,
    torchvision_config,
)

source = pytest.fixture(random_source)
batches = partial(batches_by, "torchvision")
opened = partial(loader_by, "torchvision")


# --- what is in a batch --------------------------------------------------------------------------


def test_an_epoch(source: ArraySource) -> None:
    loader = opened(source, torchvision_config())
    assert loader.steps_per_epoch == 4
    found = list(loader.epoch(0))
    assert len(found) == 4  # the last 5 images do not fill a batch
    for batch in found:
        for view in (batch.view_a, batch.view_b):
            assert view.shape == (8, 3, 16, 16) and view.dtype == torch.float32
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert batch.index.dtype == batch.label.dtype == torch.int64
        assert batch.label.tolist() == [source.label(i) for i in batch.index.tolist()]
        assert not torch.equal(batch.view_a, batch.view_b)
    seen = torch.cat([batch.index for batch in found]).tolist()
    assert len(set(seen)) == 32
    other = torch.cat([batch.index for batch in loader.epoch(1)]).tolist()
    assert other != seen


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(source: ArraySource, workers: int) -> None:
    steps = [(0, 0), (1, 0), (0, 2), (2, 3), (5, 0)]  # in a row, back, on, beyond the last epoch
    assert_same(
        batches(source, torchvision_config(workers), steps),
        batches(source, torchvision_config(), steps),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_anywhere(source: ArraySource, workers: int) -> None:
    whole = batches(source, torchvision_config(workers), [(1, 0)])
    for start in (2,) if workers else range(5):
        assert_same(batches(source, torchvision_config(workers), [(1, start)]), whole[start:])


def test_an_abandoned_epoch_leaves_no_trace(source: ArraySource) -> None:
    loader = opened(source, torchvision_config(2))
    first = next(loader.epoch(0))
    assert_same([*loader.epoch(0)][:1], [first])
    assert_same([*loader.epoch(1)], batches(source, torchvision_config(), [(1, 0)]))
    loader.close()
    assert_same([next(loader.epoch(0))], [first])  # and starts again after the end
    loader.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(source: ArraySource, world_size: int) -> None:
    whole = batches(source, torchvision_config(), [(0, 0), (1, 2)])
    parts = [
        batches(source, torchvision_config(), [(0, 0), (1, 2)], rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [
        Batch(*(torch.cat(list(tensors)) for tensors in zip(*slices, strict=True)))
        for slices in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_seed_and_epoch_change_the_views(source: ArraySource) -> None:
    def views(seed: int, epoch: int) -> torch.Tensor:
        (batch,) = batches(source, torchvision_config(seed=seed, batch_size=37), [(epoch, 0)])
        return batch.view_a[batch.index.argsort()]

    first = views(0, 0)
    assert torch.equal(first, views(0, 0))
    assert not torch.equal(first, views(1, 0)) and not torch.equal(first, views(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_numbers_are_left_alone(source: ArraySource, workers: int) -> None:
    def states() -> list:
        return [
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            torch.get_rng_state().tolist(),
        ]

    before = states()
    batches(source, torchvision_config(workers), [(0, 0)])
    list(EvalLoader(source, np.arange(9), torchvision_config(workers), CPU))
    assert states() == before


class Recorded:
    """A stream of one image a step, which writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def enter(self, step: int) -> None:
        self.asked.append(f"enter {step}")

    def take(self, step: int) -> NormalisedViews:
        self.asked.append(f"take {step}")
        return NormalisedViews(torch.zeros(1), torch.ones(1), torch.tensor([step]), 0)

    def close(self) -> None:
        self.asked.append("close")


def test_a_stream_is_entered_only_where_steps_do_not_follow(source: ArraySource) -> None:
    stream = Recorded()
    plan, bad = Plan(torchvision_config(batch_size=18), len(source)), BadImages(source, 0.1)
    loader = ViewLoader(source, plan, bad, stream)
    found = [batch for epoch in (1, 2) for batch in loader.epoch(epoch)]
    assert stream.asked == ["enter 2", "take 2", "take 3", "take 4", "take 5"]
    assert [batch.label.item() for batch in found] == [2, 3, 4, 0]
    assert [(batch.view_a.item(), batch.view_b.item()) for batch in found] == [(0, 1)] * 4
    stream.asked.clear()
    next(loader.epoch(2, 1))  # back
    next(loader.epoch(3, 1))  # over a step
    loader.close()
    next(loader.epoch(4))  # on, after the end
    assert stream.asked == [
        *("enter 5", "take 5", "enter 7", "take 7"),
        *("close", "enter 8", "take 8"),
    ]


# --- bad images ----------------------------------------------------------------------------------


def loader_of(folder: Path, workers: int, share: float) -> ViewLoader:
    data = DataConfig(root=str(folder), workers=workers, max_bad_share=share)
    given = torchvision_config(data=data, batch_size=10)
    return opened(open_sources(data, 0).train, given)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_named_once(
    folder: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = loader_of(folder, workers, 0.1)
    found = [batch for epoch in range(3) for batch in loader.epoch(epoch)]
    loader.close()
    assert loader.bad == {4: "no known image format", 5: "the file is empty"}
    for first, second in zip(found[::2], found[1::2], strict=True):
        seen = sorted(torch.cat([first.index, second.index]).tolist())
        assert seen == sorted([*(i for i in range(20) if i not in (4, 5)), 6, 6])
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert any(
        line.startswith(f"skipped unreadable image {folder / '04.png'}: no known image format (")
        and line.endswith("of 20)")
        for line in warnings
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_too_many_bad_images(folder: Path, workers: int, share: float) -> None:
    loader = loader_of(folder, workers, share)
    with pytest.raises(UserError, match=r"of 20 images are unreadable.*0[45]\.png"):
        list(loader.epoch(0))
    loader.close()


def test_nothing_but_bad_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    for share, said in (
        (0.1, r"^at least 3 of 20 images are .* \(data.max_bad_share is 0.1\): "),
        (1.0, r"^20 of 20 images are .* \(none is left\): "),
    ):
        with pytest.raises(UserError, match=said):
            next(loader_of(folder, 0, share).epoch(0))


# --- ends ----------------------------------------------------------------------------------------


def test_a_killed_worker_is_an_error_not_a_hang(source: ArraySource) -> None:
    loader = opened(source, torchvision_config(2))
    with pytest.raises(
        NoBatch, match=r"worker process that loads images was killed by SIGKILL.*data\.workers"
    ):
        for epoch in range(1000):
            for _ in loader.epoch(epoch):
                for worker in multiprocessing.active_children()[:1]:
                    os.kill(worker.pid, signal.SIGKILL)  # type: ignore
    loader.close()
    assert not multiprocessing.active_children()


class Hanging(ArraySource):
    """A disk that does not answer."""

    def load(self, index: int) -> Image.Image:
        time.sleep(1000)
        raise AssertionError


@pytest.mark.parametrize("workers", [0, 2])
def test_waiting_for_a_disk_that_does_not_answer_ends(workers: int) -> None:
    source = Hanging("gone", np.zeros((9, 8, 8, 3), np.uint8), [0] * 9, ())
    data = DataConfig(workers=workers, batch_timeout=0.5)
    for loader in (
        opened(source, torchvision_config(data=data)).epoch(0),
        iter(EvalLoader(source, np.arange(9), torchvision_config(data=data), CPU)),
    ):
        with pytest.raises(NoBatch, match=r"within 0.5 seconds.*data\.batch_timeout"):
            next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_waiting_ends_where_the_run_is_to_stop(workers: int) -> None:
    source = Hanging("gone", np.zeros((9, 8, 8, 3), np.uint8), [0] * 9, ())

    def check() -> None:
        raise InterruptedError

    loader = opened(source, torchvision_config(workers), check=check)
    with pytest.raises(InterruptedError):
        next(loader.epoch(0))
    loader.close()
    evaluation = EvalLoader(source, np.arange(9), torchvision_config(workers), CPU, check=check)
    with pytest.raises(InterruptedError):
        next(iter(evaluation))
    assert not multiprocessing.active_children()


def test_closing_in_the_middle(source: ArraySource) -> None:
    loader = opened(source, torchvision_config(2))
    next(loader.epoch(0))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    loader.close()


RUN = """
import multiprocessing, sys, torch
from sacl_fast.config import Config, DataConfig, ViewsConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.open import open_view_loader

data = DataConfig(source="demo", workers=2, loader="torchvision")
config = Config(batch_size=8, views=ViewsConfig(size=16), data=data)
loader = open_view_loader(open_sources(data, 0).train, config, device=torch.device("cpu"))
batches = loader.epoch(0)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
for _ in range(30):
    next(batches)
print("still loading", flush=True)
if sys.argv[1] == "error":
    raise SystemExit("stopped in the middle")
sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["error", "killed"])
def test_signals_to_all_processes_and_ends_without_close(end: str) -> None:
    """Workers outlive what a scheduler sends to everyone, but not their parent."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker, number)
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.readline() == "still loading\n"
    if end == "killed":
        process.kill()
    _, errors = process.communicate(timeout=120)
    assert errors == ("stopped in the middle\n" if end == "error" else "")
    deadline = time.monotonic() + 60  # a worker looks for its parent every 5 s
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, workers))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
