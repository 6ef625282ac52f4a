"""DALI's views against torchvision's for the same draws, pixel by pixel.

DALI itself runs here, on the CPU.
"""

# pyright: reportAttributeAccessIssue=false
# (DALI's stubs do not know its enums' members.)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.dali_parameters import Parameters, pack
from sacl_fast.data.views.draw import ViewDraw
from sacl_fast.data.views.tables import CIFAR, DEMO, IMAGENET

pytest.importorskip("nvidia.dali", exc_type=ImportError)

from nvidia.dali import types

from sacl_fast.data.views.dali import ViewPipeline, _graph
from tests.data.views.dali_cases import CPU, PLAIN, by_dali, by_torchvision, drawn, one_view, photos

WHOLE = ViewDraw(
    crop=(0, 0, 64, 64), flip=False, jitter=None, grayscale=False, sigma=None, solarize=False
)
# Of 255: mean absolute difference of an image, and of the worst 1 in 1,000 values. A crop differs
# by the rounding of the bicubic weights, and along its edges, where DALI sees the pixels beyond
# them; an operation on colours by Pillow's rounding down, hue by the 8 bits that Pillow gives it.
TOLERANCES: dict[str, tuple[float, float]] = {
    "nothing": (0.0, 0.0),
    "crop": (0.6, 6),
    "upscaled crop": (0.6, 12),
    "flip": (0.6, 6),
    "brightness": (0.6, 1.01),
    "contrast": (0.6, 2.01),
    "saturation": (0.6, 1.5),
    "hue": (0.7, 8),
    "grayscale": (0.6, 1.01),
    "blur": (0.4, 1.5),
    "solarize": (0.01, 1.01),
}


JITTERED = replace(PLAIN, jitter=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)


