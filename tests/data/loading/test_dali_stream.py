"""Batches by DALI: those of the torchvision path, entered anywhere, shared out."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import Config, DaliConfig, DataConfig, ViewsConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.batch import Batch
from sacl_fast.data.loading.contact_sheet import contact_sheet
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.data.loading.open import open_view_loader
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from tests.data.loading.cases import (
    CPU,
    assert_same,
    batches_by,
    dali_config,
    loader_by,
    random_source,
)

pytest.importorskip("nvidia.dali", exc_type=ImportError)

from sacl_fast.data.loading.dali_stream import DaliStream, batches_ahead
from sacl_fast.data.views import dali_pipeline
from sacl_fast.data.views.compiled import CompiledViews
from sacl_fast.data.views.dali import ViewPipeline
from sacl_fast.data.views.dali_pipeline import DaliError

pytestmark = pytest.mark.usefixtures("compiled_views")

source = pytest.fixture(random_source)
batches = partial(batches_by, "dali")
opened = partial(loader_by, "dali")
by_torchvision = partial(loader_by, "torchvision")


def test_the_batches_are_those_of_torchvision(
    source: ArraySource, jpeg_folder: Path, compiled_views: bool
) -> None:
    settings = dali_config(root=jpeg_folder)
    # Some 5 of 255: the images are noise, and half of them solarised. Not 1 of 255 where only the
    # crop's rounding differs.
    allowed = 0.015 if compiled_views else 0.1
    for images in (source, open_sources(settings.data, 0).train):
        ours = batches(images, settings, [(0, 0), (1, 0)])
        loader = by_torchvision(images, settings)
        theirs = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
        assert len(ours) == 2 * (len(images) // 8)  # the rest does not fill a batch
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.index, other.index)
            assert torch.equal(one.label, other.label)
            for ours_, theirs_ in ((one.view_a, other.view_a), (one.view_b, other.view_b)):
                assert ours_.shape == theirs_.shape == (8, 3, 16, 16)
                assert ours_.dtype == torch.float32
                assert ours_.is_contiguous(memory_format=torch.channels_last)
                assert (ours_ - theirs_).abs().mean() < allowed


@pytest.mark.gpu
def test_on_a_gpu_the_batches_are_those_of_the_cpu(
    source: ArraySource, jpeg_folder: Path, compiled_views: bool
) -> None:
    gpu = torch.device("cuda", 0)
    if compiled_views and (why_not := compiled.cuda_obstacle(gpu)) is not None:
        pytest.skip(why_not)
    settings = dali_config(root=jpeg_folder)
    for images in (source, open_sources(settings.data, 0).train):
        on_cpu = by_torchvision(images, settings)
        on_gpu = open_view_loader(images, settings, device=gpu)
        for epoch in (0, 1):
            for ours, theirs in zip(on_gpu.epoch(epoch), on_cpu.epoch(epoch), strict=True):
                assert torch.equal(ours.index, theirs.index)
                for a, b in ((ours.view_a, theirs.view_a), (ours.view_b, theirs.view_b)):
                    assert a.device == gpu and a.dtype in (torch.bfloat16, torch.float16)
                    assert a.is_contiguous(memory_format=torch.channels_last)
                    # Decoders, the type's digits, and what solarises at its threshold.
                    assert (a.float().cpu() - b).abs().mean() < 0.12
        on_gpu.close()


def test_the_loader_is_made_of_what_was_decided(source: ArraySource, compiled_views: bool) -> None:
    loader = opened(source, dali_config())
    next(loader.epoch(0))
    stream = loader._stream
    assert isinstance(stream, DaliStream)
    assert isinstance(stream._pipeline, CompiledViews if compiled_views else ViewPipeline)
    loader.close()


def test_nothing_goes_on_after_the_end(source: ArraySource, jpeg_folder: Path) -> None:
    for images in (source, open_sources(dali_config(root=jpeg_folder).data, 0).train):
        before = set(threading.enumerate())
        loader = opened(images, dali_config())
        next(loader.epoch(0))
        loader.close()
        assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("views")]


def test_readers_do_not_change_the_batches(source: ArraySource, jpeg_folder: Path) -> None:
    for images in (source, open_sources(dali_config(root=jpeg_folder).data, 0).train):
        expected = batches(images, dali_config(), [(0, 0), (1, 0)])
        assert_same(batches(images, dali_config(readers=2), [(0, 0), (1, 0)]), expected)


def test_an_epoch_can_be_entered_anywhere(source: ArraySource) -> None:
    whole = batches(source, dali_config(), [(0, 0), (1, 0), (2, 0)])
    assert_same(batches(source, dali_config(), [(1, 3), (2, 0)]), whole[7:])
    assert_same(batches(source, dali_config(), [(2, 1), (0, 2)]), [*whole[9:], *whole[2:4]])
    loader = opened(source, dali_config())
    next(loader.epoch(0))
    assert_same(list(loader.epoch(0)), whole[:4])  # the abandoned one left no trace
    loader.close()
    assert_same(list(loader.epoch(1)), whole[4:8])  # nor did the end
    loader.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(source: ArraySource, world_size: int) -> None:
    whole = batches(source, dali_config(), [(0, 1), (1, 0)])
    shares = [
        batches(source, dali_config(), [(0, 1), (1, 0)], rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [Batch(*map(torch.cat, zip(*step, strict=True))) for step in zip(*shares, strict=True)]
    assert_same(joined, whole)


def test_threads_and_batches_ahead_change_nothing(source: ArraySource) -> None:
    expected = batches(source, dali_config(), [(0, 0)])
    for dali in (DaliConfig(threads=3, prefetch=1, readers=0), DaliConfig(prefetch=5, readers=0)):
        settings = dali_config(data=DataConfig(dali=dali))
        assert_same(batches(source, settings, [(0, 0)]), expected)


def test_memory_bounds_the_batches_ahead() -> None:
    views = ViewsConfig(size=224)
    batch = 2 * 64 * 3 * 224**2 * 4 / 2**30  # GiB of both views
    for memory, ahead in ((10.0, 4), (2.5 * batch, 2), (0.1 * batch, 1)):
        data = DataConfig(dali=DaliConfig(prefetch=4, memory=memory))
        settings = Config(views=views, data=data)
        assert batches_ahead(settings, 64, torch.float32) == ahead
    assert (
        batches_ahead(
            Config(views=views, data=DataConfig(dali=DaliConfig(memory=1.1 * batch))),
            64,
            torch.float16,
        )
        == 2
    )


def test_batches_that_are_kept_stay_what_they_were(source: ArraySource) -> None:
    loader = opened(source, dali_config())
    kept = list(loader.epoch(0))
    copies = [Batch(*(tensor.clone() for tensor in batch)) for batch in kept]
    list(loader.epoch(1))
    loader.close()
    assert_same(kept, copies)


def test_contiguous_format_can_be_asked_for(source: ArraySource) -> None:
    (batch, *_) = batches(source, dali_config(channels_last=False), [(0, 0)])
    assert batch.view_a.is_contiguous()


def test_batch_sizes_that_cannot_be(source: ArraySource) -> None:
    with pytest.raises(UserError, match="only 37 training images"):
        opened(source, dali_config(batch_size=38))


def test_a_killed_reader_is_an_error(source: ArraySource) -> None:
    loader = opened(source, dali_config(readers=2))
    with pytest.raises(NoBatch, match=r"killed by SIGKILL.*data\.dali\.readers"):
        for epoch in range(1000):
            for _ in loader.epoch(epoch):
                for worker in multiprocessing.active_children()[:1]:
                    os.kill(worker.pid, signal.SIGKILL)  # type: ignore
    loader.close()
    assert not multiprocessing.active_children()


def test_a_closed_pipeline_is_gone(jpeg_folder: Path, compiled_views: bool) -> None:
    """Its threads and buffers too, which are not to wait for a collection."""
    settings = dali_config(root=jpeg_folder)
    before = set(dali_pipeline._alive)
    loader = opened(open_sources(settings.data, 0).train, settings)
    gc.disable()
    try:
        next(loader.epoch(0))
        assert set(dali_pipeline._alive) - before
        loader.close()
        assert set(dali_pipeline._alive) <= before
    finally:
        gc.enable()


def test_a_failure_that_is_no_images_is_passed_on(
    jpeg_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dali_config(root=jpeg_folder)
    loader = opened(open_sources(settings.data, 0).train, settings)
    monkeypatch.setattr("sacl_fast.data.views.dali_pipeline.FedPipeline._outputs", fail)
    with pytest.raises(DaliError, match="out of memory"):
        next(loader.epoch(0))
    loader.close()


def fail(pipeline) -> None:
    pipeline._pipeline.run()
    raise DaliError("out of memory")


def test_workers_of_another_loader_start_beside_a_pipeline(source: ArraySource) -> None:
    """Evaluation forks workers while the pipeline lives, and after it is gone."""
    settings = dali_config(readers=1)
    settings = replace(settings, data=replace(settings.data, workers=2))
    loader = opened(source, settings)
    evaluation = EvalLoader(source, np.arange(37), settings, CPU)
    for epoch in range(2):
        list(loader.epoch(epoch))
        assert sum(len(images) for images, _ in evaluation) == 37
        loader.close()
    assert len(list(evaluation)) == len(evaluation)


def test_a_pipeline_that_nobody_closed_does_not_stop_a_forked_process(jpeg_folder: Path) -> None:
    settings = dali_config(root=jpeg_folder)
    loader = opened(open_sources(settings.data, 0).train, settings)
    gc.disable()
    try:
        next(loader.epoch(0))
        del loader
        process = multiprocessing.get_context("fork").Process(target=gc.collect)
        process.start()
        process.join(30)
        assert process.exitcode == 0
    finally:
        gc.enable()


def test_contact_sheet_by_dali(jpeg_folder: Path, compiled_views: bool) -> None:
    settings = dali_config(root=jpeg_folder, views=ViewsConfig(size=32))
    source = open_sources(settings.data, 0).train
    ours = contact_sheet(source, settings, count=4)
    plain = replace(settings, data=replace(settings.data, loader="torchvision"))
    theirs = contact_sheet(source, plain, count=4)
    difference = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs))
    assert difference.mean() < (0.3 if compiled_views else 1)
    assert compiled_views or difference.any()


def test_decoded_images_may_differ_in_size(compiled_views: bool) -> None:
    """As those of a cache do."""
    source = MixedSource()
    batches_ = batches(source, dali_config(), [(0, 0)])
    loader = by_torchvision(source, dali_config())
    for ours, theirs in zip(batches_, loader.epoch(0), strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert (ours.view_a - theirs.view_a).abs().mean() < (0.015 if compiled_views else 0.1)


class MixedSource(ArraySource):
    """Images of two sizes."""

    def __init__(self) -> None:
        vars(self).update(vars(random_source()))

    def read(self, index: int) -> np.ndarray:
        return self.images[index][: 20 - index % 2]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.read(index))
