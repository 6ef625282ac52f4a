"""What is unpacked of archives, whole, damaged, foreign and malicious, and what becomes of it."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sacl_fast.data.images import archives
from sacl_fast.data.images.archives import unpack
from sacl_fast.errors import UserError

FILES = {"a/1.jpg": b"one", "a/2.jpg": b"two" * 400, "b/ü.jpg": b"", "notes.txt": b"text"}


def entry(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


def write_tar(path: Path, *entries: tuple[tarfile.TarInfo, io.BytesIO], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for info, data in entries or [entry(name, data) for name, data in FILES.items()]:
            file.addfile(info, data)
    return path


def write_zip(path: Path, files: dict[str, bytes], by: int = 3, flags: int | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.create_system = by
            file.writestr(info, data)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def unpacked(archive: Path) -> dict[str, bytes]:
    return contents(unpack(archive, archive.parent / "cache"))


def refused(archive: Path) -> str:
    left = archive.parent / "cache/unpacked"
    before = {path for path in left.glob("*") if path.is_dir()}
    with pytest.raises(UserError) as caught:
        unpack(archive, archive.parent / "cache")
    assert "\n" not in str(caught.value) and str(archive) in str(caught.value)
    assert {path for path in left.glob("*") if path.is_dir()} == before
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", "gz", "bz2", "xz"])
def test_tar_however_compressed(tmp_path: Path, suffix: str) -> None:
    assert unpacked(write_tar(tmp_path / "x.tar", mode=f"w:{suffix}")) == FILES


def test_what_is_written_has_the_umasks_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        archive = write_tar(tmp_path / "x.tar", entry("a/1.jpg", b"1", mode=0o4777))
        folder = unpack(archive, tmp_path / "cache")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((folder / name).stat().st_mode) for name in (".", "a", "a/1.jpg")]
    assert modes == [0o750, 0o750, 0o640]
    cache = (tmp_path / "cache", tmp_path / "cache/unpacked")
    assert [stat.S_IMODE(path.stat().st_mode) for path in cache] == [0o700, 0o700]


# --- what a cleaner took -------------------------------------------------------------------------


def _take_a_file(folder: Path) -> None:
    (folder / "a/2.jpg").unlink()


def _take_the_end_of_a_file(folder: Path) -> None:
    os.truncate(folder / "a/2.jpg", 7)


def _take_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "a")


def _take_the_count(folder: Path) -> None:
    (folder / ".sacl-fast-contents").unlink()


def _spoil_the_count(folder: Path) -> None:
    (folder / ".sacl-fast-contents").write_text("[]")


@pytest.mark.parametrize(
    "take",
    [
        *(_take_a_file, _take_the_end_of_a_file, _take_a_folder),
        *(_take_the_count, _spoil_the_count, shutil.rmtree),
    ],
)
def test_what_is_missing_is_unpacked_anew(tmp_path: Path, take: Callable[[Path], None]) -> None:
    archive = write_tar(tmp_path / "x.tar")
    folder = unpack(archive, tmp_path / "cache")
    take(folder)
    assert unpacked(archive) == FILES
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_a_cut_archive_is_no_smaller_archive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".zip":
        write_zip(whole, FILES)
    else:
        write_tar(whole, mode="w:gz" if suffix == ".tar.gz" else "w")
    content, cut = whole.read_bytes(), tmp_path / f"cut{suffix}"
    # A tar archive: up to the zeros that end it, the last of which may be missing.
    until = len(content.rstrip(b"\0")) if suffix == ".tar" else len(content)
    for length in range(0, until, 512 if suffix == ".tar" else 41):
        cut.write_bytes(content[:length])
        caplog.clear()
        try:
            found = unpacked(cut)
        except UserError as error:
            assert "no readable archive" in str(error)
        else:
            assert set(found.items()) < set(FILES.items())
            assert "lacks the blocks of zeros" in caplog.text


def test_an_unended_archive_is_said_to_be_so_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = write_tar(tmp_path / "x.tar")
    with tarfile.open(archive) as file:
        end = file.getmembers()[-1].offset
    os.truncate(archive, end)
    for _ in range(2):
        caplog.clear()
        assert len(unpacked(archive)) == 3
        assert "lacks the blocks of zeros that end a tar archive" in caplog.text


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_in_a_header_does_not_end_an_archive(
    tmp_path: Path, compressed: bool
) -> None:
    content = bytearray(write_tar(tmp_path / "x.tar").read_bytes())
    with tarfile.open(tmp_path / "x.tar") as file:
        content[file.getmembers()[2].offset + 3] ^= 1
    (tmp_path / "y.tar").write_bytes(gzip.compress(content) if compressed else content)
    assert "header of a member is damaged" in refused(tmp_path / "y.tar")


def test_a_flipped_bit_in_compressed_data_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        gzip.compress(write_tar(tmp_path / "y.tar").read_bytes(), compresslevel=0)
    )
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[content.index(b"two") + 1] ^= 1  # which the checksum at the very end tells
    (tmp_path / "x.tar").write_bytes(content)
    assert "no readable archive" in refused(tmp_path / "x.tar")


def test_joined_archives_are_refused(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "x.tar").read_bytes()
    (tmp_path / "y.tar").write_bytes(2 * one)
    assert "--concatenate" in refused(tmp_path / "y.tar")


def test_a_link_to_what_is_not_there(tmp_path: Path) -> None:
    hard = entry("b/2.jpg", type=tarfile.LNKTYPE, linkname="nothing.jpg")
    assert "b/2.jpg is a link to nothing.jpg" in refused(write_tar(tmp_path / "x.tar", hard))


def test_links(tmp_path: Path) -> None:
    archive = write_tar(
        tmp_path / "x.tar",
        entry("b/soft.jpg", type=tarfile.SYMTYPE, linkname="../a/1.jpg"),
        entry("a/1.jpg", b"one"),
        entry("b/hard.jpg", type=tarfile.LNKTYPE, linkname="a/1.jpg"),
        entry("b/dangling.jpg", type=tarfile.SYMTYPE, linkname="nothing"),
    )
    assert unpacked(archive) == dict.fromkeys(("a/1.jpg", "b/soft.jpg", "b/hard.jpg"), b"one")


def test_a_name_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = write_tar(tmp_path / "x.tar", entry("1.jpg", b"old"), entry("./1.jpg", b"new"))
    assert unpacked(archive) == {"1.jpg": b"new"}
    assert "1 members of the archive were replaced" in caplog.text
    archive = write_tar(tmp_path / "y.tar", entry("1.jpg", b"file"), entry("1.jpg/2.jpg", b""))
    assert "a file and a folder are called" in refused(archive)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "by"),
    [(write_zip, 0), (write_zip, 3)],
    ids=["by Windows", "by a program that does not say so"],
)
def test_backslashes_between_folders(tmp_path: Path, write: Callable, by: int) -> None:
    archive = write(tmp_path / "x.zip", {"a\\1.jpg": b"1", "b\\c\\2.jpg": b"2"}, by=by)
    assert unpacked(archive) == {"a/1.jpg": b"1", "b/c/2.jpg": b"2"}


def test_backslashes_in_tar(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", entry("a\\1.jpg", b"1"), entry("b/c\\2.jpg", b"2"))
    assert unpacked(archive) == {"a/1.jpg": b"1", "b/c\\2.jpg": b"2"}


def test_names_in_zip_that_do_not_say_that_they_are_utf8(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "x.zip", {"a/xx.jpg": b"utf-8", "a/yy.jpg": b"cp437"})
    content = archive.read_bytes().replace(b"xx", "ü".encode()).replace(b"yy", b"y\x81")
    archive.write_bytes(content)
    assert unpacked(archive) == {"a/ü.jpg": b"utf-8", "a/yü.jpg": b"cp437"}


@pytest.mark.parametrize(
    "name", ["new\nline", "\x85", "\u2028", "$(x)", "'", " ", "-rf", "😀", "*"]
)
def test_any_name(tmp_path: Path, name: str) -> None:
    for archive in (
        write_tar(tmp_path / "x.tar", entry(f"a/{name}.jpg", b"1")),
        write_zip(tmp_path / "x.zip", {f"a/{name}.jpg": b"1"}),
    ):
        assert unpacked(archive) == {f"a/{name}.jpg": b"1"}


# --- malice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "member",
    [
        entry("../x.jpg", b"1"),
        entry("a/../../x.jpg", b"1"),
        entry("a\\..\\..\\x.jpg", b"1"),
        entry("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("x.jpg", type=tarfile.SYMTYPE, linkname="../../../x"),
        entry("x.jpg", type=tarfile.LNKTYPE, linkname="../../x"),
        entry("x.jpg", type=tarfile.FIFOTYPE),
        entry("x.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    ],
    ids=lambda member: f"{member[0].type.decode()} {member[0].name} {member[0].linkname}",
)
def test_what_leads_outside_or_is_no_file(tmp_path: Path, member) -> None:
    archive = write_tar(tmp_path / "x.tar", entry("a/1.jpg", b"1"), member)
    assert "not safe to unpack" in refused(archive)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    archive = write_tar(
        tmp_path / "x.tar",
        entry("a", type=tarfile.SYMTYPE, linkname="b"),
        entry("a/1.jpg", b"1"),
    )
    assert unpacked(archive) == {"a/1.jpg": b"1"}  # a folder of that name came later


def test_zip_with_links(tmp_path: Path) -> None:
    def linking(name: str, to: str) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("a/1.jpg", b"one")
            link = zipfile.ZipInfo("a/2.jpg")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(link, to)
        return tmp_path / name

    assert unpacked(linking("x.zip", "1.jpg")) == {"a/1.jpg": b"one", "a/2.jpg": b"one"}
    for to in ("/etc/passwd", "../../../x"):
        assert "not safe to unpack" in refused(linking("y.zip", to))


@pytest.mark.parametrize("kind", ["zip", "gz", "sparse"])
def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archives, "_FREE", 1 << 20)
    zeros = bytes(8 << 20)
    if kind == "zip":
        archive = tmp_path / "x.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("1.jpg", zeros)
    elif kind == "gz":
        archive = write_tar(tmp_path / "x.tar.gz", entry("1.jpg", zeros), mode="w:gz")
    else:
        sparse = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.realsize": "8388608",
        }
        member = entry("1.jpg", b"1\n0\n1\n".ljust(512, b"\0") + b"x", pax_headers=sparse)
        archive = write_tar(tmp_path / "x.tar", member)
    message = refused(archive)
    assert "holds more than" in message and "unpack it, and give the folder" in message
    monkeypatch.setattr(archives, "_RATIO", 10_000)
    assert len(unpacked(archive)["1.jpg"]) == len(zeros)


def test_more_than_the_disk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "data.cache_dir" in refused(write_tar(tmp_path / "x.tar"))


def test_locks_and_partial_folders_follow_no_links(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar")
    folder = unpack(archive, tmp_path / "cache")
    shutil.rmtree(folder)
    victim = tmp_path / "victim"
    victim.write_text("kept")
    lock = folder.with_name(f".{folder.name}.lock")
    lock.unlink()
    lock.symlink_to(victim)
    assert "data.cache_dir" in refused(archive)
    assert victim.read_text() == "kept"
