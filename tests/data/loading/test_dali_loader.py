"""Batches by DALI: those of the torchvision path, entered anywhere, shared out, with bad files."""

from __future__ import annotations

import gc
import io
import logging
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

from sacl_fast.config import Config, DaliConfig, DataConfig, ViewConfig, ViewsConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.contact_sheet import contact_sheet
from sacl_fast.data.loading.readers import ViewReader
from sacl_fast.data.loading.torch_loader import Batch, EvalLoader, ViewLoader
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from tests.data.loading.cases import CPU, assert_same, batches_by, config_of, random_source

pytest.importorskip("nvidia.dali", exc_type=ImportError)

from sacl_fast.data.loading import dali_loader
from sacl_fast.data.loading.dali_loader import DaliViewLoader, batches_ahead
from sacl_fast.data.views.compiled import CompiledViews
from sacl_fast.data.views.dali import DaliError, ViewPipeline


@pytest.fixture(params=["compiled", "by DALI alone"], autouse=True)
def compiled_views(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test with either of those that make the views."""
    wanted = request.param == "compiled"
    if wanted and compiled.obstacle() is not None:
        pytest.skip(str(compiled.obstacle()))
    monkeypatch.setattr(dali_loader, "are_compiled", lambda *_: wanted)
    return wanted


source = pytest.fixture(random_source)
batches = partial(batches_by, DaliViewLoader)


def config(readers: int = 0, root: Path | None = None, **options) -> Config:
    dali = DaliConfig(readers=readers, threads=1, prefetch=2)
    data = DataConfig(root=root and str(root), dali=dali, workers=0, loader="dali")
    return config_of(**{"data": data, **options})


def encoded(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 JPEGs of different sizes, nested, without labels."""
    rng = np.random.default_rng(1)
    for i in range(30):
        small = rng.integers(0, 256, (4, 4, 3), np.uint8)
        pixels = np.asarray(Image.fromarray(small).resize((24 + i, 20 + 2 * (i % 7)), 3))
        file = tmp_path / "images" / f"{i % 3}" / "deep" / f"{i:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels, quality=90))
    return tmp_path / "images"


def file_of(folder: Path, index: int) -> Path:
    return sorted(folder.rglob("*.*"))[index]


def test_the_batches_are_those_of_torchvision(
    source: ArraySource, folder: Path, compiled_views: bool
) -> None:
    settings = config(root=folder)
    # Some 5 of 255: the images are noise, and half of them solarised. Not 1 of 255 where only the
    # crop's rounding differs.
    allowed = 0.015 if compiled_views else 0.1
    for images in (source, open_sources(settings.data, 0).train):
        ours = batches(images, settings, [(0, 0), (1, 0)])
        loader = ViewLoader(images, settings, device=CPU)
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


def test_the_loader_is_made_of_what_was_decided(source: ArraySource, compiled_views: bool) -> None:
    loader = DaliViewLoader(source, config(), device=CPU)
    next(loader.epoch(0))
    assert isinstance(loader._pipeline, CompiledViews if compiled_views else ViewPipeline)
    loader.close()


def test_nothing_goes_on_after_the_end(source: ArraySource, folder: Path) -> None:
    for images in (source, open_sources(config(root=folder).data, 0).train):
        loader = DaliViewLoader(images, config(), device=CPU)
        next(loader.epoch(0))
        loader.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("views")]


def test_readers_do_not_change_the_batches(source: ArraySource, folder: Path) -> None:
    for images in (source, open_sources(config(root=folder).data, 0).train):
        expected = batches(images, config(), [(0, 0), (1, 0)])
        assert_same(batches(images, config(readers=2), [(0, 0), (1, 0)]), expected)


