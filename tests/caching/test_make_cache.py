"""What a cache holds is what its source gives, for sources of all kinds."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Resize

from sacl_fast.caching import make
from sacl_fast.caching.decoding import DecodingReader, shrink
from sacl_fast.caching.dimensions import DimensionReader, Images
from sacl_fast.caching.make import make_cache
from sacl_fast.data.images.fingerprint import fingerprint
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.pixel_file import PixelFile, shrunk_to
from sacl_fast.data.images.pixel_format import START
from sacl_fast.data.images.source import ArraySource, Splits
from sacl_fast.engine.resume import data_record
from sacl_fast.errors import UserError
from tests.caching.cases import (
    all_kinds,
    assert_same_images,
    cached,
    config_of,
    opened,
    pixels_of,
)
from tests.data.images.cases import paint
from tests.data.images.test_webdataset import samples, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:.*Palette images with Transparency")


def source_of(root: Path, **data) -> Splits:
    return open_sources(config_of(root=str(root), **data).data, 0)


def test_every_kind_of_image(tmp_path: Path) -> None:
    root = all_kinds(tmp_path / "x")
    train, val = opened(cached(root, tmp_path / "x.pixels"))
    assert val is None
    assert_same_images(train, source_of(root).train)
    assert isinstance(train, PixelFile)
    train.check(np.arange(len(train)))
    for i in range(len(train)):
        offset, height, width = train.placement[i].tolist()
        pixels = pixels_of(train, i)
        if isinstance(pixels, str):
            assert offset == height == width == 0
        else:
            flat = train.pixels[offset : offset + height * width * 3]
            assert offset % 64 == 0
            assert np.array_equal(flat.reshape(height, width, 3), pixels)
    assert not train.pixels.flags.writeable


def test_sizes_are_known_before_decoding(tmp_path: Path) -> None:
    train = source_of(all_kinds(tmp_path / "x")).train
    images = Images(train, None)
    for size in (0, 6):
        decoded = DecodingReader(images, size)[0, len(train)]
        dimensions = DimensionReader(images, size)[0, len(train)]
        taken = -(-decoded.sizes.prod(1) * 3 // 64) * 64
        good = decoded.sizes[:, 0] > 0
        assert int(good.sum()) == len(train) - 3
        assert dimensions.told.all()
        assert dimensions.room[good].tolist() == taken[good].tolist()
        assert sorted((dimensions.room[~good] > 0).tolist()) == [False, False, True]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = all_kinds(tmp_path / "x")
    first = cached(root, tmp_path / "0").read_bytes()
    monkeypatch.setattr(make, "_AT_ONCE", 2)
    assert cached(root, tmp_path / "1", workers=workers).read_bytes() == first


def test_runs_hold_few_images_and_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "_AT_ONCE", 3)
    monkeypatch.setattr(make, "_AT_ONCE_BYTES", 100)
    room = np.array([60, 40, 10, 500, 0, 0, 0, 0, 90, 11])
    runs = list(make._runs(7, room))
    assert runs == [(7, 9), (9, 10), (10, 11), (11, 14), (14, 16), (16, 17)]
    assert list(make._runs(7, room[:0])) == []


def test_both_splits_and_their_labels(tmp_path: Path) -> None:
    root = paint(tmp_path / "x", "train/a/1.png", "train/b/2.png", "val/b/3.png", "val/a/4.png")
    file = cached(root, tmp_path / "out" / "x.pixels")
    found, expected = opened(file), source_of(root)
    assert found.val is not None and expected.val is not None
    assert_same_images(found.train, expected.train)
    assert_same_images(found.val, expected.val)
    assert [found.val.name(i) for i in (0, 1)] == [f"{root}/val/a/4.png", f"{root}/val/b/3.png"]
    unlabelled = opened(file, labels="none")
    assert unlabelled.val is None
    assert unlabelled.train.classes == () and unlabelled.train.labels.tolist() == [-1, -1]
    assert not (tmp_path / "out" / "x.pixels.partial").exists()


def test_without_labels(tmp_path: Path) -> None:
    root = paint(tmp_path / "x", "1.png", "2.png")
    file = cached(root, tmp_path / "x.pixels")
    assert_same_images(opened(file).train, source_of(root).train)
    with pytest.raises(UserError, match=r"was made without labels; data.labels none works"):
        opened(file, labels="folder")


def test_one_image(tmp_path: Path) -> None:
    root = paint(tmp_path / "x", "1.png")
    assert_same_images(opened(cached(root, tmp_path / "y")).train, source_of(root).train)


def test_shards_lists_and_a_limit(tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "0.tar", samples(0, 5))
    root = paint(tmp_path / "x", *(f"{i}.png" for i in range(9)))
    (tmp_path / "list.txt").write_text("x/3.png\tone\nx/1.png\ttwo\nx/8.png\tone\n")
    for path, options in (
        (tmp_path / "s", dict[str, Any](source="webdataset")),
        (tmp_path / "list.txt", {}),
        (root, {"limit": 4}),
    ):
        file = cached(path, tmp_path / f"{path.name}.pixels", **options)
        assert_same_images(opened(file).train, source_of(path, **options).train)
    limited = opened(tmp_path / "list.txt.pixels", limit=2).train
    assert len(limited) == 2 and limited.decoded


def test_images_in_memory(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    train, val = (
        ArraySource(name, pixels[part], np.arange(20) % 2, ("a", "b"))
        for name, part in (("cifar10", slice(20)), ("cifar10-test", slice(20, 40)))
    )
    make_cache(Splits(train, val), tmp_path / "c", config_of(source="cifar10"), quiet=True)
    found = opened(tmp_path / "c")
    assert found.val is not None
    assert_same_images(found.train, train)
    assert_same_images(found.val, val)
    assert isinstance(found.train, PixelFile)
    assert np.array_equal(found.train.pixels.reshape(40, 32, 32, 3), pixels)
    # A cache of a cache, smaller
    config = config_of(8, source="cache")
    make_cache(found, tmp_path / "d", config, quiet=True)
    assert pixels_of(opened(tmp_path / "d").train, 3).shape == (8, 8, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shape", "size", "smaller"),
    [
        ((50, 70), 25, (25, 35)),
        ((70, 50), 33, (46, 33)),
        ((20, 70), 25, (20, 70)),
        ((1, 70), 1, (1, 70)),
        ((40, 20_000), 16, (16, 8000)),
    ],
)
def test_size_shrinks_as_torchvision_does(
    shape: tuple[int, int], size: int, smaller: tuple[int, int]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    pixels = np.asarray(shrink(image, size))
    assert pixels.shape == (*smaller, 3)
    if smaller != shape:
        resized = Resize(size, interpolation=InterpolationMode.BICUBIC)(image)
        assert np.array_equal(pixels, np.asarray(resized))


def test_the_size_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = all_kinds(tmp_path / "x")
    file = cached(root, tmp_path / "x.pixels", size=7)
    caplog.set_level(logging.INFO, "sacl_fast")
    small, large = opened(file, limit=10).train, opened(cached(root, tmp_path / "y")).train
    assert "6 of 16 were shrunk to 7 px on the shorter side" in caplog.text
    assert f"{tmp_path / 'y'}: decoded images of {root}/, in their own size" in caplog.text
    assert shrunk_to(small) == data_record(small)["shrunk_to"] == 7
    assert shrunk_to(large) == shrunk_to(source_of(root).train) == 0


def test_fingerprints_tell_contents(tmp_path: Path) -> None:
    root = paint(tmp_path / "x", *(f"{i}.png" for i in range(4)))
    first = fingerprint(opened(cached(root, tmp_path / "0")).train)
    assert first == fingerprint(opened(cached(root, tmp_path / "1")).train)
    root.rename(tmp_path / "z")
    assert first == fingerprint(opened(cached(tmp_path / "z", tmp_path / "2")).train)
    Image.new("RGB", (4, 4), (9, 0, 0)).save(tmp_path / "z" / "3.png")
    assert first != fingerprint(opened(cached(tmp_path / "z", tmp_path / "3")).train)


def test_a_source_is_pickled_by_its_path(tmp_path: Path) -> None:
    root = paint(tmp_path / "x", *(f"{c}/{i}.png" for i in range(40) for c in "ab"))
    train = opened(cached(root, tmp_path / "y")).train
    content = pickle.dumps(train)
    assert len(content) < 500
    assert_same_images(pickle.loads(content), train)
    (tmp_path / "y").unlink()
    cached(root, tmp_path / "y", labels="none")
    with pytest.raises(UserError, match="was replaced since it was opened"):
        pickle.loads(content)


def test_too_many_unreadable_images(tmp_path: Path) -> None:
    root = all_kinds(tmp_path / "x")
    said = r"unreadable, which is too many .*data.max_bad_share is.* kept in .*/y.partial: with a"
    with pytest.raises(UserError, match=said):
        cached(root, tmp_path / "y", max_bad_share=0.1)
    assert not (tmp_path / "y").exists() and (tmp_path / "y.partial").exists()
    kept = cached(root, tmp_path / "y").read_bytes()  # what was done is gone on from
    assert kept == cached(root, tmp_path / "z").read_bytes()


def test_of_unreadable_images_alone_nothing_is_kept(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="2 of 2 images are unreadable") as error:
        cached(tmp_path / "x", tmp_path / "y", max_bad_share=1.0)
    assert "partial" not in str(error.value) and not (tmp_path / "y.partial").exists()


def test_what_is_kept_is_named_whatever_ended_it(tmp_path: Path) -> None:
    config, pixels = config_of(root=str(all_kinds(tmp_path / "x"))), tmp_path / "y.partial/pixels"

    def check() -> None:
        if pixels.exists() and pixels.stat().st_size > START:
            raise UserError("a worker was killed")

    with pytest.raises(UserError, match=r"killed; what is done is kept in .*/y.partial"):
        make_cache(open_sources(config.data, 0), tmp_path / "y", config, check=check, quiet=True)


def test_real_photographs(data_folder: Path, tmp_path: Path) -> None:
    archive = data_folder / "imagenet-sample.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    options = {"limit": 40, "cache_dir": str(tmp_path / "cache")}
    for size in (0, 256):
        file = cached(archive, tmp_path / f"{size}", size, workers=2, **options)
        found, expected = opened(file).train, source_of(archive, **options).train
        for i in range(len(expected)):
            image = shrink(expected.load(i), size)
            assert np.array_equal(pixels_of(found, i), np.asarray(image))
