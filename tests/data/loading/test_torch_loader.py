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
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from sacl_fast.config import Config, DataConfig, EvalConfig, ViewsConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.torch_loader import (
    Batch,
    EvalLoader,
    Normalise,
    ViewLoader,
    worker_count,
)
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.errors import UserError
from tests.data.loading.cases import CPU, assert_same, batches_by, config_of, random_source

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


source = pytest.fixture(random_source)
batches = partial(batches_by, ViewLoader)


def config(workers: int = 0, **options) -> Config:
    return config_of(**{"data": DataConfig(workers=workers), **options})


# --- what is in a batch --------------------------------------------------------------------------


def test_an_epoch(source: ArraySource) -> None:
    loader = ViewLoader(source, config(), device=CPU)
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


def test_normalise() -> None:
    views = ViewsConfig()
    pixels = torch.arange(2 * 5 * 5 * 3, dtype=torch.uint8).view(2, 5, 5, 3)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (views.mean, views.std))
    expected = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    for channels_last, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        found = Normalise(views, CPU, channels_last)(pixels)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(source: ArraySource, workers: int) -> None:
    steps = [(0, 0), (1, 0), (0, 2), (2, 3), (5, 0)]  # in a row, back, on, beyond the last epoch
    assert_same(batches(source, config(workers), steps), batches(source, config(), steps))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_anywhere(source: ArraySource, workers: int) -> None:
    whole = batches(source, config(workers), [(1, 0)])
    for start in (2,) if workers else range(5):
        assert_same(batches(source, config(workers), [(1, start)]), whole[start:])


