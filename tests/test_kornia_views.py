"""What is measured beside ours makes views of the same kind (extra ``bench``)."""

from __future__ import annotations

from dataclasses import replace

import kornia_views
import numpy as np
import pytest
import torch

from sacl_fast.config import Config, ViewConfig
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.open import open_view_loader
from sacl_fast.data.views.tables import CIFAR

pytest.importorskip("kornia", reason=str(kornia_views.obstacle()))

CPU = torch.device("cpu")
SMOOTH = np.linspace(0, 255, 40 * 40 * 3).reshape(40, 40, 3).astype(np.uint8)


def test_their_views_have_the_statistics_of_ours() -> None:
    source = ArraySource("smooth", np.stack([SMOOTH] * 64), [0] * 64, ())
    config = Config(batch_size=64, views=CIFAR, data=replace(Config().data, workers=0))
    loader = open_view_loader(source, config, device=CPU)
    ours = next(loader.epoch(0))
    loader.close()
    theirs = next(kornia_views.batches(source, config, CPU))
    for a, b in zip((ours.view_a, ours.view_b), theirs, strict=True):
        assert a.shape == b.shape and b.dtype == torch.float32
        assert abs(a.mean() - b.mean()) < 0.4 and abs(a.std() / b.std() - 1) < 0.3


def test_what_is_switched_off_is_left_out() -> None:
    off = ViewConfig(flip=0, jitter=0, grayscale=0, blur=0, solarize=0)
    names = [type(step).__name__ for step in kornia_views.augmentation(CIFAR, off)]
    assert names == ["RandomResizedCrop", "Normalize"]
