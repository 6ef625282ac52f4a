"""The picture of the views shows what training sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from sacl_fast.config import Config, DataConfig, ViewsConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.contact_sheet import contact_sheet
from sacl_fast.data.loading.readers import ViewReader
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError


@pytest.fixture
def source() -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 24, 36, 3), np.uint8)
    return ArraySource("x" * 80, pixels, [0] * 6, ())


@pytest.mark.parametrize(("size", "side"), [(32, 128), (100, 100), (224, 224)])
def test_size(source: ArraySource, size: int, side: int) -> None:
    config = Config(views=ViewsConfig(size=size))
    narrow, wide = (contact_sheet(source, config, count=n).size for n in (2, 5))
    assert narrow[1] == wide[1] > 3 * side
    assert wide[0] - narrow[0] >= 3 * side


def test_fewer_images_than_asked_for(source: ArraySource) -> None:
    config = Config(views=ViewsConfig(size=32))
    assert (
        contact_sheet(source, config, count=50).size == contact_sheet(source, config, count=6).size
    )


def test_holds_the_views_of_training(source: ArraySource) -> None:
    config = Config(seed=3, views=ViewsConfig(size=32))
    sheet = np.asarray(contact_sheet(source, config, count=1, epoch=2))
    views = ViewReader(source, config)[2, epoch_order(3, 2, 6)[:1]]
    for view in (views.a[0], views.b[0]):
        large = np.asarray(Image.fromarray(view.numpy()).resize((128, 128), 0))
        assert _contains(sheet, large)
    other = replace(config, seed=4)
    assert not _contains(np.asarray(contact_sheet(source, other, count=1, epoch=2)), large)


@pytest.mark.parametrize("loader", ["torchvision", "auto"])
def test_unreadable_images_are_named(
    tmp_path: Path, loader: Literal["torchvision", "auto"], caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(20):
        Image.new("RGB", (20, 20), (12 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_text("<html>404</html>")
    data = DataConfig(root=str(tmp_path), loader=loader)
    config = Config(views=ViewsConfig(size=32), data=data)
    source = open_sources(data, 0).train
    contact_sheet(source, config, count=20)
    assert f"skipped unreadable image {tmp_path / '07.png'}: no known image format" in caplog.text
    for path in tmp_path.iterdir():
        path.write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"of 20 images are unreadable.*no known image format"):
        contact_sheet(source, config)


def _contains(sheet: np.ndarray, tile: np.ndarray) -> bool:
    high, wide = tile.shape[:2]
    corners = np.argwhere((sheet == tile[0, 0]).all(2))
    return any(np.array_equal(sheet[y : y + high, x : x + wide], tile) for y, x in corners)
