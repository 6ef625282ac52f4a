"""Indices of shards: made, checked, not believed; and shards that are not whole."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sacl_fast.cli import main
from sacl_fast.config import DataConfig
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.shard_index import find_shards, index_shards, shard_index
from sacl_fast.data.images.source import Source
from sacl_fast.errors import UserError
from tests.data.images.test_webdataset import png, samples, write_shard

COUNT = 7


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "shards/0.tar", samples(0, COUNT))
    return tmp_path / "shards/0.tar"


def opened(root: Path, **options) -> Source:
    cache = root.parent.parent if root.suffix else root.parent
    data = DataConfig(
        source="webdataset", root=str(root), cache_dir=str(cache / "cache"), **options
    )
    return open_sources(data, 0).train


def images(root: Path, **options) -> list[bytes]:
    source = opened(root, **options)
    return [source.read(i) for i in range(len(source))]  # type: ignore[misc]


def index_of(shard: Path) -> Path:
    (path,) = index_shards(shard)
    os.utime(path)  # not older than the shard
    return path


def _replaced(old: str, new: str) -> Callable[[str], str]:
    def replace(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return replace


def _without_a_line(number: int) -> Callable[[str], str]:
    def remove(text: str) -> str:
        lines = text.split("\n")
        del lines[number]
        return "\n".join([f"v1.2 {COUNT - 1}", *lines[1:]])

    return remove


@pytest.mark.parametrize(
    "change",
    [
        *(_without_a_line(1), _without_a_line(4), _without_a_line(COUNT)),
        *(_replaced("v1.2", "v9"), _replaced("v1.2 7", "v1.2 6"), _replaced("v1.2 7\n", "")),
        *(_replaced("png 512 ", "png 1024 "), _replaced("png 512 ", "png 513 ")),
        *(_replaced("png 512 ", "png -512 "), _replaced("png 512 ", "png 5_12x ")),
        *(
            _replaced("0.png", "0.pmg"),
            _replaced("\npng", "\npmg"),
            _replaced("_folder", " folder"),
        ),
        *(lambda text: text.replace("png 512 ", "png 512 9999999999"), lambda text: ""),
        *(lambda text: text.replace("png 512 ", f"png {10**30} "), lambda text: "\0" * 99),
    ],
)
def test_an_index_that_is_wrong_is_not_used(
    shard: Path, caplog: pytest.LogCaptureFixture, change: Callable[[str], str]
) -> None:
    index = index_of(shard)
    assert images(shard) == [png(i) for i in range(COUNT)]
    assert not caplog.text
    index.write_text(change(index.read_text()))
    for _ in range(2):
        caplog.clear()
        assert images(shard) == [png(i) for i in range(COUNT)]
        assert f"not using the index {index}" in caplog.text


def test_an_index_of_another_shard(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = index_of(shard).read_bytes()
    write_shard(shard, samples(0, COUNT + 2))
    shard.with_suffix(".idx").write_bytes(index)
    assert len(images(shard)) == COUNT + 2
    assert "ends before the shard does" in caplog.text


def test_an_index_with_a_wrong_size(shard: Path) -> None:
    index = index_of(shard)
    text, size = index.read_text(), len(png(1))
    assert f"png 3584 {size} " in text
    index.write_text(text.replace(f"png 3584 {size} ", f"png 3584 {size // 2} "))
    source = opened(shard)
    with pytest.raises(BadImage):  # within the same block: found when it is decoded
        source.load(1)
    index.write_text(text.replace("cls 1536 2 ", "cls 1536 9 "))
    with pytest.raises(UserError, match=r"has 2 bytes, and the index says 9; .*makes its index an"):
        opened(shard)


def test_a_damaged_index_in_the_cache(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    images(shard)
    (kept,) = (shard.parent.parent / "cache/shards").iterdir()
    content = kept.read_bytes()
    for damaged in (b"", content[:-1], content[: len(content) // 2], content.replace(b"5", b"6")):
        kept.write_bytes(damaged)
        caplog.clear()
        assert images(shard) == [png(i) for i in range(COUNT)]
        assert "ignoring the unreadable index" in caplog.text
        assert kept.read_bytes() == content


def test_a_pipe_as_index(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(shard.with_suffix(".idx"))
    assert len(images(shard)) == COUNT
    assert "a pipe" in caplog.text


def test_an_index_is_written_through_no_link(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    shard.with_suffix(".idx").symlink_to(tmp_path / "victim")
    assert (tmp_path / "victim").read_text() == "kept" and index_of(shard).read_text() != "kept"


@pytest.mark.parametrize("name", ["new\nline", "\x85", "\u2028", "\r", "\x0b", " ", "a.b", "$(x)"])
def test_names_of_members(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    shard = tmp_path / "shards/0.tar"
    write_shard(shard, [(f"{name}{i}.png", png(i)) for i in range(3)])
    for _ in range(2):  # from the cache then
        assert images(shard) == [png(i) for i in range(3)]
    index_of(shard)
    assert images(shard) == [png(i) for i in range(3)]
    assert not caplog.text


# --- shards that are not whole -------------------------------------------------------------------


def test_a_cut_shard_is_no_smaller_shard(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = shard.read_bytes()
    cut, least = shard.parent / "1.tar", len(content.rstrip(b"\0"))
    for length in range(0, least, 256):
        cut.write_bytes(content[:length])
        caplog.clear()
        for _ in range(2):
            try:
                assert len(images(cut, labels="none")) < COUNT + 1
            except UserError as error:
                assert "no readable shard" in str(error) or "no images in" in str(error)
            else:
                assert "lacks the blocks of zeros" in caplog.text
    with pytest.raises(UserError, match="no readable shard"):
        cut.write_bytes(content[: least - 600])
        list(index_shards(cut))


def test_an_unended_shard_is_said_to_be_so(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(shard) as file:
        end = file.getmembers()[9].offset
    os.truncate(shard, end)
    for index in (False, False, True):
        caplog.clear()
        if index:
            index_of(shard)
            assert "lacks the blocks of zeros" in caplog.text
            caplog.clear()
        assert images(shard) == [png(i) for i in range(3)]
        assert "lacks the blocks of zeros" in caplog.text


def test_a_damaged_header_does_not_end_a_shard(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as file:
        content[file.getmembers()[6].offset + 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="the header of a member is damaged"):
        opened(shard)


def test_members_that_are_links_are_counted(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(shard, "a") as file:
        link = tarfile.TarInfo("some folder/9.png")
        link.type, link.linkname = tarfile.LNKTYPE, "some folder/0000.png"
        file.addfile(link)
    assert len(images(shard)) == COUNT
    assert "skipped 1 members that are links" in caplog.text


# --- which files are shards ----------------------------------------------------------------------


def test_what_is_found(shard: Path) -> None:
    for name in ("1.TAR", "2.tar.gz", "._0.tar", "readme.txt"):
        (shard.parent / name).touch()
    assert [path.name for path in find_shards(shard.parent)] == ["0.tar", "1.TAR"]


@pytest.mark.parametrize("kind", ["nothing", "circle", "folder", "pipe", "empty", "compressed"])
def test_what_is_no_shard(
    shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    other = shard.parent / "1.tar"
    if kind == "compressed":
        with tarfile.open(other, "w:gz") as file:
            file.addfile(tarfile.TarInfo("1.png"), io.BytesIO())
    else:
        {
            "nothing": lambda: other.symlink_to("nowhere"),
            "circle": lambda: other.symlink_to("1.tar"),
            "folder": other.mkdir,
            "pipe": lambda: os.mkfifo(other),
            "empty": other.touch,
        }[kind]()
    with pytest.raises(UserError, match=r"1\.tar"):
        opened(shard.parent)
    assert main(["index", str(shard.parent)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for given in ("", "x" * 300, "~no-such-user-here", str(tmp_path / "circle"), "a\0b"):
        assert main(["index", given]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_unusable_cache_is_only_warned_of(
    shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert len(shard_index(shard, tmp_path / "file")) == COUNT
    assert "cannot keep the index" in caplog.text
