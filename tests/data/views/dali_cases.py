"""What the tests of DALI's views share: views of given draws by DALI and by torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.dali_parameters import pack
from sacl_fast.data.views.draw import ViewDraw, apply_view, draw_view, sample_rng

pytest.importorskip("nvidia.dali", exc_type=ImportError)

from sacl_fast.data.views.dali import ViewPipeline

CPU = torch.device("cpu")
PLAIN = ViewConfig(flip=0, jitter=0, grayscale=0)


def photos(count: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """(n, H, W, 3) uint8: smooth coloured patches with some grain, over the whole range."""
    rng = np.random.default_rng(5)
    height, width = size
    coarse = rng.integers(0, 256, (count, 6, 6, 3), np.uint8)
    fine = [np.asarray(Image.fromarray(c).resize((width, height), 3)) for c in coarse]
    grain = rng.normal(0, 6, (count, height, width, 3))
    return (np.stack(fine) + grain).clip(0, 255).astype(np.uint8)


def by_dali(images: np.ndarray, views: ViewsConfig, *draws: list[ViewDraw]) -> np.ndarray:
    """(V, n, S, S, 3) in 0..255: views a (and b) of the images with the given draws."""
    a, b = (
        pack(drawn, len(images), views, view)
        for drawn, view in zip((draws * 2)[:2], (views.a, views.b), strict=True)
    )
    pipeline = ViewPipeline(
        views, lambda: (images, (a, b)), encoded=False, batch=len(images), device=CPU
    )
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
    found = torch.stack(pipeline.run()) * std + mean
    return found.permute(0, 1, 3, 4, 2).numpy()[: len(draws)]


def by_torchvision(images: np.ndarray, views: ViewsConfig, *draws: list[ViewDraw]) -> np.ndarray:
    return np.stack(
        [
            [
                np.asarray(apply_view(Image.fromarray(image), draw, views, view), np.float32)
                for image, draw in zip(images, drawn, strict=True)
            ]
            for drawn, view in zip(draws, (views.a, views.b), strict=False)
        ]
    )


def one_view(size: int, view: ViewConfig, window: int = 23) -> ViewsConfig:
    return ViewsConfig(size=size, blur_window=window, a=view, b=view)


def drawn(views: ViewsConfig, view: ViewConfig, images: np.ndarray, seed: int, which: int = 0):
    height, width = images.shape[1:3]
    return [
        draw_view(view, sample_rng(seed, 0, i, which), width, height) for i in range(len(images))
    ]
