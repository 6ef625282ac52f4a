"""The draws of a whole batch, as the compiled operator ``augment`` takes them.

They are those of ``draw.py``, from numpy's streams, and in Python take longer than the views of
32 px. The operator ``draw_views`` draws the same at once. numpy promises its streams of bits to
stay, but not what its ``Generator`` makes of them: so the operator's self-check compares it with
the numpy that is there, and where they differ it is not used.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.draw import draw_view, sample_rng
from sacl_fast.data.views.operator import pack_rows

_COMPARED = 48  # images; of four factors, all orders come up


def draw_rows(
    views: ViewsConfig,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    sizes: np.ndarray,
    threads: int = 1,
) -> Tensor:
    """(2, n, 16) float64: the draws of both views of the images ``indices`` (n,), whose heights and
    widths are ``sizes`` (n, 2)."""
    if _is_used():
        return _compiled(views, seed, epoch, indices, sizes, threads)
    return drawn_by_numpy(views, seed, epoch, indices, sizes)


def drawn_by_numpy(
    views: ViewsConfig, seed: int, epoch: int, indices: np.ndarray, sizes: np.ndarray
) -> Tensor:
    """The same, draw by draw."""
    images = list(zip(indices.tolist(), sizes.tolist(), strict=True))
    rows = [
        pack_rows(
            (
                draw_view(view, sample_rng(seed, epoch, index, which), width, height)
                for index, (height, width) in images
            ),
            len(images),
            views,
            view,
        )
        for which, view in enumerate((views.a, views.b))
    ]
    return torch.from_numpy(np.stack(rows))


@cache
def _is_used() -> bool:
    from sacl_fast.ops.backend import resolve

    return resolve("auto", "draw_views", torch.device("cpu")).backend == "cpu"


def agrees_with_numpy() -> bool:
    """Whether the compiled operator draws what this numpy does."""
    views = ViewsConfig(a=ViewConfig(blur=0.5, solarize=0.5), b=ViewConfig(jitter=1.0))
    indices = np.arange(_COMPARED) * 997 + 2**40
    sizes = np.stack([1 + indices % 613, 1 + indices % 389], axis=1)
    sizes[::3] = (480, 640)
    given = views, 2**53 - 1, 12, indices, sizes
    return torch.equal(_compiled(*given, threads=1), drawn_by_numpy(*given))


def _compiled(
    views: ViewsConfig, seed: int, epoch: int, indices: np.ndarray, sizes: np.ndarray, threads: int
) -> Tensor:
    from sacl_fast.ops.draw_views import draw_views

    rows = [_settings(view) for view in (views.a, views.b)]
    return draw_views(
        seed,
        epoch,
        torch.from_numpy(np.ascontiguousarray(indices, np.int64)),
        torch.from_numpy(np.ascontiguousarray(sizes, np.int64)),
        torch.tensor(rows, dtype=torch.float64),
        threads=threads,
    )


def _settings(view: ViewConfig) -> list[float]:
    """A row of ``ops.draw_views.SETTINGS``."""
    return [
        *(*view.crop_scale, *view.crop_ratio, *map(math.log, view.crop_ratio)),
        *(view.flip, view.jitter),
        *(view.brightness, view.contrast, view.saturation, view.hue),
        *(view.grayscale, view.blur, *view.blur_sigma),
        *(view.solarize, view.solarize_threshold),
    ]
