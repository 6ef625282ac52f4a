"""The compiled operator against Pillow and torchvision, pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.loading.batch import Normalise
from sacl_fast.data.views.draw import ViewDraw, apply_view, draw_view, sample_rng
from sacl_fast.data.views.tables import CIFAR, DEMO, IMAGENET
from sacl_fast.ops import compiled
from sacl_fast.ops.augment import COLUMNS, OPERATIONS, augment, augment_packed

pytestmark = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))

PLAIN = ViewConfig(flip=0, jitter=0, grayscale=0, solarize_threshold=99)
STRENGTHS = {"brightness": 1.4, "contrast": 0.3, "saturation": 1.7, "hue": -0.07}


def untouched(image: np.ndarray, **changes: Any) -> ViewDraw:
    """The whole image, but for the ``changes``."""
    whole = ViewDraw(
        crop=(0, 0, *image.shape[:2]),
        flip=False,
        jitter=None,
        grayscale=False,
        sigma=None,
        solarize=False,
    )
    return replace(whole, **changes)


def row(draw: ViewDraw, threshold: int) -> list[float]:
    operations = [(OPERATIONS[name], factor) for name, factor in draw.jitter or ()]
    operations += [(0, 0.0)] * (4 - len(operations))
    return [
        *(*draw.crop, draw.flip),
        *(operation for operation, _ in operations),
        *(factor for _, factor in operations),
        *(draw.grayscale, draw.sigma or 0, threshold if draw.solarize else 256),
    ]


def pixels(
    images: Sequence[np.ndarray],
    draws: Sequence[ViewDraw],
    size: int,
    window: int = 23,
    threshold: int = PLAIN.solarize_threshold,
    threads: int = 1,
) -> np.ndarray:
    """(n, S, S, 3) in 0..255, by the operator."""
    rows = torch.tensor([[row(draw, threshold) for draw in draws]], dtype=torch.float64)
    found = augment(
        [torch.from_numpy(image) for image in images],
        rows,
        size=size,
        window=window,
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,
        threads=threads,
    )
    assert found.dtype == torch.float32
    return found[0].permute(0, 2, 3, 1).numpy()


def by_torchvision(image: np.ndarray, draw: ViewDraw, size: int, window: int = 23) -> np.ndarray:
    views = ViewsConfig(blur_window=window, a=PLAIN, b=PLAIN)
    object.__setattr__(views, "size", size)  # smaller than a run's may be, too
    return np.asarray(apply_view(Image.fromarray(image), draw, views, PLAIN), np.float32)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth patches of colour with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return (fine + rng.normal(0, 6, fine.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("image", "crop", "size"),
    [
        ((1, 1), (0, 0, 1, 1), 7),
        ((9, 7), (0, 0, 9, 7), 1),
        ((40, 30), (3, 5, 21, 17), 16),
        ((40, 30), (3, 5, 21, 17), 33),
        ((200, 170), (11, 7, 150, 163), 45),
        ((65, 400), (0, 1, 65, 399), 64),
        ((400, 21), (0, 0, 399, 21), 20),
    ],
)
def test_crops_are_pillows(
    image: tuple[int, int], crop: tuple[int, int, int, int], size: int, flip: bool
) -> None:
    """Of both passes, which are asked of Pillow one by one: which comes first is the version's."""
    given = noise(*image)
    top, left, height, width = crop
    box = (left, top, left + width, top + height)
    expected = Image.fromarray(given).crop(box)
    for shape in ((size, height), (size, size)):
        expected = expected.resize(shape, Image.Resampling.BICUBIC)
    expected = np.asarray(expected)[:, :: -1 if flip else 1]
    (found,) = pixels([given], [untouched(given, crop=crop, flip=flip)], size)
    assert np.array_equal(found, expected)


def test_crops_are_nearly_those_of_any_pillow() -> None:
    image = photo(300, 400)
    for crop, size in (((10, 20, 280, 150), 96), ((5, 5, 90, 380), 96), ((0, 0, 60, 50), 97)):
        draw = untouched(image, crop=crop)
        (found,) = pixels([image], [draw], size)
        difference = np.abs(found - by_torchvision(image, draw, size))
        assert difference.mean() < 0.3
        assert difference.max() <= 3


