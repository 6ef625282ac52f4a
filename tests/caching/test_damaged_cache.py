"""Files that are no cache, are not whole, or were altered: a sentence, never other images."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from sacl_fast.config import DataConfig
from sacl_fast.data.images import pixel_format
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.fingerprint import fingerprint
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.pixel_file import PixelFile
from sacl_fast.data.images.source import Source
from sacl_fast.errors import UserError
from tests.caching.cases import all_kinds, cached, opened, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore:.*Palette images with Transparency")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    return cached(all_kinds(folder / "x"), folder / "y").read_bytes()


def told(source: Source) -> list[tuple]:
    """All that is said of the images but their pixels."""
    return [(source.name(i), source.label(i), source.identity(i)) for i in range(len(source))]


@pytest.fixture(scope="module")
def expected(whole: bytes, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("expected") / "y"
    file.write_bytes(whole)
    train = opened(file).train
    return told(train), [pixels_of(train, i) for i in range(len(train))]


def is_seen(file: Path, expected: tuple[list, list]) -> bool:
    """Whether damage is told, at opening or by an image's reading; all else is as expected."""
    logging.disable(logging.INFO)
    try:
        train = opened(file).train
    except UserError as error:
        assert str(file) in str(error)
        return True
    finally:
        logging.disable(logging.NOTSET)
    damaged = 0
    assert told(train) == expected[0]
    for i, pixels in enumerate(expected[1]):
        found = pixels_of(train, i)
        if isinstance(found, str) and not isinstance(pixels, str):
            assert f"block {i} of {file} is damaged: its bytes" in found
            damaged += 1
        else:
            assert np.array_equal(found, pixels)
    assert damaged <= 1
    return damaged > 0


def test_any_bit_and_any_cut(whole: bytes, expected: tuple, tmp_path: Path) -> None:
    rng, file = np.random.default_rng(0), tmp_path / "y"
    start, end = pixel_format.START, len(whole)
    index = int.from_bytes(whole[16:24], "little")
    places = [*range(0, 64, 3), *rng.integers(64, start, 10), *rng.integers(start, end, 250)]
    unseen = []
    for place in map(int, places):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        if not is_seen(file, expected):
            unseen.append(place)
    # Between two images, nothing reads
    assert all(start <= place < index for place in unseen)
    assert len(unseen) < 100
    for length in [0, 1, 63, 64, start, index, end - 1, *rng.integers(0, end, 60)]:
        file.write_bytes(whole[:length])
        assert is_seen(file, expected)
    for more in (b"\0", b"more" * 5000):
        file.write_bytes(whole + more)
        assert is_seen(file, expected)


def test_bytes_exchanged_and_overwritten(whole: bytes, expected: tuple, tmp_path: Path) -> None:
    rng, file = np.random.default_rng(1), tmp_path / "y"
    for _ in range(60):
        first, second = sorted(map(int, rng.integers(0, len(whole), 2)))
        other = bytearray(whole)
        other[first : first + 8] = rng.bytes(8)
        if rng.random() < 0.5:  # a part is missing in the middle, and zeros make up for it
            other = bytearray(whole[:first] + whole[second:]).ljust(len(whole), b"\0")
        file.write_bytes(other)
        try:
            train = opened(file).train
        except UserError:
            continue
        assert told(train) == expected[0]
        for i, pixels in enumerate(expected[1]):
            found = pixels_of(train, i)
            assert np.array_equal(found, pixels) or "is damaged" in str(found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; sacl-fast cache makes such a file"),
        (b"\xff\xd8 a photograph" * 100, "is no cache of decoded images; sacl-fast cache makes"),
        (b"PK\3\4", "is no cache of decoded images"),
    ],
)
def test_another_kind_of_file(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(content)
    with pytest.raises(UserError, match=says):
        opened(tmp_path / "y")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"y does not exist \(from.*data.root names the cache"):
        opened(tmp_path / "y")
    with pytest.raises(UserError, match=r"is a folder, and data.source cache takes a file, whi"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"null is a pipe, a socket or a device, and data.source c"):
        opened(Path("/dev/null"))
    with pytest.raises(UserError, match=r"no images given: data.root takes the file of a cach"):
        open_sources(DataConfig(source="cache"), 0)


def test_a_cache_given_as_another_source(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(whole)
    with pytest.raises(UserError, match=r"y, a cache; data.source cache reads it"):
        opened(tmp_path / "y", source="folder")


def test_a_newer_version(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(whole[:8] + b"\2" + whole[9:])
    with pytest.raises(UserError, match=r"has version 2 of the format, and sacl-fast .* reads"):
        opened(tmp_path / "y")


def sealed(whole: bytes, **changed: np.ndarray) -> bytes:
    """The file with another index, properly sealed."""
    start = int.from_bytes(whole[16:24], "little")
    index = pixel_format.Index.from_npz(whole[start:])
    for name, array in changed.items():
        object.__setattr__(index, name, array)
    data = index.to_npz()
    header = pixel_format.pack_header(start, data)
    return header + whole[len(header) : start] + data


def test_an_index_that_contradicts_itself(whole: bytes, tmp_path: Path) -> None:
    index = pixel_format.Index.from_npz(whole[int.from_bytes(whole[16:24], "little") :])
    tall, half = index.sizes.copy(), index.sizes.copy()
    tall[0, 0] *= 1000
    half[0, 0] = 0
    wrong = {
        "sizes": (tall, half, index.sizes[:-1], index.sizes.astype(np.int64)),
        "labels": (index.labels + 1, index.labels - 1, index.labels[1:]),
        "checksums": (index.checksums[1:],),
        "names": (index.names[:-1], index.names[1:-2]),
        "bad": (index.bad + 1, index.bad[:1]),
        "reasons": (index.reasons[:-1],),
        "about": (index.about[1:], np.frombuffer(b'{"classes": []}', np.uint8)),
    }
    for name, arrays in wrong.items():
        for array in arrays:
            (tmp_path / "y").write_bytes(sealed(whole, **{name: array}))
            with pytest.raises(UserError, match=r"y is no cache that works: .*; sacl-fast cache"):
                opened(tmp_path / "y")
    (tmp_path / "y").write_bytes(sealed(whole))
    opened(tmp_path / "y")


def test_damage_is_told_once_asked_for(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(whole)
    first = opened(tmp_path / "y").train
    assert isinstance(first, PixelFile)
    print_before = fingerprint(first)
    offset = int(first.placement[3, 0])
    other = bytearray(whole)
    other[pixel_format.START + offset + 5] ^= 4
    (tmp_path / "y").write_bytes(other)
    train = PixelFile(tmp_path / "y")
    assert fingerprint(train) == print_before
    good = np.delete(np.arange(len(train)), 3)
    train.check(good)
    failed = []

    def check() -> None:
        try:
            train.check(np.arange(len(train)))
        except BadImage as error:
            failed.append(str(error))

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 8 and all("block 3 of " in said for said in failed)
    train.check(good)
