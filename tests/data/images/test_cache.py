"""Where the cache is, and whom it is trusted to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from sacl_fast.data.images.cache import cache_folder, exclusive, make_part
from sacl_fast.errors import UserError

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "home"


def test_where_it_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(None) == home / ".cache/sacl-fast"
    assert cache_folder("~/x") == home / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "y"))
    assert cache_folder(None) == tmp_path / "y/sacl-fast"


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~no-such-user-here")
    own = tmp_path / f"temporary/sacl-fast-{os.getuid()}"
    assert cache_folder(None) == own
    own.symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"is a link; data\.cache_dir names another"):
        cache_folder(None)


@pytest.mark.parametrize("part", [".", "listings", "shards", "unpacked"])
def test_a_folder_that_everybody_can_write(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    folder = home / ".cache/sacl-fast"
    (folder / part).mkdir(parents=True)
    (folder / part).chmod(0o777)
    with pytest.raises(UserError, match=r"data\.cache_dir is .*: everybody can write .*mode 777"):
        cache_folder(str(folder))
    assert cache_folder(None).parent == tmp_path / "temporary"
    assert "not using the cache folder" in caplog.text
    (folder / part).chmod(0o775)
    assert cache_folder(None) == cache_folder(str(folder)) == folder


@needs_root
def test_a_folder_of_somebody_else(home: Path, tmp_path: Path) -> None:
    folder = home / ".cache/sacl-fast"
    folder.mkdir(parents=True)
    os.chown(folder, 12345, -1)
    assert cache_folder(None).parent == tmp_path / "temporary"
    with pytest.raises(UserError, match="belongs to user 12345"):
        cache_folder(str(folder))


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = make_part(tmp_path / "a/b", "shards")
    assert make_part(tmp_path / "a/b", "shards") == folder == tmp_path / "a/b/shards"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]


def test_a_lock_follows_no_link_and_empties_no_file(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "lock").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"), exclusive(tmp_path / "lock"):
        pass
    with exclusive(tmp_path / "victim") as held:
        assert held
    assert (tmp_path / "victim").read_text() == "kept"


def test_a_lock_is_held(tmp_path: Path) -> None:
    import fcntl

    with exclusive(tmp_path / "lock") as held, (tmp_path / "lock").open() as other:
        assert held
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