OPERATIONS: dict[str, tuple[ViewConfig, int, list[ViewDraw]]] = {
    "nothing": (PLAIN, 64, [WHOLE]),
    "crop": (PLAIN, 24, [replace(WHOLE, crop=(3, 5, 50, 41)), replace(WHOLE, crop=(0, 0, 64, 61))]),
    "upscaled crop": (PLAIN, 96, [replace(WHOLE, crop=(30, 20, 25, 31))]),
    "flip": (PLAIN, 24, [replace(WHOLE, crop=(3, 5, 50, 41), flip=True)]),
    **{
        name: (JITTERED, 64, [replace(WHOLE, jitter=((name, f),)) for f in factors])
        for name, factors in {
            "brightness": (0.2, 0.6, 1.0, 1.5, 1.8),
            "contrast": (0.2, 0.6, 1.0, 1.5, 1.8),
            "saturation": (0.2, 0.6, 1.0, 1.5, 1.8),
            "hue": (-0.5, -0.4, -0.3, -0.1, -0.02, 0.0, 0.1, 1 / 6, 0.25, 0.35, 0.45, 0.5),
        }.items()
    },
    "grayscale": (replace(PLAIN, grayscale=0.5), 64, [replace(WHOLE, grayscale=True)]),
    "blur": (
        replace(PLAIN, blur=1.0),
        64,
        [replace(WHOLE, sigma=sigma) for sigma in (0.1, 0.3, 0.9, 1.5, 2.0)],
    ),
    "solarize": (
        replace(PLAIN, solarize=0.5, solarize_threshold=99),
        64,
        [replace(WHOLE, solarize=True), WHOLE],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operators_agree(name: str):
    view, size, draws = OPERATIONS[name]
    views = one_view(size, view)
    images = photos(len(draws))
    ours, reference = by_dali(images, views, draws), by_torchvision(images, views, draws)
    difference = np.abs(ours - reference)[0]
    mean, worst = TOLERANCES[name]
    assert difference.mean((1, 2, 3)).max() <= mean + 1e-3
    assert np.quantile(difference, 0.999) <= worst + 1e-3


def test_blur_window_is_the_tables_and_borders_are_mirrored():
    images = photos(2)
    draws = [replace(WHOLE, sigma=2.0)] * 2
    for window, size in ((3, 64), (7, 64), (23, 8)):
        views = one_view(size, replace(PLAIN, blur=1.0), window)
        difference = np.abs(by_dali(images, views, draws) - by_torchvision(images, views, draws))
        assert difference.mean() < 0.6, (window, size)


@pytest.mark.parametrize("table", [IMAGENET, CIFAR, DEMO], ids=["imagenet", "cifar", "demo"])
def test_whole_views_agree(table: ViewsConfig):
    views = replace(table, size=48)
    images = photos(40, (90, 70))
    draws = [drawn(views, view, images, 3, which) for which, view in enumerate((views.a, views.b))]
    ours, reference = by_dali(images, views, *draws), by_torchvision(images, views, *draws)
    difference = ours - reference
    assert np.abs(difference).mean() < 1.25
    assert np.abs(difference.mean()) < 0.3  # nothing is brighter or darker on the whole
    per_image = (difference**2).mean((2, 3, 4))
    # Solarising turns a value that is one off into one far away: hence the median.
    assert np.median(10 * np.log10(255**2 / per_image)) > 40
    assert np.quantile(10 * np.log10(255**2 / per_image), 0.05) > 28


def test_jpeg_pixels_are_pillows(tmp_path: Path):
    """Chroma subsampling, odd sizes, progressive, gray, and an orientation that is ignored."""
    pixels = photos(1, (61, 83))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "4:2:0": ("RGB", {"quality": 80, "subsampling": 2}),
        "4:2:2": ("RGB", {"quality": 80, "subsampling": 1}),
        "4:4:4": ("RGB", {"quality": 95, "subsampling": 0}),
        "progressive": ("RGB", {"quality": 80, "progressive": True}),
        "gray": ("L", {"quality": 80}),
        "rotated": ("RGB", {"quality": 80, "exif": exif}),
    }
    blobs, reference = [], []
    for mode, options in kinds.values():
        file = tmp_path / "x.jpg"
        Image.fromarray(pixels).convert(mode).save(file, **options)
        blobs.append(np.fromfile(file, np.uint8))
        with Image.open(file) as image:
            reference.append(np.asarray(image.convert("RGB"))[:61, :61])
    views = one_view(61, PLAIN)
    given = pack([replace(WHOLE, crop=(0, 0, 61, 61))] * len(blobs), len(blobs), views, views.a)
    pipeline = ViewPipeline(
        views, lambda: (blobs, (given, given)), encoded=True, batch=len(blobs), device=CPU
    )
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
    found = (pipeline.run()[0] * std + mean).permute(0, 2, 3, 1).numpy()
    for name, ours, theirs in zip(kinds, found, reference, strict=True):
        assert np.abs(ours - theirs).max() < 1.01, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_output_is_normalised_and_channels_last(dtype: torch.dtype):
    views = one_view(64, PLAIN)
    images = photos(3)
    given = pack([WHOLE] * 3, 3, views, views.a)
    pipeline = ViewPipeline(
        views, lambda: (images, (given, given)), encoded=False, batch=3, device=CPU, dtype=dtype
    )
    view, _ = pipeline.run()
    assert view.dtype == dtype
    assert view.is_contiguous(memory_format=torch.channels_last)
    expected = (torch.from_numpy(images) / 255 - torch.tensor(views.mean)) / torch.tensor(views.std)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert torch.allclose(view.float(), expected.permute(0, 3, 1, 2), atol=tolerance)


def test_batches_stay_what_they_were():
    """A tensor that is kept is not overwritten by later batches, nor freed with the pipeline."""
    views = one_view(32, replace(PLAIN, jitter=1.0))
    images = photos(4)
    given = pack(drawn(views, views.a, images, 0), 4, views, views.a)
    turn = iter(range(100))

    def feed() -> tuple[np.ndarray, tuple[Parameters, Parameters]]:
        return np.roll(images, next(turn), axis=0), (given, given)

    pipeline = ViewPipeline(views, feed, encoded=False, batch=4, ahead=2, device=CPU)
    kept = [pipeline.run()[0] for _ in range(3)]
    copies = [view.clone() for view in kept]
    for _ in range(6):
        pipeline.run()
    del pipeline
    for view, copy in zip(kept, copies, strict=True):
        assert torch.equal(view, copy)
    assert not torch.equal(kept[0], kept[1])


def operators(views: ViewsConfig) -> bytes:
    """The graph of the views as DALI writes it down."""
    graph = _graph(
        views, lambda: [], False, "cpu", types.FLOAT, 0.65,
        batch_size=2, num_threads=1, device_id=None, exec_dynamic=True,
    )  # fmt: skip
    graph.build()
    return graph.serialize()


def test_what_a_view_switches_off_is_not_in_its_graph():
    always = one_view(32, replace(PLAIN, jitter=1.0, grayscale=1.0, blur=1.0, solarize=1.0))
    assert b"GaussianBlur" in operators(always)
    sometimes = one_view(32, replace(PLAIN, blur=0.1))
    assert b"GaussianBlur" in operators(sometimes)
    assert b"_conditional__Split" in operators(sometimes)
    blurred = operators(one_view(32, replace(PLAIN, blur=1.0)))
    assert b"_conditional__Split" not in blurred
    nothing = operators(one_view(32, PLAIN))
    for name in (b"GaussianBlur", b"_conditional__Split", b"BrightnessContrast", b"Arithmetic"):
        assert name not in nothing
    asymmetric = replace(sometimes, a=PLAIN)
    assert (
        operators(asymmetric).count(b"GaussianBlur")
        == operators(sometimes).count(b"GaussianBlur") / 2
    )


def test_the_graph_for_a_gpu_can_be_drawn_up_without_one():
    for encoded in (True, False):
        graph = _graph(
            IMAGENET, lambda: [], encoded, "cuda", types.FLOAT16, 0.65,
            batch_size=2, num_threads=1, device_id=0, exec_dynamic=True,
        )  # fmt: skip
        assert graph.device_id == 0