def test_an_epoch_can_be_entered_anywhere(source: ArraySource) -> None:
    whole = batches(source, config(), [(0, 0), (1, 0), (2, 0)])
    assert_same(batches(source, config(), [(1, 3), (2, 0)]), whole[7:])
    assert_same(batches(source, config(), [(2, 1), (0, 2)]), [*whole[9:], *whole[2:4]])
    loader = DaliViewLoader(source, config(), device=CPU)
    next(loader.epoch(0))
    assert_same(list(loader.epoch(0)), whole[:4])  # the abandoned one left no trace
    loader.close()
    assert_same(list(loader.epoch(1)), whole[4:8])  # nor did the end


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(source: ArraySource, world_size: int) -> None:
    whole = batches(source, config(), [(0, 1), (1, 0)])
    shares = [
        batches(source, config(), [(0, 1), (1, 0)], rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [Batch(*map(torch.cat, zip(*step, strict=True))) for step in zip(*shares, strict=True)]
    assert_same(joined, whole)


def test_threads_and_batches_ahead_change_nothing(source: ArraySource) -> None:
    expected = batches(source, config(), [(0, 0)])
    for dali in (DaliConfig(threads=3, prefetch=1, readers=0), DaliConfig(prefetch=5, readers=0)):
        settings = config(data=DataConfig(dali=dali))
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
    loader = DaliViewLoader(source, config(), device=CPU)
    kept = list(loader.epoch(0))
    copies = [Batch(*(tensor.clone() for tensor in batch)) for batch in kept]
    list(loader.epoch(1))
    loader.close()
    assert_same(kept, copies)


def test_contiguous_format_can_be_asked_for(source: ArraySource) -> None:
    (batch, *_) = batches(source, config(channels_last=False), [(0, 0)])
    assert batch.view_a.is_contiguous()


def test_batch_sizes_that_cannot_be(source: ArraySource) -> None:
    with pytest.raises(UserError, match="only 37 training images"):
        DaliViewLoader(source, config(batch_size=38), device=CPU)


# --- files ---------------------------------------------------------------------------------------


def test_every_format_and_mode_looks_as_by_torchvision(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    pixels = np.asarray(small.resize((41, 33), 3))
    alpha = np.dstack([pixels, np.full(pixels.shape[:2], 99, np.uint8)])
    wide = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE)
    kinds = {
        "gray.jpg": encoded(pixels, mode="L"),
        "cmyk.jpg": encoded(pixels, mode="CMYK"),
        "progressive.jpg": encoded(pixels, progressive=True),
        "trailing.jpg": encoded(pixels) + b"\0" * 500,
        "rgb.jpg": encoded(pixels, keep_rgb=True),
        "rgb.png": encoded(pixels, "PNG"),
        "gray.png": encoded(pixels, "PNG", "L"),
        "one-bit.png": encoded(pixels, "PNG", "1"),
        "alpha.png": encoded(alpha, "PNG", "RGBA"),
        "x.bmp": encoded(pixels, "BMP"),
        "x.gif": encoded(pixels, "GIF"),
        "x.webp": encoded(pixels, "WEBP"),
        "x.tif": encoded(pixels, "TIFF"),
        "x.ppm": encoded(pixels, "PPM"),
        "wrong-name.png": encoded(pixels),
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    wide.save(tmp_path / "wide.png")
    palette.save(tmp_path / "palette.png", transparency=3)
    count = len(kinds) + 2
    plain = ViewConfig(
        crop_scale=(1.0, 1.0), crop_ratio=(1.2, 1.2), jitter=0, grayscale=0, blur=0, solarize=0
    )
    views = ViewsConfig(size=16, a=plain, b=plain)
    settings = config(root=tmp_path, batch_size=count, views=views)
    source = open_sources(settings.data, 0).train
    (ours,) = batches(source, settings, [(0, 0)])
    (theirs,) = ViewLoader(source, settings, device=CPU).epoch(0)
    assert torch.equal(ours.index, theirs.index)
    difference = (ours.view_a - theirs.view_a).abs().mean((1, 2, 3)) * 255 * 0.226
    for index, of_image in zip(ours.index.tolist(), difference.tolist(), strict=True):
        assert of_image < 1.0, source.name(index)


def spoil(folder: Path) -> dict[int, str]:
    """Break files in the ways that a look at header and end tells; index to what is said."""
    whole = file_of(folder, 4).read_bytes()
    file_of(folder, 4).write_bytes(whole[: len(whole) // 2])
    file_of(folder, 5).write_bytes(b"")
    file_of(folder, 11).write_bytes(b"no image at all")
    return {4: "runcated", 5: "empty", 11: "no known image format"}


@pytest.mark.parametrize("readers", [0, 2])
def test_bad_images_are_replaced_and_named_once(
    folder: Path, readers: int, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = spoil(folder)
    settings = config(readers, folder)
    source = open_sources(settings.data, 0).train
    with caplog.at_level(logging.WARNING):
        loader = DaliViewLoader(source, settings, device=CPU)
        ours = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
        loader.close()
    assert loader.bad.keys() == reasons.keys()
    for index, reason in reasons.items():
        assert reason in loader.bad[index]
        assert sum(source.name(index) in record.message for record in caplog.records) == 1
    theirs = ViewLoader(source, settings, device=CPU)
    expected = [batch.index for epoch in range(4) for batch in theirs.epoch(epoch)]
    assert all(torch.equal(b.index, i) for b, i in zip(ours, expected, strict=True))


@pytest.mark.parametrize("readers", [0, 2])
def test_what_only_decoding_shows_is_found_late(
    folder: Path, readers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A file with a good header and end: DALI fails in the middle of an epoch, and goes on."""
    settings = config(readers, folder)
    source = open_sources(settings.data, 0).train
    intact = batches(source, settings, [(0, 0), (1, 0)])
    broken = 7
    file_of(folder, broken).write_bytes(refused_jpeg(file_of(folder, broken).read_bytes()))
    with caplog.at_level(logging.WARNING):
        loader = DaliViewLoader(source, settings, device=CPU)
        ours = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
        loader.close()
    assert list(loader.bad) == [broken]
    assert source.name(broken) in caplog.text
    for one, other in zip(ours, intact, strict=True):
        kept = other.index != broken
        assert torch.equal(one.index[kept], other.index[kept])
        assert torch.equal(one.view_a[kept], other.view_a[kept])
        assert (one.index[~kept] == broken + 1).all()  # the next readable one


def damaged_png(data: bytes) -> bytes:
    """Header and end are whole."""
    return data[: len(data) // 2] + data[-12:]


def refused_jpeg(data: bytes) -> bytes:
    """Neither DALI nor Pillow decodes it, and header and end are whole."""
    tables = data.find(b"\xff\xc4")  # Huffman's
    return data[: tables + 4] + b"\xff" * 20 + data[tables + 24 :]


def wrong_sum(data: bytes) -> bytes:
    """A PNG that Pillow decodes and DALI does not."""
    end = data.rfind(b"IEND") - 4
    return data[: end - 4] + bytes(4) + data[end:]


@pytest.mark.parametrize(
    ("name", "kind", "spoilt", "skipped"),
    [
        ("x.png", "PNG", damaged_png, True),
        ("x.jpg", "JPEG", refused_jpeg, True),
        ("x.png", "PNG", wrong_sum, False),
    ],
)
@pytest.mark.parametrize("place", [0, 5, 29])
def test_what_dali_refuses_is_left_to_pillow_in_views_as_well(
    folder: Path, name: str, kind: str, spoilt, skipped: bool, place: int
) -> None:
    settings = config(root=folder)
    order = epoch_order(settings.seed, 0, 30)
    path = file_of(folder, int(order[place]))
    pixels = np.asarray(Image.open(path))
    path.unlink()
    path.with_name(f"{path.stem}{name}").write_bytes(spoilt(encoded(pixels, kind)))
    source = open_sources(settings.data, 0).train
    views = dali_loader.dali_views(source, settings, 0, order)
    assert (len(views.bad), views.missed) == ((1, 1) if skipped else (0, 0))
    assert views.index.tolist() == ViewReader(source, settings)[0, order].index.tolist()
    contact_sheet(source, settings, count=30)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    spoilt, at = bytearray(data), int(rng.integers(len(data)))
    match int(rng.integers(5)):
        case 0:
            spoilt[at] ^= 1 << int(rng.integers(8))
        case 1:
            del spoilt[at : at + int(rng.integers(1, 40))]
        case 2:
            spoilt[at:at] = rng.bytes(int(rng.integers(1, 40)))
        case 3:
            del spoilt[at:-12]
        case 4:
            spoilt = spoilt[:at]
    return bytes(spoilt)


def test_both_loaders_skip_the_same_damaged_files(tmp_path: Path) -> None:
    """But for JPEGs with damage in their middle, which DALI may decode as far as they go."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (5, 6, 3), np.uint8), np.ones((6, 6, 1), np.uint8))
    for kind in ("PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"):
        for i in range(24):
            data = encoded(pixels, kind)
            if i % 2:
                data = data[: len(data) // 3] if kind == "JPEG" else damaged(data, rng)
            ending = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
            (tmp_path / f"{i:02}.{ending}").write_bytes(data)
    settings = config(root=tmp_path, batch_size=12)
    settings = replace(settings, data=replace(settings.data, max_bad_share=0.9))
    source = open_sources(settings.data, 0).train
    skipped, orders = [], []
    for kind in (ViewLoader, DaliViewLoader):
        loader = kind(source, settings, device=CPU)
        orders.append([batch.index.tolist() for epoch in (0, 1) for batch in loader.epoch(epoch)])
        loader.close()
        skipped.append(loader.bad)
    assert skipped[0].keys() == skipped[1].keys()
    assert len(skipped[0]) > 30
    assert orders[0] == orders[1]


def test_a_killed_reader_is_an_error(source: ArraySource) -> None:
    loader = DaliViewLoader(source, config(readers=2), device=CPU)
    with pytest.raises(NoBatch, match=r"killed by SIGKILL.*data\.dali\.readers"):
        for epoch in range(1000):
            for _ in loader.epoch(epoch):
                for worker in multiprocessing.active_children()[:1]:
                    os.kill(worker.pid, signal.SIGKILL)  # type: ignore
    loader.close()
    assert not multiprocessing.active_children()


def test_a_failure_that_is_no_images_is_passed_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(root=folder)
    loader = DaliViewLoader(open_sources(settings.data, 0).train, settings, device=CPU)
    monkeypatch.setattr("sacl_fast.data.views.dali.FedPipeline._outputs", fail)
    with pytest.raises(DaliError, match="out of memory"):
        next(loader.epoch(0))
    loader.close()


def fail(pipeline, *stream) -> None:
    pipeline._pipeline.run(*stream)
    raise DaliError("out of memory")


@pytest.mark.parametrize("readers", [0, 2])
def test_too_many_bad_images(folder: Path, readers: int) -> None:
    spoil(folder)
    settings = config(readers, folder)
    settings = replace(settings, data=replace(settings.data, max_bad_share=0.05))
    loader = DaliViewLoader(open_sources(settings.data, 0).train, settings, device=CPU)
    with pytest.raises(UserError, match=r"unreadable, which is too many.*max_bad_share is 0.05"):
        for epoch in range(4):
            list(loader.epoch(epoch))
    loader.close()


def test_nothing_but_bad_images(folder: Path) -> None:
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"no image")
    settings = config(root=folder)
    loader = DaliViewLoader(open_sources(settings.data, 0).train, settings, device=CPU)
    with pytest.raises(UserError, match="unreadable"):
        next(loader.epoch(0))


def test_workers_of_another_loader_start_beside_a_pipeline(source: ArraySource) -> None:
    """Evaluation forks workers while the pipeline lives, and after it is gone."""
    settings = config(readers=1)
    settings = replace(settings, data=replace(settings.data, workers=2))
    loader = DaliViewLoader(source, settings, device=CPU)
    for epoch in range(2):
        list(loader.epoch(epoch))
        images = [images for images, _ in EvalLoader(source, np.arange(37), settings, CPU)]
        assert sum(map(len, images)) == 37
        loader.close()
    assert len(list(EvalLoader(source, np.arange(37), settings, CPU))) == len(images)


def test_a_pipeline_that_nobody_closed_does_not_stop_a_forked_process(folder: Path) -> None:
    settings = config(root=folder)
    loader = DaliViewLoader(open_sources(settings.data, 0).train, settings, device=CPU)
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


def test_contact_sheet_by_dali(folder: Path, compiled_views: bool) -> None:
    settings = config(root=folder, views=ViewsConfig(size=32))
    source = open_sources(settings.data, 0).train
    ours = contact_sheet(source, settings, count=4)
    plain = replace(settings, data=replace(settings.data, loader="torchvision"))
    theirs = contact_sheet(source, plain, count=4)
    difference = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs))
    assert difference.mean() < (0.3 if compiled_views else 1)
    assert compiled_views or difference.any()
