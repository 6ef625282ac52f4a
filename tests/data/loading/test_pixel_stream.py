"""Loader ``compiled``: the batches of the other loaders, bit for bit, of images that are pixels."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import Config, DataConfig
from sacl_fast.config.choices import LoaderName, ResidenceSetting
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Packed, Source, Subset, as_packed
from sacl_fast.data.loading import pixel_stream as module
from sacl_fast.data.loading.batch import Batch
from sacl_fast.data.loading.open import open_view_loader, read_views
from sacl_fast.data.loading.pixel_stream import PixelStream, announced, batches_ahead
from sacl_fast.data.loading.readers import CompiledViewReader
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from tests.caching.cases import all_kinds, cached
from tests.data.loading.cases import (
    CPU,
    assert_same,
    batches_by,
    config_of,
    loader_by,
    random_source,
)

pytestmark = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))

batches = partial(batches_by, "compiled")
by_pillow = partial(batches_by, "pillow")
SIZES = ((1, 1), (1, 50), (70, 3), (20, 24), (33, 17), (9, 9), (64, 40))


class PackedFile:
    """Images of different sizes in one file, mapped into memory; ``bad`` cannot be read, and
    ``damaged`` is found so when it is checked."""

    decoded, classes = True, ()

    def __init__(
        self, path: Path, count: int = 37, bad: Sequence[int] = (), damaged: Sequence[int] = ()
    ) -> None:
        rng = np.random.default_rng(0)
        shapes = np.array([SIZES[i % len(SIZES)] for i in range(count)])
        if not path.exists():
            rng.integers(0, 256, 7 + int(3 * (3 + shapes.prod(1)).sum()), np.uint8).tofile(path)
        self.pixels = np.memmap(path, np.uint8, "r")
        ends = 7 + (3 * shapes.prod(1) + 5).cumsum()
        self.placement = np.column_stack((ends - 3 * shapes.prod(1) - 5, shapes))
        self.placement[list(bad)] = 0
        self.damaged = frozenset(damaged)
        self.labels = np.full(count, -1)
        self.checked: list[int] = []

    def __len__(self) -> int:
        return len(self.placement)

    def check(self, indices: np.ndarray) -> None:
        for index in indices.tolist():
            self.checked.append(index)
            if index in self.damaged:
                raise BadImage(f"block {index} is damaged")

    def read(self, index: int) -> np.ndarray:
        offset, height, width = self.placement[index].tolist()
        if not height:
            raise BadImage("it was no image")
        self.check(np.array([index]))
        return self.pixels[offset : offset + 3 * height * width].reshape(height, width, 3)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.read(index))

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return f"file[{index}]"

    def identity(self, index: int) -> bytes:
        return self.name(index).encode()


def config(
    threads: int = 1, residence: ResidenceSetting = "auto", bad: float = 0.2, **options
) -> Config:
    data = DataConfig(workers=threads, residence=residence, max_bad_share=bad)
    return config_of(**{"data": data, **options})


def without_residence(given: Config) -> Config:
    return replace(given, data=replace(given.data, residence="auto", workers=0))


@pytest.fixture
def file(tmp_path: Path) -> PackedFile:
    return PackedFile(tmp_path / "pixels")


# --- what is in a batch --------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_those_of_pillow_and_the_operator(threads: int, channels_last: bool) -> None:
    steps = [(0, 0), (1, 2), (7, 3), (1, 0)]
    given = config(threads, channels_last=channels_last)
    found = batches(random_source(), given, steps)
    assert_same(found, by_pillow(random_source(), without_residence(given), steps))
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert all(batch.view_a.is_contiguous(memory_format=form) for batch in found)


def test_batches_are_those_of_dali_and_the_operator() -> None:
    pytest.importorskip("nvidia.dali", exc_type=ImportError)
    found = batches(random_source(), config(), [(0, 1)])
    assert_same(found, batches_by("dali", random_source(), config(), [(0, 1)]))


@pytest.mark.parametrize("residence", ["auto", "disk", "ram"])
def test_images_of_any_size_in_a_file(file: PackedFile, residence: ResidenceSetting) -> None:
    given = config(2, residence)
    found = batches(file, given, [(0, 0), (2, 1)])
    assert_same(found, by_pillow(file, without_residence(given), [(0, 0), (2, 1)]))


@pytest.mark.parametrize("residence", ["disk", "ram"])
def test_a_part_of_a_source(file: PackedFile, residence: ResidenceSetting) -> None:
    some = Subset(file, np.array([30, 2, 3, 4, 17, 19, 1, 0, 36]))
    given = config(1, residence, batch_size=4)
    expected = by_pillow(some, without_residence(given), [(0, 0), (1, 1)])
    assert_same(batches(some, given, [(0, 0), (1, 1)]), expected)


def test_an_epoch_can_be_entered_anywhere(file: PackedFile) -> None:
    whole = batches(file, config(), [(1, 0)])
    for start in range(5):
        assert_same(batches(file, config(), [(1, start)]), whole[start:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(file: PackedFile, world_size: int) -> None:
    steps = [(0, 0), (1, 2)]
    parts = [
        batches(file, config(), steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [
        Batch(*(torch.cat(list(tensors)) for tensors in zip(*slices, strict=True)))
        for slices in zip(*parts, strict=True)
    ]
    assert_same(joined, batches(file, config(), steps))


def test_batches_that_are_kept_stay_what_they_were(file: PackedFile) -> None:
    loader = loader_by("compiled", file, config())
    kept, copies = [], []
    for batch in loader.epoch(0):
        kept.append(batch)
        copies.append(Batch(*(tensor.clone() for tensor in batch)))
    loader.close()
    assert_same(kept, copies)


def test_eight_bits_that_a_device_normalises(
    file: PackedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that the operator is not built for: the device here is the CPU."""
    expected = batches(file, config(), [(0, 0)])
    monkeypatch.setattr(module, "are_compiled", lambda *_: False)
    found = batches(file, config(), [(0, 0)])
    assert_same(found, expected)


