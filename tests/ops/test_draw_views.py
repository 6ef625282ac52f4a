"""The compiled draws against those of numpy, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.draws import agrees_with_numpy, draw_rows, drawn_by_numpy
from sacl_fast.data.views.tables import CIFAR, DEMO, IMAGENET, TINY_IMAGENET
from sacl_fast.ops import compiled
from sacl_fast.ops.augment import COLUMNS
from sacl_fast.ops.draw_views import SETTINGS, draw_views

pytestmark = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))

_VIEW = ViewConfig(blur=0.5, solarize=0.5)
SETTINGS_OF_VIEWS = {
    "imagenet": IMAGENET,
    "tiny": TINY_IMAGENET,
    "cifar": CIFAR,
    "demo": DEMO,
    "some of the jitter": ViewsConfig(
        a=replace(_VIEW, brightness=0, hue=0.5), b=replace(_VIEW, contrast=0, saturation=100, hue=0)
    ),
    "none of the jitter": ViewsConfig(
        a=replace(_VIEW, brightness=0, contrast=0, saturation=0, hue=0),
        b=replace(_VIEW, brightness=0, saturation=0, hue=0, jitter=1),
    ),
    "never and always": ViewsConfig(
        a=ViewConfig(flip=0, jitter=0, grayscale=0, blur=0, solarize=0),
        b=ViewConfig(flip=1, jitter=1, grayscale=1, blur=1, solarize=1, solarize_threshold=0),
    ),
    "degenerate": ViewsConfig(
        a=replace(_VIEW, crop_scale=(1, 1), crop_ratio=(1, 1), blur_sigma=(0.3, 0.3)),
        b=replace(_VIEW, crop_scale=(1e-6, 1e-6), crop_ratio=(1000, 1000), hue=1e-30),
    ),
    "wide": ViewsConfig(
        a=replace(_VIEW, crop_scale=(1e-9, 1), crop_ratio=(0.001, 1000)),
        b=replace(_VIEW, crop_scale=(0.999, 1), crop_ratio=(0.001, 0.002)),
    ),
}


def images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices up to 2^62 and sizes: many photographs, small images, panoramas, lines, one pixel."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, 2 ** rng.integers(1, 63, count), dtype=np.int64)
    most = 10.0 ** rng.uniform(0, 4.5, (count, 2))
    sizes = rng.integers(1, most.astype(np.int64) + 1)
    sizes[:6] = [(1, 1), (1, 30_000), (30_000, 1), (2, 3), (1, 2), (2**31 - 1, 2**31 - 1)]
    sizes[6 : count // 4] = (500, 375)
    return index, sizes


@pytest.mark.parametrize("named", SETTINGS_OF_VIEWS)
def test_the_draws_are_numpys(named: str) -> None:
    index, sizes = images(1500)
    views = SETTINGS_OF_VIEWS[named]
    found = draw_rows(views, 11, 4, index, sizes)
    assert torch.equal(found, drawn_by_numpy(views, 11, 4, index, sizes))
    top, left, height, width = found[..., :4].unbind(-1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    given = torch.from_numpy(sizes)
    assert (top + height <= given[:, 0]).all() and (left + width <= given[:, 1]).all()


def test_all_orders_of_the_jitter_come_up() -> None:
    index, sizes = images(2000)
    rows = draw_rows(IMAGENET, 0, 0, index, sizes)[0]
    orders = rows[:, COLUMNS.index("operation0") :][:, :4].unique(dim=0)
    assert len(orders) == 24 + 1


@pytest.mark.parametrize(
    ("seed", "epoch"), [(0, 0), (1, 0), (0, 1), (2**53 - 1, 0), (2**31, 2**31), (3, 10**9)]
)
def test_any_seed_and_epoch(seed: int, epoch: int) -> None:
    index, sizes = images(200, 1)
    found = draw_rows(IMAGENET, seed, epoch, index, sizes)
    assert torch.equal(found, drawn_by_numpy(IMAGENET, seed, epoch, index, sizes))


@pytest.mark.parametrize("threads", [2, 3, 40])
def test_threads_change_nothing(threads: int) -> None:
    for count in (0, 1, 31, 33, 700):
        index, sizes = images(700)
        given = IMAGENET, 5, 6, index[:count], sizes[:count]
        assert torch.equal(draw_rows(*given, threads=threads), draw_rows(*given))


def test_no_images() -> None:
    found = draw_rows(CIFAR, 0, 0, np.empty(0, np.int64), np.empty((0, 2), np.int64))
    assert found.shape == (2, 0, len(COLUMNS))


def test_it_agrees_with_this_numpy() -> None:
    assert agrees_with_numpy()


def arguments(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = dict(
        seed=0,
        epoch=0,
        image_index=torch.tensor([0, 5]),
        sizes=torch.tensor([[3, 4], [5, 6]]),
        settings=torch.ones(2, len(SETTINGS), dtype=torch.float64),
        threads=1,
    )
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "negative"),
        ({"epoch": -1}, "negative"),
        ({"threads": 0}, "positive"),
        ({"image_index": torch.tensor([0, -5])}, "negative"),
        ({"image_index": torch.tensor([0])}, "image_index"),
        ({"image_index": torch.tensor([0, 1], dtype=torch.int32)}, "int64"),
        ({"sizes": torch.tensor([[3, 4], [0, 6]])}, "1 or more"),
        ({"sizes": torch.tensor([[3, 4], [2**31, 6]])}, "31"),
        ({"sizes": torch.tensor([[3, 4, 5, 6]])[:, ::2].expand(2, 2)}, "sizes must be"),
        ({"settings": torch.ones(2, len(SETTINGS))}, "float64"),
        ({"settings": torch.ones(2, 3, dtype=torch.float64)}, "settings must be"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], said: str) -> None:
    given = arguments(**changes)
    options = {name: given.pop(name) for name in ("threads",)}
    with pytest.raises(RuntimeError, match=said):
        draw_views(*given.values(), **options)


def test_the_schema_is_kept() -> None:
    torch.library.opcheck(
        torch.ops.sacl_fast.draw_views.default,
        tuple(arguments().values()),
        test_utils=("test_schema",),
    )
