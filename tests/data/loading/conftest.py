"""Folders of images for the tests of loaders, and both ways in which DALI's loader makes views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sacl_fast.ops import compiled
from tests.data.loading.cases import encoded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 images, of which 4 and 5 are bad."""
    for i in range(20):
        Image.new("RGB", (20, 20), (12 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "04.png").write_text("no picture")
    (tmp_path / "05.png").write_bytes(b"")
    return tmp_path


@pytest.fixture
def jpeg_folder(tmp_path: Path) -> Path:
    """30 JPEGs of different sizes, nested, without labels."""
    rng = np.random.default_rng(1)
    for i in range(30):
        small = rng.integers(0, 256, (4, 4, 3), np.uint8)
        pixels = np.asarray(Image.fromarray(small).resize((24 + i, 20 + 2 * (i % 7)), 3))
        file = tmp_path / "images" / f"{i % 3}" / "deep" / f"{i:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels, quality=90))
    return tmp_path / "images"


@pytest.fixture(params=["compiled", "by DALI alone"])
def compiled_views(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the compiled operator makes the views; every test with it and without."""
    pytest.importorskip("nvidia.dali", exc_type=ImportError)
    wanted = request.param == "compiled"
    if wanted and compiled.obstacle() is not None:
        pytest.skip(str(compiled.obstacle()))
    monkeypatch.setattr("sacl_fast.data.loading.dali_stream.are_compiled", lambda *_: wanted)
    return wanted
