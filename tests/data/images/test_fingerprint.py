"""What changes the fingerprint of a data set, and what does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sacl_fast.config import DataConfig
from sacl_fast.data.images.fingerprint import fingerprint
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from tests.data.images.test_webdataset import samples, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "x"
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "list.txt").write_text("a/1.jpg\tone\na/2.jpg\tone\nb/1.jpg\ttwo\n")
    return root


def of(root: Path, **options) -> str:
    options = {"cache_dir": str(root.parent / "cache"), "max_bad_share": 1.0, **options}
    return fingerprint(open_sources(DataConfig(root=str(root), **options), 0).train)


@pytest.mark.parametrize("listed", ["", "list.txt"])
def test_a_copy_keeps_it(folder: Path, tmp_path: Path, listed: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "y", copy_function=shutil.copyfile)
    assert of(folder / listed) == of(copy / listed) == of(copy / listed)
    assert len(of(copy)) == 32 and int(of(copy), 16)


def _replace(root: Path) -> None:
    (root / "a/2.jpg").write_bytes(b"of another size")


def _rename(root: Path) -> None:
    (root / "a/2.jpg").rename(root / "a/3.jpg")


def _remove(root: Path) -> None:
    (root / "a/2.jpg").unlink()


def _add(root: Path) -> None:
    (root / "b/0.jpg").write_bytes(b"new")


def _relabel(root: Path) -> None:
    (root / "b").rename(root / "c")


@pytest.mark.parametrize("change", [_replace, _rename, _remove, _add, _relabel])
def test_what_changes_a_folder(folder: Path, change: Callable[[Path], None]) -> None:
    before = of(folder)
    change(folder)
    assert of(folder) != before


@pytest.mark.parametrize(
    "lines",
    [
        "a/2.jpg\tone\na/1.jpg\tone\nb/1.jpg\ttwo\n",  # another order
        "a/1.jpg\tone\na/2.jpg\ttwo\nb/1.jpg\ttwo\n",  # another label
        "a/1.jpg\tone\na/2.jpg\tone\nb/1.jpg\tthree\n",  # another class
        "a/1.jpg\tone\nb/1.jpg\ttwo\n",
    ],
)
def test_what_changes_a_list(folder: Path, lines: str) -> None:
    before = of(folder / "list.txt")
    (folder / "list.txt").write_text(lines)
    assert of(folder / "list.txt") != before


def test_a_list_whose_image_is_replaced_or_gone(folder: Path) -> None:
    before = of(folder / "list.txt")
    _replace(folder)
    replaced = of(folder / "list.txt")
    _remove(folder)
    assert len({before, replaced, of(folder / "list.txt")}) == 3


def test_the_limit_counts(folder: Path) -> None:
    whole, two = of(folder), of(folder, limit=2)
    assert whole != two == of(folder, limit=2)
    assert of(folder, limit=3) == whole


def test_shards(tmp_path: Path) -> None:
    def shards(name: str, count: int, **options) -> str:
        for i in range(2):
            write_shard(tmp_path / name / f"{i}.tar", samples(5 * i, count))
        return of(tmp_path / name, source="webdataset", **options)

    first = shards("x", 3)
    assert first == shards("y", 3)
    assert first != shards("x", 4)
    assert first != shards("y", 3, labels="none")
    os.rename(tmp_path / "y/1.tar", tmp_path / "y/2.tar")
    assert of(tmp_path / "y", source="webdataset") != first


def test_arrays_are_told_by_their_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2000, 4, 4, 3), np.uint8)
    labels = np.zeros(2000, np.int64)
    first = fingerprint(ArraySource("one", images, labels, ("a", "b")))
    assert first == fingerprint(ArraySource("other", images.copy(), labels, ("a", "b")))
    images[1999, 3, 3, 2] ^= 1
    assert first != fingerprint(ArraySource("one", images, labels, ("a", "b")))
