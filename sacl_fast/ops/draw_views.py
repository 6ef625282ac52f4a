"""The random parameters of the views of a batch, drawn at once.

The compiled operator (``csrc/cpu/draw_views.cpp``) gives bit for bit what
``sacl_fast.data.views.draw.draw_view``, its reference, draws with numpy, several hundred times as
fast. ``sacl_fast.data.views.draws`` asks it, and sees to it that numpy still draws like that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_fast.ops import compiled

# What a row of ``settings`` holds.
SETTINGS = (
    *("scale_low", "scale_high", "ratio_low", "ratio_high", "log_ratio_low", "log_ratio_high"),
    *("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur"),
    *("sigma_low", "sigma_high", "solarize", "threshold"),
)


def draw_views(
    seed: int,
    epoch: int,
    image_index: Tensor,
    sizes: Tensor,
    settings: Tensor,
    *,
    threads: int = 1,
) -> Tensor:
    """The draws (V, n, 16) float64 of V views of n images, as ``augment`` takes them.

    Args:
        seed, epoch: the key of the random streams, 0 or more.
        image_index: (n,) int64, 0 or more: which images; with the view, the streams' counter.
        sizes: (n, 2) int64, height and width, 1 or more.
        settings: (V, 18) float64, ``SETTINGS``, of views a, b, ...
        threads: threads that share the work; they end with it.
    """
    obstacle = compiled.obstacle()
    if obstacle is not None:
        raise RuntimeError(f"draw_views has no other backend than the compiled one: {obstacle}")
    return torch.ops.sacl_fast.draw_views(seed, epoch, image_index, sizes, settings, threads)
