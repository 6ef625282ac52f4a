"""Views made by the CUDA kernels against those of the compiled CPU operator, which is tested
against Pillow: the same 8 bits before normalisation, and the same numbers after it.

Of the blur, exp and the fused multiplications may differ: 1 of 255, for at most one value in a
thousand.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cuda_devices import DTYPES, Device, both, emulator, get_device
from cuda_graphs import captured
from PIL import Image
from torch import Tensor

from sacl_fast.config import ViewsConfig
from sacl_fast.data.views.draw import ViewDraw, draw_view, sample_rng
from sacl_fast.data.views.operator import pack_rows
from sacl_fast.data.views.tables import CIFAR, DEMO, IMAGENET, TINY_IMAGENET
from sacl_fast.ops import compiled
from sacl_fast.ops.augment import COLUMNS, OPERATIONS, augment_packed

pytestmark = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))

SAME = torch.zeros(3), torch.ones(3)  # normalised by these, pixels are themselves
AT = {name: i for i, name in enumerate(COLUMNS)}
STRENGTHS = {"brightness": 1.4, "contrast": 0.3, "saturation": 1.7, "hue": -0.07}
TABLES = {"imagenet": IMAGENET, "cifar": CIFAR, "tiny": TINY_IMAGENET, "demo": DEMO}


class Packed(NamedTuple):
    pixels: Tensor
    images: Tensor


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def packed(images: Sequence[np.ndarray], gap: int = 5) -> Packed:
    """The images one after another, ``gap`` bytes before each; the last ends the buffer."""
    parts, placed, end = [], [], 0
    for image in images:
        parts += [np.full(gap, 99, np.uint8), image.reshape(-1)]
        placed.append((end + gap, *image.shape[:2]))
        end += gap + image.size
    return Packed(torch.from_numpy(np.concatenate(parts)), torch.tensor(placed))


def untouched(image: np.ndarray, **changes: float) -> list[float]:
    """A row of draws: the whole image, but for the ``changes``."""
    values = dict.fromkeys(COLUMNS, 0.0)
    values.update(height=image.shape[0], width=image.shape[1], threshold=256)
    return list({**values, **changes}.values())


def jittered(image: np.ndarray, order: Sequence[str], **changes: float) -> list[float]:
    each = {f"operation{i}": float(OPERATIONS[name]) for i, name in enumerate(order)}
    each |= {f"factor{i}": STRENGTHS[name] for i, name in enumerate(order)}
    return untouched(image, **each, **changes)


def drawn(views: ViewsConfig, images: Sequence[np.ndarray], seed: int = 0) -> Tensor:
    """(2, n, 16): both views of each image, as a run draws them."""
    sizes = [(image.shape[1], image.shape[0]) for image in images]
    rows = []
    for which, view in enumerate((views.a, views.b)):
        draws: list[ViewDraw] = [
            draw_view(view, sample_rng(seed, 0, i, which), *size) for i, size in enumerate(sizes)
        ]
        rows.append(pack_rows(draws, len(images), views, view))
    return torch.from_numpy(np.stack(rows))


def on_cpu(given: Packed, draws: Tensor, size: int, window: int, norm: Any = SAME) -> Tensor:
    out = torch.empty(draws[..., 0].numel(), 3, size, size).to(memory_format=torch.channels_last)
    mean, std = norm
    augment_packed(*given, draws, window=window, mean=mean, std=std, out=out)
    return out


def on_device(
    device: Device,
    given: Packed,
    draws: Tensor,
    size: int,
    window: int,
    norm: Any = SAME,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    out = torch.full((draws[..., 0].numel(), 3, size, size), torch.nan, dtype=dtype)
    there = device.put(out.to(memory_format=torch.channels_last))
    pixels, images, rows, mean, std = map(device.put, (*given, draws, *norm))
    device.ops.augment_packed(pixels, images, rows, window, mean, std, there, 1)
    assert there is not None
    return there.cpu()


def assert_same(
    device: Device, images: Sequence[np.ndarray], draws: Any, size: int, window: int = 23
) -> None:
    given = packed(images)
    draws = draws if isinstance(draws, Tensor) else torch.tensor([draws], dtype=torch.float64)
    expected = on_cpu(given, draws, size, window)
    found = on_device(device, given, draws, size, window)
    blurred = (draws[..., AT["sigma"]] > 0).flatten()
    assert torch.equal(found[~blurred], expected[~blurred])
    difference = (found[blurred] - expected[blurred]).abs()
    if blurred.any():
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 1e-3


@both()
@pytest.mark.parametrize(
    ("image", "crop", "size"),
    [
        ((1, 1), (0, 0, 1, 1), 7),  # one pixel
        ((9, 7), (8, 6, 1, 1), 4),  # the last one of the buffer
        ((9, 7), (0, 0, 9, 7), 1),
        ((40, 30), (3, 5, 21, 17), 33),  # smaller than the view, more than a tile
        ((70, 61), (11, 7, 59, 50), 40),
        ((1, 600), (0, 0, 1, 600), 5),  # more weights a column than are held
        ((300, 2), (1, 0, 299, 2), 36),
        ((130, 280), (0, 0, 130, 280), 4),
    ],
)
def test_crops(device, image, crop, size):
    given = noise(*image)
    place = dict(zip(COLUMNS, crop, strict=False))
    draws = [untouched(given, **place, flip=flip) for flip in (0, 1)]
    assert_same(device, [given, given], draws, size)


@both()
@pytest.mark.parametrize("ends", range(4))
def test_pixels_that_end_anywhere(device, ends):
    """And begin anywhere: the buffer is part of a larger one."""
    image = noise(3, 5, ends)
    pixels = torch.cat([torch.zeros(ends, dtype=torch.uint8), torch.tensor(image.reshape(-1))])
    given = Packed(pixels, torch.tensor([[ends, 3, 5]]))
    draws = torch.tensor([[untouched(image)]], dtype=torch.float64)
    expected = on_cpu(given, draws, 8, 1)
    assert torch.equal(on_device(device, given, draws, 8, 1), expected)
    whole = device.put(pixels)
    placed, drawn_, mean, std = map(device.put, (torch.tensor([[0, 3, 5]]), draws, *SAME))
    out = device.put(torch.zeros(1, 3, 8, 8).to(memory_format=torch.channels_last))
    device.ops.augment_packed(whole[ends:], placed, drawn_, 1, mean, std, out, 1)
    assert torch.equal(out.cpu(), expected)


@both()
def test_every_order_of_the_jitter(device):
    images = [noise(9, 8, seed) for seed in range(48)]
    orders = [*permutations(STRENGTHS), *permutations(STRENGTHS)]
    gray = [0] * 24 + [1] * 24
    draws = [
        jittered(image, order, grayscale=g)
        for image, order, g in zip(images, orders, gray, strict=True)
    ]
    assert_same(device, images, draws, 12)


@both()
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_many_colours(device, name):
    """100 x 100 colours at random, grays, and the corners of the cube."""
    image = noise(100, 100)
    image[0] = np.arange(100, dtype=np.uint8)[:, None]
    image[1] = np.arange(156, 256, dtype=np.uint8)[:, None]
    image[2, :8] = [[255 * (i >> c & 1) for c in range(3)] for i in range(8)]
    factors = (-0.5, -0.003, 1 / 3) if name == "hue" else (0.0, 0.6123, 2.6)
    draws = [untouched(image, operation1=OPERATIONS[name], factor1=f) for f in factors]
    assert_same(device, [image] * len(draws), draws, 100)


@both()
def test_every_hue_and_saturation(device):
    """Every pair of a highest and a lowest value, in each order of the channels, some shifts."""
    high, low = np.tril_indices(256)
    order = np.arange(len(high)) % 6
    middle = low + (np.arange(len(high)) * 7) % (high - low + 1)
    values = np.stack([high, middle, low], axis=-1)
    places = np.array(list(permutations(range(3))))[order]
    image = np.zeros((182, 182, 3), np.uint8)
    image.reshape(-1, 3)[: len(high)] = np.take_along_axis(values, places, axis=1)
    hue = OPERATIONS["hue"]
    draws = [untouched(image, operation0=hue, factor0=shift) for shift in (-0.31, 0.0, 0.25)]
    assert_same(device, [image] * 3, draws, 182)


@both()
@pytest.mark.parametrize(
    ("size", "window"),
    [(1, 23), (2, 3), (5, 1), (5, 23), (7, 9), (8, 15), (24, 5), (33, 23), (48, 201)],
)
def test_blur(device, size, window):
    """Windows of one tap, and wider than 2 S - 1."""
    image = noise(size, size)
    sigmas = (0.1, 0.3, 0.77, 2.0, 9.0, 0.0)
    draws = [untouched(image, sigma=sigma, flip=1) for sigma in sigmas]
    assert_same(device, [image] * len(draws), draws, size, window)


@both()
def test_a_blur_of_more_pixels_than_a_block_holds(device):
    """Views of which a row is more than a block's share."""
    image = noise(4, 6)
    assert_same(device, [image], [untouched(image, sigma=1.1)], 2052, 3)


