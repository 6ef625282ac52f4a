"""Batches from a cache are those from the source that it was made of, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import Config, DataConfig
from sacl_fast.config.choices import Backend, LoaderName
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.pixel_file import PixelFile
from sacl_fast.data.loading.open import read_views, resolve_loader
from sacl_fast.data.loading.pixel_stream import PixelReader
from sacl_fast.data.loading.residence import Pixels
from sacl_fast.engine.trainer import train
from sacl_fast.errors import UserError
from tests.caching.cases import cached, in_a_process
from tests.data.loading.cases import CPU, assert_same, batches_by, config_of, encoded, loader_by

STEPS = [(0, 0), (1, 2)]  # an epoch, and the rest of one


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 images of different sizes, of which two are broken; one is grey, one CMYK, one a GIF."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for i in range(29):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        pixels = np.asarray(small.resize((24 + i, 20 + 2 * (i % 7)), Image.Resampling.BICUBIC))
        mode = {3: "L", 4: "CMYK"}.get(i, "RGB")
        file = root / "ab"[i % 2] / f"{i:02}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(pixels, "GIF" if i == 5 else "JPEG", mode))
    (root / "b" / "07.jpg").write_bytes((root / "b" / "07.jpg").read_bytes()[:300])
    (root / "a" / "08.jpg").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def cache(root: Path) -> Path:
    return cached(root, root.with_name(f"{root.name}.pixels"))


def data(path: Path, **options) -> DataConfig:
    source = "cache" if path.suffix == ".pixels" else "folder"
    return DataConfig(source=source, root=str(path), max_bad_share=0.2, **options)


def config_on(path: Path, loader: LoaderName, backend: Backend, **options) -> Config:
    config = config_of(data=data(path, loader=loader, **options), backend=backend)
    try:
        resolve_loader(config, CPU)
    except UserError as error:
        pytest.skip(str(error))
    return config


@pytest.mark.parametrize(
    ("loader", "backend", "workers"),
    [
        *((loader, "auto", workers) for loader in ("torchvision", "pillow") for workers in (0, 2)),
        ("dali", "auto", 2),
        ("dali", "torch", 0),
    ],
)
def test_batches(
    loader: LoaderName, backend: Backend, workers: int, root: Path, cache: Path
) -> None:
    found = []
    for path, count in ((root, 0), (cache, workers)):
        config = config_on(path, loader, backend, workers=count)
        dali = replace(config.data.dali, threads=1, readers=count)
        config = replace(config, data=replace(config.data, dali=dali))
        source = open_sources(config.data, config.seed).train
        views = read_views(source, config, 1, np.arange(20))
        opened = loader_by(loader, source, config)
        batches = [batch for epoch, start in STEPS for batch in opened.epoch(epoch, start)]
        found.append((batches, views, opened.bad))
        opened.close()
    (expected, views, bad), (batches, cached_views, cached_bad) = found
    assert_same(batches, expected)
    assert (views.a == cached_views.a).all() and (views.b == cached_views.b).all()
    assert views.bad == cached_views.bad and views.missed == cached_views.missed
    both = bad.keys() & cached_bad.keys()  # a loader may have met more, ahead
    assert both and all(bad[index] == cached_bad[index] for index in both)


def test_a_limit_and_ranks(root: Path, cache: Path) -> None:
    for rank in (0, 1):
        expected, found = (
            batches_by(
                "torchvision",
                open_sources(data(path, limit=17, workers=0), 5).train,
                config_of(data=data(path, limit=17, workers=0)),
                STEPS,
                rank=rank,
                world_size=2,
            )
            for path in (root, cache)
        )
        assert_same(found, expected)


def test_a_damaged_image_is_named_and_another_stands_for_it(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "x.pixels"
    content = bytearray(cache.read_bytes())
    content[4096 + 100] ^= 1
    file.write_bytes(content)
    config = config_of(data=data(file, workers=1))
    source = open_sources(config.data, 0).train
    batches = batches_by("torchvision", source, config, [(0, 0), (1, 0)])
    assert len(batches) == 6
    assert not any((batch.index == 0).any() for batch in batches)
    assert f"00.jpg: block 0 of {file} is damaged: its bytes 4096 to" in caplog.text


def test_a_file_that_is_replaced_or_written_over_while_it_is_read(
    cache: Path, tmp_path: Path
) -> None:
    """Reading what was cut off a mapped file would be SIGBUS; one that was replaced is there."""
    file, other, some = tmp_path / "x.pixels", tmp_path / "y.pixels", np.arange(4)
    shutil.copy(cache, file)
    shutil.copy(cache, other)
    source = open_sources(data(file), 0).train
    assert isinstance(source, PixelFile)
    readers = [
        PixelReader(Pixels(source, where, CPU), config_of(data=data(file)))
        for where in ("disk", "ram")
    ]
    expected = [reader[0, some].pixels.clone() for reader in readers]
    kept = file.rename(tmp_path / "kept.pixels")
    other.rename(file)
    os.truncate(file, 0)
    assert torch.equal(readers[0][0, some].pixels, expected[0])

    unread = open_sources(data(kept), 0).train
    assert isinstance(unread, PixelFile)

    def read() -> None:
        os.truncate(kept, 4096)
        for what in (
            lambda: source.load(0),
            lambda: unread.check(some),
            lambda: readers[0][0, some],
        ):
            with pytest.raises(UserError, match=r"was cut or written over while.*\(mv, not cp\)"):
                what()
        assert torch.equal(readers[1][0, some].pixels, expected[1])

    assert in_a_process(read) == 0


def test_a_run_is_the_same_and_goes_on(tiny: Config, tmp_path: Path) -> None:
    file = cached(Path(str(tiny.data.root)), tmp_path / "x.pixels")
    small = cached(Path(str(tiny.data.root)), tmp_path / "small.pixels", size=18)

    def of(path: Path) -> DataConfig:
        return replace(tiny.data, source="cache", root=str(path))

    def losses(folder: str) -> list[float]:
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    out = str(tmp_path / "cached")
    tiny = replace(tiny, epochs=1, optim=replace(tiny.optim, warmup_epochs=0))
    tiny = replace(tiny, engine=replace(tiny.engine, plan="eager"))
    train(tiny)
    train(replace(tiny, out=out, data=of(file)))
    assert len(losses(out)) == 3 and losses(out) == losses(str(tiny.out))
    longer = replace(tiny, out=out, resume="auto", epochs=2)
    with pytest.raises(UserError, match=r"images are in their own size there, shrunk to 18 px her"):
        train(replace(longer, data=of(small)))
