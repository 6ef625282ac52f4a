"""Both views by kornia, the way its users augment on a GPU: batches of images of one size.

The settings are those of the presets. kornia draws by PyTorch's generator, crops whole batches of
floats, and its jitter is one order for a batch, so the views are alike in kind, not in value.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sacl_fast.config import Config, ViewConfig, ViewsConfig
from sacl_fast.data.images.source import Source


def obstacle() -> str | None:
    """Why kornia cannot be measured; None if it can."""
    if importlib.util.find_spec("kornia") is None:
        return "not installed (pip install 'sacl-fast[bench]')"
    return None


def augmentation(views: ViewsConfig, view: ViewConfig) -> Any:
    """(n, 3, H, W) in 0..1 to a view (n, 3, S, S), normalised."""
    kornia: Any = importlib.import_module("kornia.augmentation")

    window = min(views.blur_window, (views.size - 1) // 2 * 2 + 1)  # no more can be mirrored
    threshold = view.solarize_threshold / 255
    steps: list[Any] = [
        kornia.RandomResizedCrop(
            (views.size, views.size),
            scale=view.crop_scale,
            ratio=view.crop_ratio,
            resample="BICUBIC",
        )
    ]
    if view.flip > 0:
        steps.append(kornia.RandomHorizontalFlip(p=view.flip))
    if view.jitter > 0:
        strengths = (view.brightness, view.contrast, view.saturation, view.hue)
        steps.append(kornia.ColorJitter(*strengths, p=view.jitter))
    if view.grayscale > 0:
        steps.append(kornia.RandomGrayscale(p=view.grayscale))
    if view.blur > 0:
        steps.append(kornia.RandomGaussianBlur((window, window), view.blur_sigma, p=view.blur))
    if view.solarize > 0:
        range_ = (threshold, threshold)
        steps.append(kornia.RandomSolarize(range_, (0.0, 0.0), p=view.solarize))
    steps.append(kornia.Normalize(torch.tensor(views.mean), torch.tensor(views.std)))
    return kornia.AugmentationSequential(*steps)


def batches(
    source: Source, config: Config, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of views without end, of images that lie decoded on the device."""
    images = pixels(source, config).to(device)
    both = [augmentation(config.views, view) for view in (config.views.a, config.views.b)]
    with torch.inference_mode():
        while True:
            given = images.float().div_(255)
            a, b = (augment(given) for augment in both)
            yield a, b


def pixels(source: Source, config: Config) -> Tensor:
    """A batch (n, 3, H, H) uint8: the middle of images, at 256 px where views are of 224, as data
    sets for augmentation on a GPU are prepared."""
    side = config.views.size if config.views.size <= 64 else round(config.views.size * 256 / 224)
    found = np.empty((config.batch_size, side, side, 3), np.uint8)
    for i in range(config.batch_size):
        image = source.load(i % len(source))
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        box = (left, top, left + short, top + short)
        found[i] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