FACTORS = (0.0, 0.2, 0.6123, 0.9999, 1.0, 1.37, 1.8, 2.6)
CHANGES = [
    *({"jitter": ((name, f),)} for name in OPERATIONS if name != "hue" for f in FACTORS),
    *({"jitter": (("hue", f),)} for f in (-0.5, -0.31, -0.1, -0.003, 0.0, 0.1, 1 / 3, 0.5)),
    {"grayscale": True},
    {"solarize": True},
    {},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_each_operation_on_many_colours(changes: dict[str, Any]) -> None:
    """250,000 colours at random, all grays and the corners of the cube."""
    image = noise(500, 500)
    image[0, :256] = np.arange(256, dtype=np.uint8)[:, None]
    image[1, :8] = [[255 * (i >> c & 1) for c in range(3)] for i in range(8)]
    draw = untouched(image, **changes)
    (found,) = pixels([image], [draw], 500)
    assert np.array_equal(found, by_torchvision(image, draw, 500))


def test_every_hue_saturation_and_value() -> None:
    """All that 8 bits of HSV can be: every pair of a highest and a lowest value, every shift."""
    high, low = np.tril_indices(256)
    colours = np.stack([high, low, low], axis=-1).astype(np.uint8)
    size = math.ceil(math.sqrt(len(colours)))
    image = np.zeros((size, size, 3), np.uint8)
    image.reshape(-1, 3)[: len(colours)] = colours
    for shift in range(-127, 128):
        draw = untouched(image, jitter=(("hue", (shift + 0.5 * np.sign(shift)) / 255),))
        (found,) = pixels([image], [draw], size)
        assert np.array_equal(found, by_torchvision(image, draw, size)), shift


@pytest.mark.parametrize("size", [1, 5, 16, 31, 48])
def test_every_order_of_the_jitter(size: int) -> None:
    images = [photo(size, size, seed) for seed in range(24)]
    draws = [
        untouched(image, jitter=tuple((name, STRENGTHS[name]) for name in order))
        for image, order in zip(images, permutations(STRENGTHS), strict=True)
    ]
    found = pixels(images, draws, size)
    expected = [by_torchvision(i, d, size) for i, d in zip(images, draws, strict=True)]
    assert np.array_equal(found, np.stack(expected))


@pytest.mark.parametrize("kind", [noise, photo])
@pytest.mark.parametrize(
    ("size", "window"), [(1, 23), (2, 3), (8, 23), (16, 5), (45, 23), (224, 23), (224, 7)]
)
def test_blur_is_torchvisions_but_for_rounding(size: int, window: int, kind: Any) -> None:
    image = kind(size, size)
    sigmas = (0.1, 0.3, 0.77, 1.2, 2.0, 9.0)
    draws = [untouched(image, sigma=sigma) for sigma in sigmas]
    found = pixels([image] * len(draws), draws, size, window)
    for ours, draw in zip(found, draws, strict=True):
        difference = np.abs(ours - by_torchvision(image, draw, size, window))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("table", [IMAGENET, CIFAR, DEMO], ids=["imagenet", "cifar", "demo"])
def test_whole_views_as_they_are_drawn(table: ViewsConfig) -> None:
    """Both views of images of the views' size, normalised as the torchvision path does it."""
    size = 39
    images = [photo(size, size, seed) for seed in range(40)]
    views = replace(table, size=size)
    drawn = [
        [
            replace(
                draw_view(view, sample_rng(2, 0, i, which), size, size), crop=(0, 0, size, size)
            )
            for i in range(len(images))
        ]
        for which, view in enumerate((views.a, views.b))
    ]
    rows = [
        [row(draw, view.solarize_threshold) for draw in of_view]
        for of_view, view in zip(drawn, (views.a, views.b), strict=True)
    ]
    found = augment(
        [torch.from_numpy(image) for image in images],
        torch.tensor(rows, dtype=torch.float64),
        size=size,
        window=views.blur_window,
        mean=views.mean,
        std=views.std,
    )
    assert found.shape == (2, len(images), 3, size, size)
    normalise = Normalise(views, torch.device("cpu"), channels_last=True)
    for ours, of_view, view in zip(found, drawn, (views.a, views.b), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        theirs = [
            np.asarray(apply_view(Image.fromarray(image), draw, views, view))
            for image, draw in zip(images, of_view, strict=True)
        ]
        expected = normalise(torch.from_numpy(np.stack(theirs)))
        sharp = torch.tensor([draw.sigma is None for draw in of_view])
        assert torch.equal(ours[sharp], expected[sharp])
        one = 1.01 / 255 / min(views.std)
        assert torch.allclose(ours, expected, rtol=0, atol=one)


def test_images_of_any_size_and_threads() -> None:
    images = [photo(20 + 7 * i, 90 - 5 * i, i) for i in range(11)]
    draws = [
        draw_view(IMAGENET.a, sample_rng(0, 0, i, 0), image.shape[1], image.shape[0])
        for i, image in enumerate(images)
    ]
    alone = [pixels([i], [d], 33)[0] for i, d in zip(images, draws, strict=True)]
    for threads in (1, 2, 5, 20):
        assert np.array_equal(pixels(images, draws, 33, threads=threads), np.stack(alone))


def test_no_images() -> None:
    draws = torch.empty(2, 0, len(COLUMNS), dtype=torch.float64)
    found = augment([], draws, size=8, window=3, mean=(0, 0, 0), std=(1, 1, 1), threads=2)
    assert found.shape == (2, 0, 3, 8, 8)


def test_what_cannot_be() -> None:
    image = torch.from_numpy(noise(8, 9))
    draws = torch.tensor([[row(untouched(noise(8, 9)), 0)]], dtype=torch.float64)
    options: dict[str, Any] = dict(size=8, window=3, mean=(0, 0, 0), std=(1, 1, 1))
    beyond = draws.clone()
    beyond[..., COLUMNS.index("left")] = 1
    for images, rows, changes, said in (
        ([image], beyond, {}, "outside"),
        ([image], draws.float(), {}, "float64"),
        ([image], draws[..., :-1].contiguous(), {}, "16"),
        ([image, image], draws, {}, "16"),
        ([image.float()], draws, {}, "uint8"),
        ([image[:, ::2]], draws, {}, "contiguous"),
        ([image], draws, {"window": 4}, "odd"),
        ([image], draws, {"threads": 0}, "positive"),
    ):
        with pytest.raises(RuntimeError, match=said):
            augment(images, rows, **{**options, **changes})


def test_the_schema_is_kept() -> None:
    image = torch.from_numpy(noise(8, 9))
    draws = torch.tensor([[row(untouched(noise(8, 9)), 0)]], dtype=torch.float64)
    arguments = ([image], draws, 8, 3, torch.zeros(3), torch.ones(3), 1)
    torch.library.opcheck(
        torch.ops.sacl_fast.augment.default, arguments, test_utils=("test_schema",)
    )


def test_packed_images_give_the_same_views() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((31, 17), (1, 9), (40, 40))]
    draws = torch.tensor(
        [
            [
                row(draw_view(view, sample_rng(0, 0, i, which), *image.shape[1::-1]), 128)
                for i, image in enumerate(images)
            ]
            for which, view in enumerate((DEMO.a, DEMO.b))
        ],
        dtype=torch.float64,
    )
    mean, std = (torch.tensor(values) * 255 for values in (DEMO.mean, DEMO.std))
    expected = augment(
        [torch.from_numpy(image) for image in images],
        draws, size=24, window=5, mean=DEMO.mean, std=DEMO.std,
    )  # fmt: skip
    gap = np.zeros(5, np.uint8)  # images need not be aligned or adjacent
    pixels = torch.from_numpy(np.concatenate([p for i in images for p in (gap, i.reshape(-1))]))
    ends = np.cumsum([5 + image.size for image in images])
    placed = torch.tensor(
        [(end - i.size, *i.shape[:2]) for end, i in zip(ends.tolist(), images, strict=True)]
    )
    out = torch.empty(6, 3, 24, 24).to(memory_format=torch.channels_last)
    augment_packed(pixels, placed, draws, window=5, mean=mean, std=std, out=out, threads=2)
    assert torch.equal(out, expected.flatten(0, 1))
    for wrong in ((-1, 31, 17), (5, 31, 10**6), (int(ends[-1]), 1, 1), (5, 0, 17)):
        placed[0] = torch.tensor(wrong)
        with pytest.raises(RuntimeError, match="outside"):
            augment_packed(pixels, placed, draws, window=5, mean=mean, std=std, out=out)
