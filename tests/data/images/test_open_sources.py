"""What can be given as images, and what is answered where it cannot."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.config.choices import SourceName
from sacl_fast.data.images.archives import unpack
from sacl_fast.data.images.open import SOURCES, open_sources
from sacl_fast.data.images.source import ArraySource, Splits
from sacl_fast.errors import UserError
from tests.data.images.cases import error, opened, pack, paint, said, shades

pytestmark = pytest.mark.usefixtures("cache")


def test_the_table_has_what_the_setting_takes() -> None:
    assert get_type_hints(DataConfig)["source"] is SourceName
    assert set(SOURCES) == {*get_args(SourceName)}


def test_a_row_opens_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ArraySource("mine", np.zeros((9, 4, 4, 3), np.uint8), [0, 1, 2] * 3, ("a", "b", "c"))
    asked = []

    def open_mine(config: DataConfig, download: bool) -> Splits:
        asked.append((config.labels, download))
        return Splits(images, images)

    monkeypatch.setitem(SOURCES, "demo", open_mine)
    train, val = open_sources(DataConfig(source="demo", limit=5), seed=0, download=False)
    assert asked == [("auto", False)]
    assert (len(train), val) == (5, images)


def test_limit_is_a_seeded_subset_in_order(tmp_path: Path) -> None:
    paint(tmp_path / "x", *(f"{c}/{i:02}.png" for c in "ab" for i in range(20)))
    config = DataConfig(root=str(tmp_path / "x"), limit=10)
    first, again, other = (open_sources(config, seed).train for seed in (1, 1, 2))
    assert len(first) == 10 == len(first.labels)
    assert shades(first) == shades(again) == sorted(shades(first)) != shades(other)
    assert [first.name(i) for i in range(10)] == sorted(first.name(i) for i in range(10))
    assert first.classes == ("a", "b")
    assert len(opened(tmp_path / "x", limit=99).train) == 40


def test_sources_are_pickled_small(tmp_path: Path) -> None:
    source = opened(paint(tmp_path / "x", *(f"a/{i:05}.png" for i in range(250)), "b/1.png")).train
    content = pickle.dumps(source)
    assert len(content) < 250 * 40 + 2000
    copy = pickle.loads(content)
    assert copy.name(249) == source.name(249)


def test_demo() -> None:
    train, val = open_sources(DataConfig(source="demo"), seed=0)
    assert isinstance(train, ArraySource) and val is not None
    assert (len(train), len(val), len(train.classes)) == (4000, 1000, 10)
    assert train.name(3) == "demo[3]"


def test_labels_are_said(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    root = paint(tmp_path / "x", *(f"{year}/1.png" for year in range(2019, 2026)))
    opened(root)
    assert "labels: 7 classes (2019, 2020, 2021, 2022, 2023 and 2 more)" in (said(info))
    assert "names of folders" in said(info) and "data.labels none does without" in said(info)
    info.clear()
    opened(root, labels="none")
    assert "7 training images, none for validation, which needs labels" in said(info)
    assert "\nno labels" in said(info)


# --- archives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.zip"])
@pytest.mark.parametrize("wrap", ["", "wrapped"])
def test_archives_are_unpacked_once(tmp_path: Path, cache: Path, name: str, wrap: str) -> None:
    folder = paint(tmp_path / "x", "train/a/1.png", "train/b/2.png", "val/a/3.png")
    archive = pack(folder, tmp_path / name, wrap)
    first = opened(archive)
    assert shades(first.train) == [0, 1]
    assert first.val is not None and shades(first.val) == [2]
    (unpacked,) = (p for p in (cache / "unpacked").iterdir() if p.is_dir())
    before = unpacked.stat().st_mtime_ns
    assert shades(opened(archive).train) == [0, 1]
    assert unpacked.stat().st_mtime_ns == before


def test_a_changed_archive_is_unpacked_again(tmp_path: Path) -> None:
    pack(paint(tmp_path / "x", "1.png"), tmp_path / "x.zip")
    assert len(opened(tmp_path / "x.zip").train) == 1
    pack(paint(tmp_path / "x", "1.png", "2.png"), tmp_path / "x.zip")
    assert len(opened(tmp_path / "x.zip").train) == 2


def test_processes_do_not_clash(tmp_path: Path, cache: Path) -> None:
    archive = pack(paint(tmp_path / "x", *(f"{i}.png" for i in range(200))), tmp_path / "x.tar.gz")
    partial = cache / "unpacked"
    partial.mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(unpack, [(archive, cache)] * 4)
    assert len(set(folders)) == 1
    assert len(list(folders[0].glob("*.png"))) == 200
    assert not list(partial.glob(".*partial*"))


def test_archives_stay_inside(tmp_path: Path, cache: Path) -> None:
    picture = paint(tmp_path / "x", "1.png") / "1.png"
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(picture, "../../escaped.png")
    with pytest.raises(UserError, match="not safe to unpack"):
        opened(tmp_path / "x.tar")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.write(picture, "../../escaped.png")
    with pytest.raises(UserError, match="not safe to unpack"):
        opened(tmp_path / "x.zip")
    assert not list(tmp_path.glob("**/escaped.png"))


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
@pytest.mark.parametrize("keep", [0, 0.6])
def test_corrupt_archive(tmp_path: Path, cache: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tmp_path / "x").mkdir()
    Image.fromarray(noise).save(tmp_path / "x/1.png")
    archive = pack(tmp_path / "x", tmp_path / name)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content))] if keep else b"no archive at all")
    assert "no readable archive" in error(archive)
    assert not [p for p in (cache / "unpacked").iterdir() if p.is_dir()]


def test_nowhere_to_unpack(tmp_path: Path) -> None:
    archive = pack(paint(tmp_path / "x", "1.png"), tmp_path / "x.zip")
    (tmp_path / "file").touch()
    assert "data.cache_dir" in error(archive, cache_dir=str(tmp_path / "file"))


# --- roots that cannot be had ---------------------------------------------------------------------


def test_no_root() -> None:
    message = error(None)
    assert "no images given" in message and "data.root" in message and "demo" in message


def test_missing_root(tmp_path: Path) -> None:
    assert "does not exist" in error(tmp_path / "nowhere")


def test_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    message = error(tmp_path / "notes.md")
    assert "a file" in message and ".tar.gz" in message


@pytest.mark.parametrize("source", ["folder", "webdataset", "cifar10"])
@pytest.mark.parametrize("suffix", ["", ".tar", ".zip", ".txt"])
@pytest.mark.parametrize("kind", ["long", "circle", "dangling", "pipe", "home"])
def test_roots_that_cannot_be_had(tmp_path: Path, kind: str, suffix: str, source: str) -> None:
    root = tmp_path / f"x{suffix}"
    if kind == "long":
        root = tmp_path / ("x" * 300 + suffix)
    elif kind == "pipe":
        os.mkfifo(root)
    elif kind == "home":
        root = Path(f"~no-such-user-here/x{suffix}")
    else:
        root.symlink_to(root if kind == "circle" else "nowhere")
    with pytest.raises(UserError) as caught:
        open_sources(DataConfig(source=source, root=str(root)), seed=0, download=False)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
