"""Image files of every kind by DALI: decoded as by torchvision, skipped where they are bad."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.contact_sheet import contact_sheet
from sacl_fast.data.loading.readers import ViewReader
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError
from tests.data.loading.cases import (
    batches_by,
    dali_config,
    encoded,
    loader_by,
    random_source,
)

pytest.importorskip("nvidia.dali", exc_type=ImportError)

from sacl_fast.data.loading import dali_stream

pytestmark = pytest.mark.usefixtures("compiled_views")

source = pytest.fixture(random_source)
batches = partial(batches_by, "dali")
opened = partial(loader_by, "dali")
by_torchvision = partial(loader_by, "torchvision")


def file_of(folder: Path, index: int) -> Path:
    return sorted(folder.rglob("*.*"))[index]


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
    settings = dali_config(root=tmp_path, batch_size=count, views=views)
    source = open_sources(settings.data, 0).train
    (ours,) = batches(source, settings, [(0, 0)])
    (theirs,) = by_torchvision(source, settings).epoch(0)
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
    jpeg_folder: Path, readers: int, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = spoil(jpeg_folder)
    settings = dali_config(readers, jpeg_folder)
    source = open_sources(settings.data, 0).train
    with caplog.at_level(logging.WARNING):
        loader = opened(source, settings)
        ours = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
        loader.close()
    assert loader.bad.keys() == reasons.keys()
    for index, reason in reasons.items():
        assert reason in loader.bad[index]
        assert sum(source.name(index) in record.message for record in caplog.records) == 1
    theirs = by_torchvision(source, settings)
    expected = [batch.index for epoch in range(4) for batch in theirs.epoch(epoch)]
    assert all(torch.equal(b.index, i) for b, i in zip(ours, expected, strict=True))


@pytest.mark.parametrize("readers", [0, 2])
def test_what_only_decoding_shows_is_found_late(
    jpeg_folder: Path, readers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A file with a good header and end: DALI fails in the middle of an epoch, and goes on."""
    settings = dali_config(readers, jpeg_folder)
    source = open_sources(settings.data, 0).train
    intact = batches(source, settings, [(0, 0), (1, 0)])
    broken = 7
    path = file_of(jpeg_folder, broken)
    path.write_bytes(refused_jpeg(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        loader = opened(source, settings)
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
@pytest.mark.parametrize("position", [0, 5, 29])
def test_what_dali_refuses_is_left_to_pillow_in_views_as_well(
    jpeg_folder: Path, name: str, kind: str, spoilt, skipped: bool, position: int
) -> None:
    settings = dali_config(root=jpeg_folder)
    order = epoch_order(settings.seed, 0, 30)
    path = file_of(jpeg_folder, int(order[position]))
    pixels = np.asarray(Image.open(path))
    path.unlink()
    path.with_name(f"{path.stem}{name}").write_bytes(spoilt(encoded(pixels, kind)))
    source = open_sources(settings.data, 0).train
    views = dali_stream.dali_views(source, settings, 0, order)
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
    settings = dali_config(root=tmp_path, batch_size=12)
    settings = replace(settings, data=replace(settings.data, max_bad_share=0.9))
    source = open_sources(settings.data, 0).train
    skipped, orders = [], []
    for open_ in (by_torchvision, opened):
        loader = open_(source, settings)
        orders.append([batch.index.tolist() for epoch in (0, 1) for batch in loader.epoch(epoch)])
        loader.close()
        skipped.append(loader.bad)
    assert skipped[0].keys() == skipped[1].keys()
    assert len(skipped[0]) > 30
    assert orders[0] == orders[1]


@pytest.mark.parametrize("readers", [0, 2])
def test_too_many_bad_images(jpeg_folder: Path, readers: int) -> None:
    spoil(jpeg_folder)
    settings = dali_config(readers, jpeg_folder)
    settings = replace(settings, data=replace(settings.data, max_bad_share=0.05))
    loader = opened(open_sources(settings.data, 0).train, settings)
    with pytest.raises(UserError, match=r"unreadable, which is too many.*max_bad_share is 0.05"):
        for epoch in range(4):
            list(loader.epoch(epoch))
    loader.close()


def test_nothing_but_bad_images(jpeg_folder: Path) -> None:
    for file in jpeg_folder.rglob("*.jpg"):
        file.write_bytes(b"no image")
    settings = dali_config(root=jpeg_folder)
    loader = opened(open_sources(settings.data, 0).train, settings)
    with pytest.raises(UserError, match="unreadable"):
        next(loader.epoch(0))
    loader.close()
