"""The compiled operator ``augment`` as loaders use it: whether it makes the views, what it is told
of each, and its pixels. Nothing here needs DALI.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image

from sacl_fast.config import Config, ViewConfig, ViewsConfig
from sacl_fast.data.views.draw import ViewDraw

_NEVER = 256  # no value is solarised


def are_compiled(config: Config, device: torch.device) -> bool:
    """Whether the compiled operator makes the views that are made on ``device``."""
    return why_not_compiled(config, device) is None


def why_not_compiled(config: Config, device: torch.device) -> str | None:
    """Why the compiled operator does not make them; None where it does."""
    from sacl_fast.ops.backend import asked_of, resolve

    if config.backend == "torch":
        return "backend torch"
    asked = asked_of("augment", config.backend)
    if asked != device.type:  # of another device, as beside a GPU the views that the CPU makes
        asked = "auto"
    backend, reason = resolve(asked, "augment", device)
    return reason if backend == "torch" else None


def pack_rows(
    draws: Iterable[ViewDraw], count: int, _: ViewsConfig, view: ViewConfig
) -> np.ndarray:
    """The draws of one view of ``count`` images, a row each: (count, 16) float64."""
    from sacl_fast.ops.augment import COLUMNS, OPERATIONS

    rows = np.zeros((count, len(COLUMNS)))
    for row, draw in zip(rows, draws, strict=True):
        names, factors = zip(*draw.jitter, strict=True) if draw.jitter else ((), ())
        idle = [0] * (len(OPERATIONS) - len(names))
        row[:] = (
            *(*draw.crop, draw.flip),
            *(*(OPERATIONS[name] for name in names), *idle),
            *(*factors, *idle),
            *(draw.grayscale, draw.sigma or 0),
            view.solarize_threshold if draw.solarize else _NEVER,
        )
    return rows


def compiled_pixels(
    image: Image.Image, draws: Sequence[ViewDraw], views: ViewsConfig
) -> np.ndarray:
    """Both views of an RGB image, or, of one draw, view a alone: (V, S, S, 3) uint8, as by
    ``apply_view`` (``draw.py``)."""
    from sacl_fast.ops.augment import augment

    both = zip(draws, (views.a, views.b), strict=False)
    rows = np.stack([pack_rows([draw], 1, views, view) for draw, view in both])
    values = augment(
        [torch.from_numpy(np.array(image))],
        torch.from_numpy(rows),
        size=views.size,
        window=views.blur_window,
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,  # its values are those of the pixels
    )
    return values[:, 0].permute(0, 2, 3, 1).round().to(torch.uint8).numpy()
