"""DALI's views against torchvision's, each drawn freely: the same distributions."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.tables import IMAGENET

pytest.importorskip("nvidia.dali", exc_type=ImportError)

from tests.data.views.dali_cases import PLAIN, by_dali, by_torchvision, drawn, one_view


def freely(views: ViewsConfig, images: np.ndarray, seed: int) -> np.ndarray:
    """(n, S, S, 3) in 0..255: view a of each image."""
    return by_dali(images, views, drawn(views, views.a, images, seed))[0]


def crop_boxes(views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area and log of the aspect ratio of the crops, as shares of an image whose red and green are
    its coordinates."""
    red, green = views[..., 0] / 255, views[..., 1] / 255
    inner = slice(4, -4)  # the border mirrors, as it were
    size = views.shape[1]
    scale = size / (size - 9)
    width = np.abs(red[:, inner, -5] - red[:, inner, 4]).mean(1) * scale
    height = np.abs(green[:, -5, inner] - green[:, 4, inner]).mean(1) * scale
    return width * height, np.log(width / height)


def test_crops_are_distributed_as_torchvisions():
    side = 256
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8), (side, side))
    image = np.stack([ramp, ramp.T, np.zeros_like(ramp)], axis=-1)
    count = 500
    images = np.broadcast_to(image, (count, *image.shape)).copy()

    def mean_and_spread(config: ViewConfig) -> np.ndarray:
        area, aspect = crop_boxes(freely(one_view(48, config), images, 1))
        return np.array([area.mean(), area.std(), aspect.mean(), aspect.std()])

    torch.manual_seed(0)
    boxes = [
        transforms.RandomResizedCrop.get_params(
            torch.empty(3, side, side), list(PLAIN.crop_scale), list(PLAIN.crop_ratio)
        )
        for _ in range(4 * count)
    ]
    height, width = np.array(boxes)[:, 2] / side, np.array(boxes)[:, 3] / side
    area, aspect = height * width, np.log(width / height)
    expected = np.array([area.mean(), area.std(), aspect.mean(), aspect.std()])
    # Three standard errors.
    allowed = 3 * np.array([area.std(), area.std() / 1.4, aspect.std(), aspect.std() / 1.4])
    allowed /= np.sqrt(count)
    assert (np.abs(mean_and_spread(PLAIN) - expected) < allowed).all()
    for other in ({"crop_scale": (0.16, 1.0)}, {"crop_ratio": (9 / 16, 16 / 9)}):
        assert (np.abs(mean_and_spread(replace(PLAIN, **other)) - expected) > allowed).any(), other


MEASURED = ("brightness", "contrast", "saturation", "hue")


def jitter_statistics(name: str, strength: float, seed: int) -> float:
    """How much one operation of the jitter changes a coloured two-tone image, on average."""
    image = np.empty((16, 16, 3), np.uint8)
    image[:8], image[8:] = (120, 80, 60), (70, 60, 110)
    images = np.broadcast_to(image, (400, *image.shape)).copy()
    off = dict.fromkeys(MEASURED, 0.0)
    view = replace(PLAIN, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter=1.0, **off)
    views = one_view(16, replace(view, **{name: strength}))
    return float(np.abs(freely(views, images, seed) - images).mean())


@pytest.mark.parametrize("name", MEASURED)
def test_jitter_is_as_strong_as_torchvisions_and_doubling_shows(name: str):
    strength = getattr(PLAIN, name)
    torch.manual_seed(1)
    transform = transforms.ColorJitter(**{name: strength})
    image = np.empty((16, 16, 3), np.uint8)
    image[:8], image[8:] = (120, 80, 60), (70, 60, 110)
    pixels = Image.fromarray(image)
    changes = [np.abs(np.asarray(transform(pixels), np.float32) - image).mean() for _ in range(800)]
    expected = float(np.mean(changes))
    # Pillow's rounding down adds half a value, which weighs where little changes.
    allowed = 0.1 * expected + 0.3
    assert abs(jitter_statistics(name, strength, 4) - expected) < allowed
    assert abs(jitter_statistics(name, 2 * strength, 4) - expected) > allowed


def test_probabilities_are_kept_and_doubling_shows():
    """Shares of gray, blurred and solarised images among 600, each told by its own mark."""
    count = 600
    rng = np.random.default_rng(0)
    noise = rng.integers(30, 90, (16, 16, 3), np.uint8)
    noise[..., 0] += 60  # never gray, and dark: solarising from 100 up turns red
    images = np.broadcast_to(noise, (count, *noise.shape)).copy()
    plain = replace(PLAIN, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))

    def share(**options: Any) -> float:
        view = replace(plain, blur_sigma=(1.0, 1.0), solarize_threshold=100, **options)
        found = freely(one_view(16, view, 7), images, 2)
        changed = np.abs(found - noise).mean((1, 2, 3)) > 1
        return float(changed.mean())

    for name in ("grayscale", "blur", "solarize"):
        assert abs(share(**{name: 0.2}) - 0.2) < 0.05, name
        assert abs(share(**{name: 0.4}) - 0.2) > 0.05, name


def test_real_images_have_the_same_statistics(data_folder: Path):
    """Per-channel means and standard deviations of the views of real photographs, free draws."""
    archive = data_folder / "imagenet-sample.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    pixels = []
    with tarfile.open(archive) as file:
        for member in file:
            if not member.isfile() or len(pixels) == 250:
                continue
            with Image.open(file.extractfile(member)) as image:  # type: ignore[arg-type]
                pixels.append(np.asarray(image.convert("RGB").resize((72, 72))))
    images = np.stack(pixels)

    def statistics(found: np.ndarray) -> np.ndarray:
        """Means and spreads of the channels, mean chroma: (7,)."""
        chroma = found.max(-1) - found.min(-1)
        spread = found.std((1, 2)).mean(0)
        return np.array([*found.mean((0, 1, 2)), *spread, chroma.mean()])

    view = replace(IMAGENET.b, blur=0.0)
    views = one_view(48, view)
    reference = [
        statistics(by_torchvision(images, views, drawn(views, view, images, seed))[0])
        for seed in range(4)
    ]
    expected, spread = np.mean(reference, 0), np.std(reference, 0, ddof=1)
    ours = statistics(freely(views, images, 17))
    allowed = 4 * spread + 1.0
    assert (np.abs(ours - expected) < allowed).all()
    for doubled in ({"saturation": 1.0, "hue": 0.5}, {"grayscale": 0.4}, {"solarize": 0.6}):
        other = one_view(48, replace(view, **doubled))
        assert (np.abs(statistics(freely(other, images, 17)) - expected) > allowed).any(), doubled
