"""The random augmentation of views, on the CPU: what is drawn, apart from what is done with it.

A draw depends on (seed, epoch, image, view) alone, so a batch is the same for any number of
workers and ranks and after any resume; torchvision's own random transforms draw from the global
stream. The operations are torchvision's, on 8-bit Pillow images, which for 32 px is faster than on
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from sacl_fast.config import ViewConfig, ViewsConfig


def sample_rng(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """The random stream of one view (0: a, 1: b) of one image in one epoch.

    Philox is a function of a key and a counter. The key is (seed, epoch), the upper words of the
    counter are (view, image, 0), and drawing counts in the lowest: streams never meet. The order
    of an epoch (``epoch_order``) has a 1 in the highest word.
    """
    return _philox((seed, epoch), (0, view, index, 0))


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) int64: the order in which the epoch visits the images."""
    return _philox((seed, epoch), (0, 0, 0, 1)).permutation(count)


def _philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> np.random.Generator:
    words = (np.array(values, np.uint64) for values in (counter, key))
    return np.random.Generator(np.random.Philox(counter=next(words), key=next(words)))


# --- what is drawn -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ViewDraw:
    """Everything random about one view."""

    crop: tuple[int, int, int, int]
    """top, left, height, width in pixels of the image"""
    flip: bool
    jitter: tuple[tuple[str, float], ...] | None
    """(operation, factor) in the order they are applied"""
    grayscale: bool
    sigma: float | None
    """of the blur, in pixels of the view"""
    solarize: bool


def draw_view(view: ViewConfig, rng: np.random.Generator, width: int, height: int) -> ViewDraw:
    """Draw a view of an image of that size, as torchvision's RandomResizedCrop and ColorJitter
    would."""
    return ViewDraw(
        crop=_draw_crop(view, rng, width, height),
        flip=_chance(rng, view.flip),
        jitter=_draw_jitter(view, rng) if _chance(rng, view.jitter) else None,
        grayscale=_chance(rng, view.grayscale),
        sigma=_uniform(rng, *view.blur_sigma) if _chance(rng, view.blur) else None,
        solarize=_chance(rng, view.solarize),
    )


def _chance(rng: np.random.Generator, probability: float) -> bool:
    return rng.random() < probability


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()  # rng.uniform takes three times as long


def _draw_crop(
    view: ViewConfig, rng: np.random.Generator, width: int, height: int
) -> tuple[int, int, int, int]:
    narrowest, widest = view.crop_ratio
    for _ in range(10):
        area = width * height * _uniform(rng, *view.crop_scale)
        ratio = math.exp(_uniform(rng, math.log(narrowest), math.log(widest)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            return top, left, h, w
    # The image is too elongated: its centre, at the nearest allowed ratio.
    w, h = width, height
    if width / height < narrowest:
        h = max(1, round(width / narrowest))
    elif width / height > widest:
        w = max(1, round(height * widest))
    return (height - h) // 2, (width - w) // 2, h, w


def _draw_jitter(view: ViewConfig, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    factors = {
        name: _uniform(rng, max(0.0, 1 - strength), 1 + strength)
        for name in ("brightness", "contrast", "saturation")
        if (strength := getattr(view, name)) > 0
    }
    if view.hue > 0:
        factors["hue"] = _uniform(rng, -view.hue, view.hue)
    names = tuple(factors)
    return tuple((names[i], factors[names[i]]) for i in rng.permutation(len(names)))


# --- what is done --------------------------------------------------------------------------------


def apply_view(
    image: Image.Image, draw: ViewDraw, views: ViewsConfig, view: ViewConfig
) -> Image.Image:
    """The view of an RGB image: (size, size) pixels, RGB, 8 bits."""
    result: Any = image  # torchvision takes Pillow images and annotates tensors
    size = [views.size, views.size]
    result = F.resized_crop(result, *draw.crop, size, InterpolationMode.BICUBIC)
    if draw.flip:
        result = F.horizontal_flip(result)
    for name, factor in draw.jitter or ():
        result = _JITTER[name](result, factor)
    if draw.grayscale:
        result = F.rgb_to_grayscale(result, num_output_channels=3)
    if draw.sigma is not None:
        result = _blur(result, draw.sigma, views.blur_window)
    if draw.solarize:
        result = F.solarize(result, view.solarize_threshold)
    return result


_JITTER: dict[str, Callable[[Any, float], Any]] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def _blur(image: Image.Image, sigma: float, window: int) -> Image.Image:
    """Gaussian blur with ``window`` x ``window`` taps, edges mirrored.

    As two 1-D passes, rounded once: at 224 px and window 23 the 2-D one takes several times as
    long.
    """
    window = min(window, 2 * image.width - 1)  # no more can be mirrored
    pixels = F.pil_to_tensor(image).float()
    pixels = F.gaussian_blur(pixels, [1, window], [sigma, sigma])
    pixels = F.gaussian_blur(pixels, [window, 1], [sigma, sigma])
    return Image.fromarray(pixels.round_().to(torch.uint8).permute(1, 2, 0).numpy())
