"""What the tests of the two loaders share."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sacl_fast.config import Config, DaliConfig, DataConfig, ViewConfig, ViewsConfig
from sacl_fast.config.choices import LoaderName
from sacl_fast.data.images.source import ArraySource, Source
from sacl_fast.data.loading.batch import Batch
from sacl_fast.data.loading.open import open_view_loader
from sacl_fast.data.loading.view_loader import ViewLoader

CPU = torch.device("cpu")


def random_source() -> ArraySource:
    """37 images."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 20, 24, 3), np.uint8)
    return ArraySource("random", pixels, np.arange(37) % 5, tuple("abcde"))


def config_of(**options) -> Config:
    """Small views, of which some are blurred or solarised, in batches of 8."""
    views = ViewsConfig(size=16, blur_window=5, a=ViewConfig(blur=0.5), b=ViewConfig(solarize=0.5))
    return Config(**{**dict(batch_size=8, epochs=3, seed=5, views=views), **options})


def torchvision_config(workers: int = 0, **options) -> Config:
    return config_of(**{"data": DataConfig(workers=workers), **options})


def dali_config(readers: int = 0, root: Path | None = None, **options) -> Config:
    dali = DaliConfig(readers=readers, threads=1, prefetch=2)
    data = DataConfig(root=root and str(root), dali=dali, workers=0, loader="dali")
    return config_of(**{"data": data, **options})


def encoded(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def loader_by(loader: LoaderName, source: Source, config: Config, **options) -> ViewLoader:
    """The loader that trains on the CPU with ``data.loader`` set to ``loader``."""
    data = replace(config.data, loader=loader)
    return open_view_loader(source, replace(config, data=data), device=CPU, **options)


def batches_by(
    loader: LoaderName, source: Source, config: Config, steps: list[tuple[int, int]], **ranks
) -> list[Batch]:
    """All batches of these (epoch, first step)."""
    opened = loader_by(loader, source, config, **ranks)
    found = [batch for epoch, start in steps for batch in opened.epoch(epoch, start)]
    opened.close()
    return found


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in Batch._fields:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
