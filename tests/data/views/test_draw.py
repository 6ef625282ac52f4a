"""Draws against torchvision's distributions, operations against plain float arithmetic."""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.draw import ViewDraw, apply_view, draw_view, epoch_order, sample_rng
from sacl_fast.data.views.tables import DEMO, IMAGENET

DRAWS = 3000
# Two samples of this size from one distribution differ by more in 1 of 1,000 cases.
SAME = 1.95 * math.sqrt(2 / DRAWS)


def draws(view: ViewConfig, width: int = 100, height: int = 70) -> list[ViewDraw]:
    return [draw_view(view, sample_rng(0, 0, i, 0), width, height) for i in range(DRAWS)]


def distance(ours: list[float], theirs: list[float]) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two empirical distributions."""
    grid = np.sort(np.concatenate([ours, theirs]))
    shares = (np.searchsorted(np.sort(s), grid, "right") / len(s) for s in (ours, theirs))
    return float(np.abs(next(shares) - next(shares)).max())


# --- draws ---------------------------------------------------------------------------------------


def torchvision_crops(view: ViewConfig, width: int, height: int) -> list[tuple[int, ...]]:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    scale, ratio = list(view.crop_scale), list(view.crop_ratio)
    return [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(DRAWS)]


CROP_FACTS: dict[str, Callable[[int, int, int, int], float]] = {
    "top": lambda top, left, height, width: top,
    "left": lambda top, left, height, width: left,
    "area": lambda top, left, height, width: height * width,
    "ratio": lambda top, left, height, width: width / height,
    "bottom": lambda top, left, height, width: top + height,
    "right": lambda top, left, height, width: left + width,
}


@pytest.mark.parametrize(("width", "height"), [(100, 70), (224, 224), (40, 200)])
@pytest.mark.parametrize("fact", CROP_FACTS)
def test_crops_are_those_of_torchvision(width: int, height: int, fact: str) -> None:
    view = ViewConfig()
    theirs = [CROP_FACTS[fact](*crop) for crop in torchvision_crops(view, width, height)]
    ours = [CROP_FACTS[fact](*draw.crop) for draw in draws(view, width, height)]
    assert distance(ours, theirs) < SAME


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        (ViewConfig(crop_scale=(0.16, 1.0)), "area"),
        (ViewConfig(crop_scale=(0.08, 0.8)), "area"),
        (ViewConfig(crop_ratio=(2 / 3, 3 / 2)), "ratio"),
    ],
)
def test_the_comparison_of_crops_can_fail(changed: ViewConfig, fact: str) -> None:
    theirs = [CROP_FACTS[fact](*crop) for crop in torchvision_crops(ViewConfig(), 224, 224)]
    assert distance([CROP_FACTS[fact](*d.crop) for d in draws(changed, 224, 224)], theirs) > SAME


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (2, 400)])
def test_elongated_images_fall_back_to_their_centre(size: tuple[int, int]) -> None:
    view = ViewConfig(crop_scale=(0.5, 1.0))
    width, height = size
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.5, 1.0], [3 / 4, 4 / 3])
    for draw in draws(view, width, height)[:50]:
        top, left, high, wide = draw.crop
        assert high > 0 and wide > 0 and top + high <= height and left + wide <= width
        assert (high, wide) == tuple(theirs[2:]) and (top, left) == tuple(theirs[:2])


def torchvision_jitter(view: ViewConfig) -> dict[str, list[Any]]:
    jitter = ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    given = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    torch.manual_seed(0)
    found = [ColorJitter.get_params(*given) for _ in range(DRAWS)]  # type: ignore[arg-type]
    names = ("brightness", "contrast", "saturation", "hue")
    return {name: [params[k] for params in found] for k, name in enumerate(names, 1)}


STRENGTHS: dict[str, Any] = dict(brightness=0.4, contrast=0.6, saturation=0.2, hue=0.1)


@pytest.mark.parametrize("name", STRENGTHS)
def test_jitter_is_that_of_torchvision_and_twice_the_strength_is_not(name: str) -> None:
    view = ViewConfig(jitter=1.0, **STRENGTHS)
    theirs = torchvision_jitter(view)[name]
    ours = [dict(draw.jitter or ())[name] for draw in draws(view)]
    assert distance(ours, theirs) < SAME
    doubled = replace(view, **{name: 2 * STRENGTHS[name]})
    assert distance([dict(d.jitter or ())[name] for d in draws(doubled)], theirs) > SAME


def test_strengths_above_one_do_not_go_negative() -> None:
    view = ViewConfig(jitter=1.0, brightness=1.5)
    found = [dict(draw.jitter or ())["brightness"] for draw in draws(view)]
    assert min(found) >= 0 and max(found) > 2.4


def test_jitter_comes_in_any_order() -> None:
    orders = [
        tuple(name for name, _ in draw.jitter or ()) for draw in draws(ViewConfig(jitter=1.0))
    ]
    counts = np.array([orders.count(order) for order in set(orders)])
    expected = DRAWS / 24
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi square, 23 degrees: p = 0.001


def test_a_strength_of_zero_leaves_its_operation_out() -> None:
    view = ViewConfig(jitter=1.0, saturation=0.0, hue=0.0)
    assert {len(draw.jitter or ()) for draw in draws(view)} == {2}
    none = replace(view, brightness=0.0, contrast=0.0)
    assert {draw.jitter for draw in draws(none)} == {()}


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_probabilities(probability: float) -> None:
    same: dict[str, Any] = {
        name: probability for name in ("flip", "jitter", "grayscale", "blur", "solarize")
    }
    found = draws(ViewConfig(**same))
    slack = 4 * math.sqrt(probability * (1 - probability) / DRAWS)
    for happened in (
        [draw.flip for draw in found],
        [draw.jitter is not None for draw in found],
        [draw.grayscale for draw in found],
        [draw.sigma is not None for draw in found],
        [draw.solarize for draw in found],
    ):
        assert abs(np.mean(happened) - probability) <= slack


def test_sigma_is_uniform() -> None:
    sigmas = [draw.sigma or 0.0 for draw in draws(ViewConfig(blur=1.0))]
    expected = np.random.default_rng(0).uniform(0.1, 2.0, DRAWS).tolist()
    assert distance(sigmas, expected) < SAME


def test_streams_depend_on_each_of_their_names() -> None:
    first = sample_rng(1, 2, 3, 0).random(8).tolist()
    assert sample_rng(1, 2, 3, 0).random(8).tolist() == first
    others = [(2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1), (2, 1, 3, 0)]
    streams = [sample_rng(*names).random(1000).tolist() for names in others]
    assert len({value for stream in (first, *streams) for value in stream}) == 5008


def test_order_of_an_epoch() -> None:
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert epoch_order(0, 0, 50).tolist() == orders[0]


def test_no_global_random_numbers(image: Image.Image) -> None:
    def states() -> list:
        return [
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            torch.get_rng_state().tolist(),
        ]

    before = states()
    for index in range(5):
        draw = draw_view(IMAGENET.a, sample_rng(0, 0, index, 0), *image.size)
        apply_view(image, draw, replace(IMAGENET, size=32), IMAGENET.a)
    assert states() == before


# --- operations ----------------------------------------------------------------------------------

SIDE = 48


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Colours of all kinds, smooth and sharp."""
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    pixels = np.stack([x, y, (np.sin(9 * x * y) + 1) / 2], 2)
    pixels[10:20, 12:30] = np.random.default_rng(0).random((10, 18, 3))
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def view_of(image: Image.Image, **drawn) -> np.ndarray:
    """(S, S, 3) float64: one operation on the whole image."""
    plain = ViewDraw((0, 0, SIDE, SIDE), False, None, False, None, False)
    views = ViewsConfig(size=SIDE, blur_window=9)
    return np.asarray(apply_view(image, replace(plain, **drawn), views, views.b), dtype=np.float64)