@both()
@pytest.mark.parametrize("table", TABLES)
def test_both_views_of_every_preset(device, table, tmp_path):
    """Of images of several sizes at odd offsets, normalised, at their own and at an odd size."""
    images = photos(tmp_path) or [noise(50 + 7 * i, 90 - 5 * i, i) for i in range(6)]
    views = TABLES[table]
    given, draws = packed(images), drawn(views, images)
    norm = tuple(255 * torch.tensor(values) for values in (views.mean, views.std))
    for size in (32, 45):
        expected = on_cpu(given, draws, size, views.blur_window, norm)
        found = on_device(device, given, draws, size, views.blur_window, norm)
        sharp = (draws[..., AT["sigma"]] == 0).flatten()
        assert torch.equal(found[sharp], expected[sharp])
        one = 1.01 / (255 * min(views.std))
        assert torch.allclose(found, expected, rtol=0, atol=one)
        # As a whole they are those views: the mean and the spread of each channel.
        for statistic in (Tensor.mean, Tensor.std):
            theirs = statistic(expected, (0, 2, 3))
            assert torch.allclose(statistic(found, (0, 2, 3)), theirs, atol=1e-4)


def photos(folder: Path, count: int = 6) -> list[np.ndarray]:
    """Of the ImageNet sample, cut small; none where there is no real data."""
    import os

    archive = Path(os.environ.get("SACL_FAST_DATA", "")) / "imagenet-sample.tar"
    if not os.environ.get("SACL_FAST_DATA") or not archive.is_file():
        return []
    images = []
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is None or len(images) == count:
                continue
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
            i = len(images)
            images.append(np.array(image)[20 : 97 + 9 * i, 30 : 150 - 11 * i].copy())
    return images


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 20, 9])
def test_number_types(device, dtype, size):
    """What is written is the float32 value rounded once, by vectors or one by one."""
    images = [noise(20, 31, i) for i in range(3)]
    given, draws = packed(images), drawn(replace(DEMO, size=32), images)
    draws[1, :, AT["sigma"]] = 0.8
    draws[0, :, AT["sigma"]] = 0
    norm = torch.tensor([120.0, 118, 99]), torch.tensor([58.0, 57, 61])
    exact = on_device(device, given, draws, size, 5, norm)
    found = on_device(device, given, draws, size, 5, norm, dtype)
    assert torch.equal(found, exact.to(dtype))
    assert torch.allclose(exact, on_cpu(given, draws, size, 5, norm), rtol=0, atol=1.01 / 57)


