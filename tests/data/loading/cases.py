"""What the tests of the two loaders share."""

from __future__ import annotations

import numpy as np
import torch

from sacl_fast.config import Config, ViewConfig, ViewsConfig
from sacl_fast.data.images.source import ArraySource, Source
from sacl_fast.data.loading.torch_loader import Batch, ViewLoader

CPU = torch.device("cpu")


def random_source() -> ArraySource:
    """37 images."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 20, 24, 3), np.uint8)
    return ArraySource("random", pixels, np.arange(37) % 5, tuple("abcde"))


def config_of(**options) -> Config:
    """Small views, of which some are blurred or solarised, in batches of 8."""
    views = ViewsConfig(size=16, blur_window=5, a=ViewConfig(blur=0.5), b=ViewConfig(solarize=0.5))
    return Config(**{**dict(batch_size=8, epochs=3, seed=5, views=views), **options})


def batches_by(
    loader_type: type[ViewLoader], source: Source, config: Config, steps: list[tuple[int, int]],
    **ranks,
) -> list[Batch]:  # fmt: skip
    """All batches of these (epoch, first step)."""
    loader = loader_type(source, config, device=CPU, **ranks)
    found = [batch for epoch, start in steps for batch in loader.epoch(epoch, start)]
    loader.close()
    return found


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in Batch._fields:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