def luma(pixels: np.ndarray) -> np.ndarray:
    return (pixels @ [0.299, 0.587, 0.114])[..., None]


def blend(base: np.ndarray | float, pixels: np.ndarray, factor: float) -> np.ndarray:
    return (base + factor * (pixels - base)).clip(0, 255)


def test_nothing_drawn_is_the_image(image: Image.Image) -> None:
    np.testing.assert_array_equal(view_of(image), np.asarray(image))


def test_flip(image: Image.Image) -> None:
    np.testing.assert_array_equal(view_of(image, flip=True), np.asarray(image)[:, ::-1])


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_saturation(image: Image.Image, name: str, factor: float) -> None:
    pixels = np.asarray(image, np.float64)
    base = {
        "brightness": 0.0,
        "contrast": float(luma(pixels).mean()),
        "saturation": luma(pixels),
    }[name]
    found = view_of(image, jitter=((name, factor),))
    assert np.abs(found - blend(base, pixels, factor)).max() <= 1.5


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.05, 0.3])
def test_hue(image: Image.Image, shift: float) -> None:
    expected = np.empty((SIDE, SIDE, 3))
    for y, x in np.ndindex(SIDE, SIDE):
        h, s, v = colorsys.rgb_to_hsv(*np.asarray(image)[y, x] / 255.0)
        expected[y, x] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
    off = np.abs(view_of(image, jitter=(("hue", shift),)) - 255 * expected)
    # Hue and shift are cut to 8 bits, and a step of hue is 6 levels of a saturated colour.
    assert off.max() <= 18 and off.mean() < 3


