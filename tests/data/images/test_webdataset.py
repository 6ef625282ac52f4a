"""Shards: what is read from them by either loader, their index, and what is wrong with them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sacl_fast.cli import main
from sacl_fast.config import DataConfig
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Splits
from sacl_fast.errors import UserError


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (i, 2 * i, 255 - i)).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))


def samples(start: int, count: int, labels: bool = True) -> list[tuple[str, bytes]]:
    members = []
    for i in range(start, start + count):
        members.append((f"some folder/{i:04}.png", png(i)))
        if labels:
            members.append((f"some folder/{i:04}.cls", f"{(7 * i) % 11}\n".encode()))
        members.append((f"some folder/{i:04}.meta.json", b"{}"))
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shard(tmp_path / "shards" / "00.tar", samples(0, 7))
    write_shard(tmp_path / "shards" / "01.tar", samples(7, 5))
    return tmp_path / "shards"


def opened(root: Path, tmp_path: Path, **options) -> Splits:
    data = DataConfig(
        source="webdataset", root=str(root), cache_dir=str(tmp_path / "cache"), **options
    )
    return open_sources(data, 0)


def check(splits: Splits) -> None:
    source = splits.train
    assert len(source) == 12
    assert splits.val is None
    assert source.classes == tuple(sorted({str((7 * i) % 11) for i in range(12)}, key=int))
    for i in range(12):
        assert source.classes[source.label(i)] == str((7 * i) % 11)
        assert source.read(i) == png(i)
        assert np.array_equal(np.asarray(source.load(i))[0, 0], (i, 2 * i, 255 - i))


def test_images_and_labels_are_read(shards: Path, tmp_path: Path) -> None:
    check(opened(shards, tmp_path))
    kept = sorted((tmp_path / "cache").rglob("*.idx"))
    assert len(kept) == 2
    check(opened(shards, tmp_path))  # from there
    splits = opened(shards, tmp_path, labels="none")
    assert splits.train.classes == ()
    assert set(splits.train.labels.tolist()) == {-1}
    assert len(opened(shards / "01.tar", tmp_path).train) == 5


def test_an_index_beside_the_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["index", str(shards)]) == 0
    assert capsys.readouterr().out.split() == [str(shards / "00.idx"), str(shards / "01.idx")]
    check(opened(shards, tmp_path))
    assert not (tmp_path / "cache").exists()
    # One that is older than its shard does not count.
    write_shard(shards / "01.tar", samples(7, 6))
    stale = os.stat(shards / "01.idx").st_mtime_ns + 10**9
    os.utime(shards / "01.tar", ns=(stale, stale))
    assert len(opened(shards, tmp_path).train) == 13


def test_the_index_is_dalis(shards: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    main(["index", str(shards)])
    ours = (shards / "00.idx").read_text()
    with wds2idx.IndexCreator(str(shards / "00.tar"), str(shards / "00.idx"), False) as creator:
        creator.create_index()
    theirs = (shards / "00.idx").read_text()
    assert ours.splitlines()[0] == theirs.splitlines()[0] == "v1.2 7"
    # Ours have no blanks in names, which would break the format.
    assert ours.replace("some_folder", "some folder") == theirs


def test_unlabelled_and_splits(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "x.tar", samples(0, 4, labels=False))
    source = opened(tmp_path / "a", tmp_path).train
    assert len(source) == 4
    assert source.classes == ()
    write_shard(tmp_path / "b" / "train" / "x.tar", samples(0, 12))
    write_shard(tmp_path / "b" / "val" / "x.tar", samples(3, 2))
    splits = opened(tmp_path / "b", tmp_path)
    assert splits.val is not None
    assert splits.val.classes == splits.train.classes
    assert [splits.val.classes[label] for label in splits.val.labels] == ["10", "6"]
    write_shard(tmp_path / "b" / "val" / "x.tar", [("1.png", png(1)), ("1.cls", b"99")])
    with pytest.raises(UserError, match="class 99"):
        opened(tmp_path / "b", tmp_path)


def test_what_is_wrong_with_shards(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards in"):
        opened(tmp_path, tmp_path)
    (tmp_path / "no" / "x.tar").parent.mkdir()
    (tmp_path / "no" / "x.tar").write_bytes(b"nonsense" * 1000)
    with pytest.raises(UserError, match="no readable shard"):
        opened(tmp_path / "no", tmp_path)
    write_shard(tmp_path / "no" / "x.tar", [("1.txt", b"hello")])
    with pytest.raises(UserError, match="no images in the shards"):
        opened(tmp_path / "no", tmp_path)
    source = opened(shards, tmp_path).train
    data = (shards / "01.tar").read_bytes()
    (shards / "01.tar").write_bytes(data[:2000])
    with pytest.raises(BadImage, match="ends before"):
        source.load(11)
    with pytest.raises(UserError, match=r"01.tar is no readable shard: unexpected end of data"):
        opened(shards, tmp_path)
    assert main(["index"]) == 2
    assert main(["index", str(tmp_path / "nowhere")]) == 2


def test_names_with_dots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = []
    for i in range(4):
        members += [(f"v1.{i}.png", png(i)), (f"v1.{i}.cls", b"ab"[i % 2 : i % 2 + 1])]
    write_shard(tmp_path / "x" / "0.tar", members + samples(4, 3))
    source = opened(tmp_path / "x", tmp_path).train
    assert [source.read(i) for i in range(7)] == [png(i) for i in range(7)]
    assert [source.classes[label] for label in source.labels[:4]] == ["a", "b", "a", "b"]
    assert "ignored" not in caplog.text


def test_other_images_of_a_sample_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("1.seg.png", png(1)), ("1.png", png(2)), ("1.jpg", png(3)), ("2.png", png(4))]
    write_shard(tmp_path / "x" / "0.tar", members)
    source = opened(tmp_path / "x", tmp_path).train
    assert [source.read(i) for i in range(len(source))] == [png(2), png(4)]
    assert "ignored 2 images" in caplog.text and "1.seg.png, 1.jpg" in caplog.text


def test_labels_that_are_missing_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [*samples(0, 3), ("9.png", png(9)), ("9.cls", b" \n")]
    write_shard(tmp_path / "x" / "0.tar", members)
    assert opened(tmp_path / "x", tmp_path).train.classes == ()
    assert "no labels: 1 of 4 images" in caplog.text
    write_shard(tmp_path / "x" / "0.tar", [("9.png", png(9)), ("9.cls", b"x" * 5000)])
    with pytest.raises(UserError, match=r"9\.cls has 5000 bytes, .*data\.labels none"):
        opened(tmp_path / "x", tmp_path)
    assert len(opened(tmp_path / "x", tmp_path, labels="none").train) == 1


def test_splits_by_the_names_of_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "x" / "in1k-train-0.tar", samples(0, 12))
    write_shard(tmp_path / "x" / "in1k-val-0.tar", samples(3, 2))
    splits = opened(tmp_path / "x", tmp_path)
    assert len(splits.train) == 12
    assert splits.val is not None and len(splits.val) == 2


def test_an_image_of_more_bytes_than_may_be(shards: Path, tmp_path: Path) -> None:
    source = opened(shards, tmp_path, max_file_bytes=len(png(0)) - 1).train
    with pytest.raises(BadImage, match=r"max_file_bytes"):
        source.load(0)
