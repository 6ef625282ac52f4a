"""The operators that make views, against Pillow, torchvision and numpy: to the bit, but for a
blur, of which a few values are one of 255 off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.draw import ViewDraw, apply_view, draw_view, sample_rng
from sacl_fast.data.views.draws import agrees_with_numpy
from sacl_fast.data.views.operator import pack_rows
from sacl_fast.ops.augment import augment as _augment
from sacl_fast.ops.augment import augment_packed
from sacl_fast.verification.comparison import Wrong

_SIZES = ((37, 53), (16, 16), (91, 40), (5, 7), (64, 48), (33, 70))  # height, width
_SEED, _MOST_OFF = 3, 0.02
_TYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
_EACH = ViewConfig(
    jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.3,
    blur=0.5, blur_sigma=(0.1, 2.0), solarize=0.4, solarize_threshold=128,
)  # fmt: skip
_VIEWS = ViewsConfig(size=32, blur_window=5, a=_EACH, b=ViewConfig(jitter=1.0, blur=0.0))


def draw_views(device: torch.device) -> None:
    if not agrees_with_numpy():
        raise Wrong(f"it does not draw what numpy {np.__version__} does")


def augment(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in _SIZES]
    rows, expected = [], []
    for which, view in enumerate((_VIEWS.a, _VIEWS.b)):
        draws = [
            draw_view(view, sample_rng(_SEED, 0, i, which), width, height)
            for i, (height, width) in enumerate(_SIZES)
        ]
        rows.append(pack_rows(draws, len(draws), _VIEWS, view))
        for image, draw in zip(images, draws, strict=True):
            pixels = np.array(apply_view(*_resized(image, draw), _VIEWS, view))
            expected.append(torch.from_numpy(pixels).permute(2, 0, 1))
    draws, wanted = torch.from_numpy(np.stack(rows)), torch.stack(expected).float()
    blurred = draws[..., -2].flatten() > 0
    assert blurred.any() and not blurred.all(), "there are views of both kinds"
    if device.type == "cpu":
        found = _augment(
            [torch.from_numpy(image) for image in images],
            draws,
            size=_VIEWS.size,
            window=_VIEWS.blur_window,
            mean=(0, 0, 0),
            std=(1 / 255,) * 3,
        )
        _compare("of images", found.flatten(0, 1), wanted, blurred)
    for dtype in _TYPES[device.type]:
        found = _packed(images, draws, device, dtype)
        _compare(f"of one buffer, {str(dtype).removeprefix('torch.')}", found, wanted, blurred)


def _resized(image: np.ndarray, draw: ViewDraw) -> tuple[Image.Image, ViewDraw]:
    """The crop at the size of a view, by width and then by height, as the operator does it; Pillow
    13 takes another order where that is less work, which rounds otherwise."""
    top, left, height, width = draw.crop
    crop = Image.fromarray(image[top : top + height, left : left + width])
    for size in ((_VIEWS.size, height), (_VIEWS.size, _VIEWS.size)):
        crop = crop.resize(size, Image.Resampling.BICUBIC)
    return crop, replace(draw, crop=(0, 0, *crop.size))


def _packed(
    images: list[np.ndarray], draws: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    begins = np.cumsum([0, *(image.size for image in images)])
    where = [(begin, *image.shape[:2]) for begin, image in zip(begins, images, strict=False)]
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    shape = draws.shape[0] * draws.shape[1], 3, _VIEWS.size, _VIEWS.size
    out = torch.full(shape, torch.nan, dtype=dtype, device=device)
    out = out.contiguous(memory_format=torch.channels_last)
    augment_packed(
        pixels.to(device),
        torch.tensor(where).to(device),
        draws.to(device),
        window=_VIEWS.blur_window,
        mean=torch.zeros(3, device=device),
        std=torch.ones(3, device=device),
        out=out,
    )
    return out.float().cpu()


def _compare(what: str, found: Tensor, expected: Tensor, blurred: Tensor) -> None:
    off = (found - expected).abs()
    if not (off[~blurred] < 0.5).all():  # not so for NaN
        raise Wrong(f"views {what}: pixels are off by {off[~blurred].max():.0f} of 255")
    if not (off[blurred] < 1.5).all() or (off[blurred] > 0.5).float().mean() > _MOST_OFF:
        raise Wrong(f"views {what}: blurred pixels are off by {off[blurred].max():.0f} of 255")
