"""Folders that are no place for results: what is written there would be read as images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sacl_fast.config import DataConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.root import refuse_among_images
from sacl_fast.errors import UserError
from tests.data.images.cases import paint

SPLIT = ("x/train/a/1.png", "x/train/b/1.png", "x/val/a/1.png", "x/val/b/1.png")


def is_refused(out: Path, root: Path, **options) -> bool:
    try:
        refuse_among_images(out, DataConfig(root=str(root), **options))
    except UserError as error:
        assert f"{out} is within the images of data.root ({root})" in str(error)
        return True
    return False


def images_of(root: Path) -> list[str]:
    splits = open_sources(DataConfig(root=str(root), cache_dir=str(root.parent / "cache")), 0)
    return [f"{s.name(i)} {s.label(i)}" for s in splits if s is not None for i in range(len(s))]


@pytest.mark.parametrize(
    ("images", "out", "refused"),
    [
        (("x/1.png", "x/2.png"), "x/runs", True),
        (("x/1.png",), "x", True),
        (("x/1.png",), "xy/runs", False),
        (("x/1.png",), "x/../runs", False),
        (("x/1.png",), "x/.runs/1", False),
        (("x/a/1.png", "x/b/1.png"), "x/runs/1", True),
        (SPLIT, "x/train/runs", True),
        (SPLIT, "x/val/a", True),
        (SPLIT, "x", True),
        (SPLIT, "x/runs/train", False),
        (SPLIT, "x/test_runs", True),
        (SPLIT[:2], "x/eval", True),
        (("x/in/train/a/1.png", "x/in/val/a/1.png"), "x/runs", True),
    ],
)
def test_what_is_written_is_not_read(tmp_path, images, out, refused) -> None:
    """Refused where it would be; where it is not, the images are the same with it."""
    paint(tmp_path, *images)
    before = images_of(tmp_path / "x")
    assert is_refused(tmp_path / out, tmp_path / "x") == refused
    if not refused:
        paint(tmp_path, f"{out}/views.png", f"{out}/eval/knn.png")
        assert images_of(tmp_path / "x") == before


def test_by_whichever_path_and_for_sources_that_read_folders(tmp_path, monkeypatch) -> None:
    paint(tmp_path, "x/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    assert is_refused(tmp_path / "link" / "runs", tmp_path / "x")
    assert is_refused(Path("runs"), Path("."))
    assert is_refused(tmp_path / "x" / "runs", tmp_path / "x", source="webdataset")
    for source in ("demo", "cache", "python", "voc2007", "cifar10"):
        assert not is_refused(tmp_path / "x" / "runs", tmp_path / "x", source=source)
    (tmp_path / "list.txt").write_text("x/1.png\n")
    assert not is_refused(tmp_path / "x" / "runs", tmp_path / "list.txt")
    assert not is_refused(tmp_path / "x" / "runs", tmp_path / "gone")
    assert not os.path.exists("runs")