def test_the_views_of_a_contact_sheet(file: PackedFile) -> None:
    order = epoch_order(5, 1, len(file))[:9]
    for source in (file, random_source()):
        found = read_views(cast(Source, source), config(), 1, order)
        expected = CompiledViewReader(cast(Source, source), config())[1, order]
        for name in ("a", "b", "index"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert found[3:] == expected[3:]


@pytest.mark.parametrize("residence", ["disk", "ram"])
def test_batches_of_a_cache_are_those_of_the_files_that_it_was_made_of(
    tmp_path: Path, residence: ResidenceSetting
) -> None:
    """Of all kinds of files, some of them broken, the whole and a part; and of a damaged cache."""
    root = all_kinds(tmp_path / "images")
    file = cached(root, tmp_path / "x.pixels")
    steps = [(0, 0), (3, 1)]

    def by(loader: LoaderName, limit: int, **data) -> tuple[list[Batch], dict[int, str]]:
        given = DataConfig(max_bad_share=0.5, limit=limit, loader=loader, **data)
        opened = open_view_loader(
            open_sources(given, 5).train, config_of(data=given, batch_size=4), device=CPU
        )
        found = [batch for epoch, start in steps for batch in opened.epoch(epoch, start)]
        opened.close()
        return found, opened.bad

    for limit in (0, 11):
        expected, bad = by("pillow", limit, root=str(root), workers=0)
        cache = dict(source="cache", root=str(file), workers=2, residence=residence)
        found, bad_of_cache = by("compiled", limit, **cache)
        assert_same(found, expected)
        assert bad and bad.items() <= bad_of_cache.items()  # it may have met more, ahead

    content = bytearray(file.read_bytes())
    content[4096 + 100] ^= 1
    file.write_bytes(content)
    found, bad = by("compiled", 0, **cache)
    assert "block 0 of" in bad[0]
    assert not any((batch.index == 0).any() for batch in found)


# --- bad images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("residence", ["disk", "ram"])
def test_bad_images_are_replaced_as_by_the_other_loaders(
    tmp_path: Path, residence: ResidenceSetting, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pixels"
    source = PackedFile(path, bad=[3, 4, 36], damaged=[0, 20])
    loaders = [
        loader_by("compiled", source, config(2, residence)),
        loader_by("pillow", source, config(0)),
    ]
    found, expected = ([*loader.epoch(0), *loader.epoch(1)] for loader in loaders)
    assert_same(found, expected)
    assert loaders[0].bad == loaders[1].bad
    assert loaders[0].bad[3] == "it was no image"
    assert loaders[0].bad[20] == "block 20 is damaged"
    for loader in loaders:
        loader.close()
    seen = torch.cat([batch.index for batch in found]).tolist()
    assert not {0, 3, 4, 20, 36} & set(seen)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_too_many_bad_images(tmp_path: Path, share: float) -> None:
    source = PackedFile(tmp_path / "pixels", bad=[3, 4, 5], damaged=[6, 7])
    loader = loader_by("compiled", source, config(bad=share))
    with pytest.raises(UserError, match=r"of 37 images.* are unreadable.*file\["):
        list(loader.epoch(0))
    loader.close()


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    source = PackedFile(tmp_path / "pixels", bad=range(37))
    for share in (0.1, 1.0):
        loader = loader_by("compiled", source, config(bad=share))
        with pytest.raises(UserError, match="of 37 images"):
            next(loader.epoch(0))
        loader.close()


def test_what_is_read_into_memory_is_checked_before(tmp_path: Path) -> None:
    source = PackedFile(tmp_path / "pixels", bad=[2])
    loader_by("compiled", source, config(residence="ram"))
    assert source.checked == [i for i in range(37) if i != 2]


# --- waits and ends ------------------------------------------------------------------------------


class Hanging(PackedFile):
    """A disk that does not answer."""

    answers = threading.Event()

    def check(self, indices: np.ndarray) -> None:
        self.answers.wait()


def test_waiting_ends_in_time_or_where_the_run_is_to_stop(tmp_path: Path) -> None:
    source = Hanging(tmp_path / "pixels")
    data = DataConfig(batch_timeout=0.3, workers=1)
    loader = loader_by("compiled", source, config_of(data=data))
    with pytest.raises(NoBatch, match=r"within 0.3 seconds.*data\.batch_timeout"):
        next(loader.epoch(0))
    loader.close()

    def check() -> None:
        raise InterruptedError

    loader = loader_by("compiled", source, config(), check=check)
    with pytest.raises(InterruptedError):
        next(loader.epoch(0))
    loader.close()
    source.answers.set()


def test_no_process_is_started_and_no_thread_left(file: PackedFile) -> None:
    before = set(threading.enumerate())
    loader = loader_by("compiled", file, config(2))
    first = next(loader.epoch(0))
    assert not multiprocessing.active_children()
    loader.close()
    assert set(threading.enumerate()) <= before
    assert_same([next(loader.epoch(0))], [first])  # and starts again after the end
    loader.close()


def test_the_global_interpreter_lock_is_free_while_views_are_made() -> None:
    """The training thread runs on: it does so several times within one batch."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 600, 600, 3), np.uint8)
    made = threading.Event()

    def make() -> None:
        images = torch.tensor([[0, 600, 600]]).repeat(200, 1)
        draws = torch.zeros(1, 200, 16, dtype=torch.float64)
        draws[..., 2:4], draws[..., 15] = 600, 256
        views = torch.empty(200, 3, 224, 224).to(memory_format=torch.channels_last)
        constants = torch.zeros(3), torch.ones(3)
        flat = torch.from_numpy(pixels.reshape(-1))
        torch.ops.sacl_fast.augment_packed(flat, images, draws, 3, *constants, views, 1)
        made.set()

    thread = threading.Thread(target=make)
    thread.start()
    turns = 0
    while not made.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 3


# --- what is chosen ------------------------------------------------------------------------------


def test_auto_takes_it_for_pixels(
    file: PackedFile, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for source in (file, random_source(), Subset(file, np.arange(20))):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            loader = open_view_loader(cast(Source, source), config(), device=CPU)
        assert isinstance(loader._stream, PixelStream)
        assert any(line.startswith("views by compiled operator (") for line in caplog.messages)
        assert sum(line.startswith("pixels: ") for line in caplog.messages) == 1


def test_a_source_that_is_packed_says_so(file: PackedFile) -> None:
    packed = as_packed(random_source())
    assert packed is not None and packed.placement.shape == (37, 3)
    assert as_packed(cast(Source, file)) is file

    class Own:
        """Of pixels, but not in one buffer."""

        decoded = True
        labels, classes = np.zeros(3), ()

    assert as_packed(cast(Source, Own())) is None
    assert as_packed(Subset(cast(Source, Own()), np.arange(2))) is None
    some = cast(Packed, Subset(file, np.array([5, 1])))
    assert np.array_equal(some.placement, file.placement[[5, 1]])


def test_batches_ahead_are_bounded_by_memory() -> None:
    small = batches_ahead(config(), 8, torch.float32)
    assert small == config().data.prefetch
    large = config(views=replace(config().views, size=224))
    assert batches_ahead(large, 1024, torch.float32) == 1
    assert batches_ahead(large, 256, torch.float32) == 3
    assert batches_ahead(large, 256, torch.bfloat16) == 4


def test_a_disk_is_told_of_batches_before_they_are_read() -> None:
    told: list[int] = []
    tasks = iter([(0, np.array([i])) for i in range(6)])
    for _, (index,) in announced(tasks, lambda indices: told.append(int(indices[0]))):
        assert told[-1] == min(5, index + 2)
    assert told == list(range(6))
