"""Paths as users give them; files that appear whole or not at all."""

import errno
import os
import stat

import pytest

from sacl_fast.cli import main
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import kind_of, remove_leftovers, user_path, whole_file


@pytest.mark.parametrize("given", ["", "a\0b", "~no-such-user-here/x", 3, None])
def test_paths_that_are_none(given):
    with pytest.raises(UserError, match=r"^out is .*works$"):
        user_path(given, "out")


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x", "out") == tmp_path / "x"


def test_kinds(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    assert kind_of(tmp_path) == "folder"
    assert kind_of(tmp_path / "file") == "file"
    assert kind_of(tmp_path / "pipe") == "other"
    for absent in ("nothing", "dangling", "file/below"):
        assert kind_of(tmp_path / absent) is None
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot look at"):
            kind_of(path)


def test_a_whole_file_has_the_umask_s_mode_and_replaces_a_link(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_bytes(b"kept")
    path.symlink_to(victim)
    before = os.umask(0o027)
    try:
        with whole_file(path) as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert victim.read_bytes() == b"kept"
    assert not path.is_symlink() and path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "victim"]


def test_half_a_file_never_appears(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named_whatever_the_library_says(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sacl_fast.files.os.open",
        lambda path, flags, mode=0o777, open_=os.open: open_("/dev/full", os.O_WRONLY),
    )
    with pytest.raises(OSError, match="No space left"), whole_file(tmp_path / "file") as file:
        try:
            for _ in range(100):
                file.write(b"x" * 100_000)
        except OSError as error:
            raise RuntimeError("enforce fail at inline_container.cc") from error


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    writing = whole_file(tmp_path / "file")
    writing.__enter__()
    (tmp_path / ".notes.tmp").touch()
    (tmp_path / "file").touch()
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes.tmp", "file"]


def test_what_the_system_says_of_a_path_comes_with_what_works(tmp_path, capsys):
    for code in (errno.EACCES, errno.ENOSPC, errno.ENAMETOOLONG, errno.ENOENT, errno.EISDIR):
        said = reason_and_remedy(OSError(code, os.strerror(code)))
        assert said.startswith(f"{os.strerror(code)}; ") and said.endswith(" works")
    assert reason_and_remedy(ValueError("no number")) == "no number"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError) as error:
        (tmp_path / "file").mkdir(exist_ok=True)
    assert reason_of(error.value) == f"{tmp_path}/file is no folder"
    name = f"{tmp_path}/new\nline\x1b[1m\udcff"
    assert main(["index", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and r"new\nline\x1b[1m\udcff does not exist" in said
    assert main(["index", f"{tmp_path}/{'n' * 300}"]) == 2
    assert "File name too long; a shorter path works" in capsys.readouterr().err