@both()
@pytest.mark.parametrize("threshold", [0, 1, 128, 255, 256])
def test_thresholds(device, threshold):
    image = noise(16, 16)
    draws = [untouched(image, threshold=threshold, sigma=sigma) for sigma in (0, 0.1)]
    assert_same(device, [image, image], draws, 16)


@both()
@pytest.mark.parametrize("views", [1, 3])
def test_one_image_and_any_number_of_views(device, views):
    image = noise(23, 19)
    draws = torch.tensor([[untouched(image, top=v, height=19)] for v in range(views)])
    assert_same(device, [image], draws.double(), 16)


@both()
def test_no_images(device):
    given = Packed(torch.empty(0, dtype=torch.uint8), torch.empty(0, 3, dtype=torch.int64))
    draws = torch.empty(2, 0, len(COLUMNS), dtype=torch.float64)
    assert on_device(device, given, draws, 8, 3).shape == (0, 3, 8, 8)


WRONG = {
    "crop too low": ({"top": 1}, None),
    "crop too far right": ({"left": 0.5}, None),
    "crop before the image": ({"left": -1}, None),
    "no height": ({"height": 0}, None),
    "not a number": ({"width": float("nan")}, None),
    "two contrasts": ({"operation0": 2, "operation3": 2}, None),
    "before the pixels": ({}, (-1, 8, 9)),
    "beyond the pixels": ({}, (6, 8, 9)),
    "huge": ({}, (5, 2**40, 2**40)),
    "unreadable": ({}, (0, 0, 0)),
}


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_numbers_end_the_kernel(device, wrong):
    """On a GPU, that ends the process's use of it."""
    changes, placed = WRONG[wrong]
    image = noise(8, 9)
    given, draws = packed([image]), torch.tensor([[untouched(image, **changes)]])
    if placed is not None:
        given = Packed(given.pixels, torch.tensor([placed]))
    with pytest.raises(RuntimeError, match="trap"):
        on_device(device, given, draws.double(), 8, 3)


