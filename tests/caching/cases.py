"""What the tests of caches share: images of all kinds, and caches of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from sacl_fast.caching.make import make_cache
from sacl_fast.config import DataConfig
from sacl_fast.config.cache import CacheConfig
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Source, Splits


def all_kinds(root: Path) -> Path:
    """A folder of two classes: every way in which a file becomes RGB, images of one pixel, names
    from elsewhere, and three files that are broken, one of them behind a good header."""
    rng = np.random.default_rng(0)

    def colours(height: int, width: int, channels: int = 3) -> np.ndarray:
        return rng.integers(0, 256, (height, width, channels), np.uint8)

    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    exif[0x010E] = "long " * 12_000  # so that the size comes late in the file
    palette = Image.fromarray(colours(9, 8)).quantize(4)
    palette.info["transparency"] = 1
    wide = Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000)
    Image.fromarray(colours(31, 20)).save(root / "a" / "00.jpg", quality=90)
    Image.fromarray(colours(20, 31)).save(root / "a" / "01.jpg", exif=exif)
    Image.fromarray(colours(17, 5)[..., 0]).save(root / "a" / "02.jpg")
    Image.fromarray(colours(8, 9)).convert("CMYK").save(root / "a" / "03.jpg")
    Image.fromarray(colours(7, 7, 4)).save(root / "a" / "04.png")
    palette.save(root / "a" / "05.png")
    wide.save(root / "a" / "06.png")
    Image.fromarray(colours(1, 1)).save(root / "a" / "07.png")
    Image.fromarray(colours(1, 40)).save(root / "b" / "08.png")
    Image.fromarray(colours(5, 4)).save(
        root / "b" / "09.gif", save_all=True, append_images=[Image.fromarray(colours(5, 4))]
    )
    Image.fromarray(colours(12, 13)).save(root / "b" / "10.webp", lossless=True)
    Image.fromarray(colours(13, 12)).save(root / "b" / "11.tif", exif=exif)
    Image.fromarray(colours(64, 64)).save(root / "b" / "12.png")
    cut = (root / "b" / "12.png").read_bytes()
    (root / "b" / "12.png").write_bytes(cut[: len(cut) // 2])
    (root / "b" / "13.jpg").write_bytes(b"")
    (root / "a" / "14.jpg").write_text("no picture")
    with open(os.fsencode(root / "b") + b"/\xff\xe9 15.png", "wb") as file:
        Image.fromarray(colours(3, 3)).save(file, "PNG")
    return root


def config_of(size: int = 0, **data) -> CacheConfig:
    return CacheConfig(size=size, data=DataConfig(**{"workers": 0, "max_bad_share": 0.5, **data}))


def cached(root: Path, out: Path, size: int = 0, **data) -> Path:
    """``out``, made of the folder ``root``."""
    config = config_of(size, root=str(root), **data)
    make_cache(open_sources(config.data, 0), out, config, quiet=True)
    return out


def opened(file: Path, **data) -> Splits:
    data = {"source": "cache", "root": str(file), **data}
    return open_sources(DataConfig(**data), 0)


def pixels_of(source: Source, index: int) -> np.ndarray | str:
    """The pixels of an image, or why it is unreadable."""
    try:
        return np.asarray(source.load(index))
    except BadImage as error:
        return str(error)


def assert_same_images(found: Source, expected: Source) -> None:
    assert len(found) == len(expected)
    assert found.classes == expected.classes
    assert np.array_equal(found.labels, expected.labels)
    for i in range(len(expected)):
        assert found.name(i) == expected.name(i)
        assert np.array_equal(pixels_of(found, i), pixels_of(expected, i)), expected.name(i)


def in_a_process(work: Callable[[], object]) -> int:
    """The exit code of a process of its own that does ``work``; minus a signal's number."""
    process = get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