def test_an_abandoned_epoch_leaves_no_trace(source: ArraySource) -> None:
    loader = ViewLoader(source, config(2), device=CPU)
    first = next(loader.epoch(0))
    assert_same([*loader.epoch(0)][:1], [first])
    assert_same([*loader.epoch(1)], batches(source, config(), [(1, 0)]))
    loader.close()
    assert_same([next(loader.epoch(0))], [first])  # and starts again after the end
    loader.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(source: ArraySource, world_size: int) -> None:
    whole = batches(source, config(), [(0, 0), (1, 2)])
    parts = [
        batches(source, config(), [(0, 0), (1, 2)], rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [
        Batch(*(torch.cat(list(tensors)) for tensors in zip(*slices, strict=True)))
        for slices in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_seed_and_epoch_change_the_views(source: ArraySource) -> None:
    def views(seed: int, epoch: int) -> torch.Tensor:
        (batch,) = batches(source, config(seed=seed, batch_size=37), [(epoch, 0)])
        return batch.view_a[batch.index.argsort()]

    first = views(0, 0)
    assert torch.equal(first, views(0, 0))
    assert not torch.equal(first, views(1, 0)) and not torch.equal(first, views(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_numbers_are_left_alone(source: ArraySource, workers: int) -> None:
    def states() -> list:
        return [
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ]

    before = states()
    batches(source, config(workers), [(0, 0)])
    list(EvalLoader(source, np.arange(9), config(workers), CPU))
    assert states() == before


@pytest.mark.parametrize(
    ("batch_size", "world_size", "said"),
    [
        (8, 3, ["8 over 3", "multiple of 3", "such as 6"]),
        (4, 4, ["4 over 4", "2 or more images each", "batch_size 8"]),
        (64, 1, ["64", "only 37 training images", "at most 37"]),
    ],
)
def test_batch_sizes_that_cannot_be(
    source: ArraySource, batch_size: int, world_size: int, said: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        ViewLoader(source, config(batch_size=batch_size), device=CPU, world_size=world_size)
    assert all(words in str(caught.value) for words in said)


def test_workers_are_the_cores_shared_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [worker_count(n) for n in (0, 3, -1)] == [0, 3, 16]
    for ranks, share in ((4, 4), (5, 3), (64, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert worker_count(-1) == share


# --- bad images ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 images, of which 4 and 5 are bad."""
    for i in range(20):
        Image.new("RGB", (20, 20), (12 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "04.png").write_text("no picture")
    (tmp_path / "05.png").write_bytes(b"")
    return tmp_path


def loader_of(folder: Path, workers: int, share: float) -> ViewLoader:
    data = DataConfig(root=str(folder), workers=workers, max_bad_share=share)
    given = config(data=data, batch_size=10)
    return ViewLoader(open_sources(data, 0).train, given, device=CPU)


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
    for share, least in ((0.1, 3), (1.0, 20)):
        with pytest.raises(UserError, match=f"at least {least} of 20 images"):
            next(loader_of(folder, 0, share).epoch(0))


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_keeps_the_order(source: ArraySource, workers: int) -> None:
    given = config(workers, eval=EvalConfig(batch_size=4))
    indices = np.array([30, 2, 17, 5, 9, 11])
    loader = EvalLoader(source, indices, given, CPU)
    for _ in range(2):
        found = list(loader)
        assert [len(labels) for _, labels in found] == [4, 2] and len(loader) == 2
        assert torch.cat([labels for _, labels in found]).tolist() == (indices % 5).tolist()
    resized = source.load(30).resize((16, 16), Image.Resampling.BICUBIC)
    expected = Normalise(given.views, CPU, True)(torch.from_numpy(np.array(resized))[None])
    torch.testing.assert_close(found[0][0][:1], expected)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (128, 128), (90, 500), (1, 40)])
def test_large_images_are_resized_and_cropped_as_by_torchvision(size: tuple[int, int]) -> None:
    low = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)
    one = ArraySource("one", np.asarray(image)[None], [0], ())
    given = config(views=ViewsConfig(size=112, mean=(0.0,) * 3, std=(1.0,) * 3))
    ((found, _),) = EvalLoader(one, np.array([0]), given, CPU)
    short = F.resize(image, [128], F.InterpolationMode.BICUBIC)
    expected = F.to_dtype(F.to_image(F.center_crop(short, [112, 112])), torch.float32, scale=True)
    off = 255 * (found[0] - expected).abs()
    assert off.max() < 2.01 and off.mean() < 0.1  # Pillow's coefficients have fixed point


def test_eval_loader_leaves_bad_images_out(folder: Path) -> None:
    data = DataConfig(root=str(folder), workers=0)
    given = config(data=data, eval=EvalConfig(batch_size=2))
    loader = EvalLoader(open_sources(data, 0).train, np.arange(20), given, CPU)
    found = list(loader)
    assert [len(images) for images, _ in found] == [2] * 9
    assert sorted(loader.bad) == [4, 5]
    strict = replace(given, data=replace(data, max_bad_share=0.0))
    with pytest.raises(UserError, match="unreadable"):
        list(EvalLoader(open_sources(data, 0).train, np.arange(20), strict, CPU))


# --- ends ----------------------------------------------------------------------------------------


def test_a_killed_worker_is_an_error_not_a_hang(source: ArraySource) -> None:
    loader = ViewLoader(source, config(2), device=CPU)
    with pytest.raises(
        NoBatch, match=r"worker process that loads images was killed by SIGKILL.*data\.workers"
    ):
        for epoch in range(1000):
            for _ in loader.epoch(epoch):
                for worker in multiprocessing.active_children()[:1]:
                    os.kill(worker.pid, signal.SIGKILL)  # type: ignore
    loader.close()
    assert not multiprocessing.active_children()


def test_a_worker_killed_in_evaluation_is_an_error(source: ArraySource) -> None:
    given = config(2, eval=EvalConfig(batch_size=1))
    with pytest.raises(NoBatch, match="killed by SIGKILL"):
        for _ in EvalLoader(source, np.arange(37), given, CPU):
            for worker in multiprocessing.active_children()[:1]:
                os.kill(worker.pid, signal.SIGKILL)  # type: ignore
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
        ViewLoader(source, config(data=data), device=CPU).epoch(0),
        iter(EvalLoader(source, np.arange(9), config(data=data), CPU)),
    ):
        with pytest.raises(NoBatch, match=r"within 0.5 seconds.*data\.batch_timeout"):
            next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_waiting_ends_where_the_run_is_to_stop(workers: int) -> None:
    source = Hanging("gone", np.zeros((9, 8, 8, 3), np.uint8), [0] * 9, ())

    def check() -> None:
        raise InterruptedError

    loader = ViewLoader(source, config(workers), device=CPU, check=check)
    with pytest.raises(InterruptedError):
        next(loader.epoch(0))
    loader.close()
    evaluation = EvalLoader(source, np.arange(9), config(workers), CPU, check=check)
    with pytest.raises(InterruptedError):
        next(iter(evaluation))
    assert not multiprocessing.active_children()


def test_closing_in_the_middle(source: ArraySource) -> None:
    loader = ViewLoader(source, config(2), device=CPU)
    next(loader.epoch(0))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    loader.close()


RUN = """
import multiprocessing, sys, torch
from sacl_fast.config import Config, DataConfig, ViewsConfig
from sacl_fast.data.loading.torch_loader import ViewLoader
from sacl_fast.data.images.open import open_sources

data = DataConfig(source="demo", workers=2)
config = Config(batch_size=8, views=ViewsConfig(size=16), data=data)
loader = ViewLoader(open_sources(data, 0).train, config, device=torch.device("cpu"))
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
    _, errors = process.communicate(timeout=30)
    assert errors == ("stopped in the middle\n" if end == "error" else "")
    deadline = time.monotonic() + 15  # a worker looks for its parent every 5 s
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, workers))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