@both()
def test_wrong_arguments_are_errors(device):
    image = noise(8, 9)
    pixels, images = packed([image])
    draws = torch.tensor([[untouched(image)]], dtype=torch.float64)
    out = torch.empty(1, 3, 8, 8).to(memory_format=torch.channels_last)
    good = [pixels, images, draws, 3, *SAME, out, 1]
    for place, wrong, said in (
        (0, pixels.float(), "pixels is not contiguous, of the expected type"),
        (1, images[:, :2].contiguous(), "images has not the shape"),
        (1, images.int(), "images is not"),
        (2, draws.float(), "draws is not"),
        (2, draws[..., :15].contiguous(), "draws has not the shape"),
        (3, 4, "odd"),
        (4, torch.zeros(2), "mean has not the shape"),
        (6, out.double(), "float32, float16 or bfloat16"),
        (6, torch.empty(1, 3, 8, 8), "channels-last"),
        (6, torch.empty(2, 3, 8, 8), "views"),
        (6, torch.empty(1, 3, 8, 9), "size, size"),
    ):
        given = [wrong if i == place else value for i, value in enumerate(good)]
        with pytest.raises(RuntimeError, match=said):
            there = (device.put(v) if isinstance(v, Tensor) else v for v in given)
            device.ops.augment_packed(*there)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_changes_nothing(device):
    images = [noise(40, 52, i) for i in range(3)]
    given, draws = packed(images), drawn(IMAGENET, images, seed=3)
    first = on_device(device, given, draws, 36, 9)
    emulator().sacl_simt_reverse(1)
    try:
        assert torch.equal(first, on_device(device, given, draws, 36, 9))
    finally:
        emulator().sacl_simt_reverse(0)


@pytest.mark.gpu
def test_more_views_than_are_made_at_a_time():
    """200 KB of scratch each, of 32 MB."""
    images = [noise(120 + i, 150, i) for i in range(100)]
    draws = drawn(IMAGENET, images)
    assert_same(get_device("cuda"), images, draws, 224)


@pytest.mark.gpu
def test_captured_and_replayed_with_new_draws_on_another_stream():
    ops = get_device("cuda").ops
    images = [noise(60 + i, 75, i) for i in range(9)]
    given = packed(images)
    pixels, placed, mean, std = (t.cuda() for t in (*given, *SAME))
    draws = [drawn(IMAGENET, images, seed) for seed in range(3)]
    held = draws[0].cuda()
    out = torch.empty(18, 3, 48, 48, dtype=torch.bfloat16, device="cuda")
    out = out.to(memory_format=torch.channels_last)
    graph, _ = captured(lambda: ops.augment_packed(pixels, placed, held, 9, mean, std, out, 1))
    for new in draws[1:]:
        held.copy_(new)
        graph.replay()
        again = torch.empty_like(out)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # what follows must wait for it
            later = new.cuda()
            ops.augment_packed(pixels, placed, later, 9, mean, std, again, 1)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(out, again)
        assert (out.float().cpu() - on_cpu(given, new, 48, 9)).abs().max() <= 2  # bfloat16 and 1
