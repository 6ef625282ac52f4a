"""DALI's views against torchvision's: the same draws, pixel by pixel, and free draws, on the whole.

DALI itself runs here, on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.views.dali_parameters import Parameters, pack
from sacl_fast.data.views.draw import ViewDraw, apply_view, draw_view, sample_rng
from sacl_fast.data.views.tables import CIFAR, DEMO, IMAGENET

pytest.importorskip("nvidia.dali", exc_type=ImportError)

from nvidia.dali import types

from sacl_fast.data.views.dali import ViewPipeline, _graph

CPU = torch.device("cpu")
PLAIN = ViewConfig(flip=0, jitter=0, grayscale=0)
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


def photos(count: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """(n, H, W, 3) uint8: smooth coloured patches with some grain, over the whole range."""
    rng = np.random.default_rng(5)
    height, width = size
    coarse = rng.integers(0, 256, (count, 6, 6, 3), np.uint8)
    fine = [np.asarray(Image.fromarray(c).resize((width, height), 3)) for c in coarse]
    grain = rng.normal(0, 6, (count, height, width, 3))
    return (np.stack(fine) + grain).clip(0, 255).astype(np.uint8)


def by_dali(images: np.ndarray, views: ViewsConfig, *draws: list[ViewDraw]) -> np.ndarray:
    """(V, n, S, S, 3) in 0..255: views a (and b) of the images with the given draws."""
    a, b = (
        pack(drawn, len(images), views, view)
        for drawn, view in zip((draws * 2)[:2], (views.a, views.b), strict=True)
    )
    pipeline = ViewPipeline(
        views, lambda: (images, a, b), encoded=False, batch=len(images), device=CPU
    )
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
    found = torch.stack(pipeline.run()) * std + mean
    return found.permute(0, 1, 3, 4, 2).numpy()[: len(draws)]


def by_torchvision(images: np.ndarray, views: ViewsConfig, *draws: list[ViewDraw]) -> np.ndarray:
    return np.stack(
        [
            [
                np.asarray(apply_view(Image.fromarray(image), draw, views, view), np.float32)
                for image, draw in zip(images, drawn, strict=True)
            ]
            for drawn, view in zip(draws, (views.a, views.b), strict=False)
        ]
    )


def one_view(size: int, view: ViewConfig, window: int = 23) -> ViewsConfig:
    return ViewsConfig(size=size, blur_window=window, a=view, b=view)


def drawn(views: ViewsConfig, view: ViewConfig, images: np.ndarray, seed: int, which: int = 0):
    height, width = images.shape[1:3]
    return [
        draw_view(view, sample_rng(seed, 0, i, which), width, height) for i in range(len(images))
    ]


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
        views, lambda: (blobs, given, given), encoded=True, batch=len(blobs), device=CPU
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
        views, lambda: (images, given, given), encoded=False, batch=3, device=CPU, dtype=dtype
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

    def feed() -> tuple[np.ndarray, Parameters, Parameters]:
        return np.roll(images, next(turn), axis=0), given, given

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
            IMAGENET, lambda: [], encoded, "gpu", types.FLOAT16, 0.65,
            batch_size=2, num_threads=1, device_id=0, exec_dynamic=True,
        )  # fmt: skip
        assert graph.device_id == 0


# --- free draws: the same distributions ----------------------------------------------------------


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


def test_real_images_have_the_same_statistics(data_folder: Path, tmp_path: Path):
    """Per-channel means and standard deviations of the views of real photographs, free draws."""
    import tarfile

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
    source = ArraySource("photos", images, [], ())
    assert len(source) == len(images)

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