def test_order_of_jitter_matters(image: Image.Image) -> None:
    steps = (("brightness", 1.4), ("saturation", 0.0))
    assert (view_of(image, jitter=steps) != view_of(image, jitter=steps[::-1])).any()


def test_grayscale(image: Image.Image) -> None:
    expected = np.broadcast_to(luma(np.asarray(image, np.float64)), (SIDE, SIDE, 3))
    assert np.abs(view_of(image, grayscale=True) - expected).max() <= 1


def test_solarize(image: Image.Image) -> None:
    pixels = np.asarray(image, np.float64)
    expected = np.where(pixels >= 128, 255 - pixels, pixels)
    np.testing.assert_array_equal(view_of(image, solarize=True), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_gaussian_window(image: Image.Image, sigma: float) -> None:
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(np.asarray(image, np.float64), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    expected = sum(
        window[dy, dx] * padded[dy : dy + SIDE, dx : dx + SIDE]
        for dy in range(9)
        for dx in range(9)
    )
    assert np.abs(view_of(image, sigma=sigma) - expected).max() <= 0.501


def test_a_window_larger_than_the_view(image: Image.Image) -> None:
    views = ViewsConfig(size=4, blur_window=23)
    draw = ViewDraw((0, 0, SIDE, SIDE), False, None, False, 2.0, False)
    assert apply_view(image, draw, views, views.a).size == (4, 4)


@pytest.mark.parametrize("crop", [(0, 0, SIDE, SIDE), (5, 9, 30, 17), (40, 40, 8, 8), (3, 3, 1, 1)])
@pytest.mark.parametrize("size", [16, 48, 100])
def test_crop_and_resize(image: Image.Image, crop: tuple[int, ...], size: int) -> None:
    top, left, height, width = crop
    draw = ViewDraw((top, left, height, width), False, None, False, None, False)
    views = ViewsConfig(size=size)
    found = np.asarray(apply_view(image, draw, views, views.a), np.float32)
    part = np.asarray(image, np.float32)[top : top + height, left : left + width]
    # Pillow rounds and clips after each of its two passes, whichever comes first.
    off = [
        np.abs(found - resized(resized(part, axis, size), 1 - axis, size)).max() for axis in (0, 1)
    ]
    assert min(off) <= 1


def resized(pixels: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Bicubic, antialiased, along one axis of (H, W, 3) float32 with 8-bit values."""
    shape = (size, pixels.shape[1]) if axis == 0 else (pixels.shape[0], size)
    result = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None],
        shape,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )
    return result[0].permute(1, 2, 0).round().clamp(0, 255).numpy()


def test_operations_follow_the_order_of_view_config(image: Image.Image) -> None:
    """All at once equals one after the other."""
    steps = (
        dict(flip=True),
        dict(jitter=(("hue", 0.1), ("contrast", 1.3))),
        dict(grayscale=True),
        dict(sigma=1.0),
        dict(solarize=True),
    )
    one_by_one = image
    for step in steps:
        one_by_one = Image.fromarray(view_of(one_by_one, **step).astype(np.uint8))
    together = view_of(image, **{name: value for step in steps for name, value in step.items()})
    np.testing.assert_array_equal(together, np.asarray(one_by_one))


def test_demo_views_keep_the_shapes_in_sight() -> None:
    assert min(DEMO.a.crop_scale[0], DEMO.b.crop_scale[0]) >= 0.3
