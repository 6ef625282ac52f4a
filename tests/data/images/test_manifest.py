"""The listing of a folder, and when the kept one is used."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sacl_fast.data.images.manifest import Manifest, list_images
from sacl_fast.errors import UserError

FILES = ("a/1.jpg", "a/deep/er/2.PNG", "a-b/3.jpeg", "b/ü.webp", "top.gif")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    ignored = ("a/notes.txt", ".hidden.jpg", ".git/4.jpg", "b/.5.png")
    for name in (*FILES, *ignored):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "empty").mkdir()
    settle(root)
    return root


def settle(root: Path) -> None:
    """Make the folders look untouched for a while: a listing of fresh ones is not kept."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))


def listing(root: Path, cache: Path) -> Manifest:
    return list_images(root, cache, cache_from=1)


def was_read(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the disk was listed since the last call."""
    read = any("listed" in record.message for record in caplog.records)
    caplog.clear()
    return read


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sacl_fast.data")


def test_finds_images_folder_by_folder(tree: Path) -> None:
    manifest = list_images(tree)
    assert list(manifest.paths()) == ["top.gif", *FILES[:2], "a-b/3.jpeg", "b/ü.webp"]
    assert len(manifest) == 5
    assert manifest.folders == ("", "a", "a/deep", "a/deep/er", "a-b", "b", "empty")


def test_survives_pickling_without_growing(tree: Path) -> None:
    manifest = list_images(tree)
    copy = pickle.loads(pickle.dumps(manifest))
    assert list(copy.paths()) == list(manifest.paths())


def test_follows_links_but_not_in_circles(tree: Path) -> None:
    (tree / "a" / "again").symlink_to(tree)
    (tree / "c").symlink_to(tree / "b")
    (tree / "b" / "broken.jpg").symlink_to("nowhere")
    paths = list(list_images(tree).paths())
    assert "c/ü.webp" in paths
    assert "b/broken.jpg" in paths  # reported when it is read, not passed over in silence
    assert not any("again" in path for path in paths)


def test_keeps_the_listing(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = listing(tree, tmp_path / "cache")
    assert was_read(caplog)
    second = listing(tree, tmp_path / "cache")
    assert not was_read(caplog)
    assert list(second.paths()) == list(first.paths())
    assert second.folders == first.folders


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new folder", "folder gone"])
def test_a_changed_tree_is_listed_again(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    listing(tree, tmp_path / "cache")
    was_read(caplog)
    if change == "add":
        (tree / "a/deep/new.jpg").touch()
    elif change == "remove":
        (tree / "a/1.jpg").unlink()
    elif change == "rename":
        (tree / "a/1.jpg").rename(tree / "a/9.jpg")
    elif change == "new folder":
        (tree / "b/new").mkdir()
        (tree / "b/new/1.jpg").touch()
    else:
        (tree / "empty").rmdir()
    found = listing(tree, tmp_path / "cache")
    assert was_read(caplog)
    assert list(found.paths()) == list(list_images(tree).paths())


def test_a_folder_in_motion_is_not_kept(tree: Path, tmp_path: Path) -> None:
    (tree / "a/new.jpg").touch()  # now: the next change may bear the same time
    listing(tree, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_small_folders_are_not_worth_keeping(tree: Path, tmp_path: Path) -> None:
    list_images(tree, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 garbage", b"\x93NUMPY", None])
def test_a_broken_cache_is_ignored(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    listing(tree, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-40] if content is None else content)
    caplog.clear()
    assert len(listing(tree, tmp_path / "cache")) == 5
    assert "ignoring the unreadable listing" in caplog.text
    caplog.clear()
    listing(tree, tmp_path / "cache")  # and was replaced
    assert not was_read(caplog)


def test_an_unusable_cache_folder_is_only_warned_of(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert len(listing(tree, tmp_path / "cache")) == 5
    assert "cannot keep the listing" in caplog.text


def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the folder .*nowhere: No such file"):
        list_images(tmp_path / "nowhere")


# --- what a kept listing may say -----------------------------------------------------------------


def _changed(**changes) -> Callable[[dict], dict]:
    return lambda data: {**data, **{key: change(data[key]) for key, change in changes.items()}}


def _text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        _changed(counts=lambda counts: np.array([9, -4, *counts[2:] * 0])),
        _changed(counts=lambda counts: counts.astype(float)),
        _changed(counts=lambda counts: counts[:-1]),
        _changed(counts=lambda counts: counts[None]),
        _changed(names=lambda names: _text("/etc/x.jpg\0" * 5)),
        _changed(names=lambda names: _text("../x.jpg\0" * 5)),
        _changed(names=lambda names: _text("..\0" * 5)),
        _changed(names=lambda names: _text("\0" * 5)),
        _changed(names=lambda names: names[:-1]),
        _changed(names=lambda names: names[:-10]),
        _changed(names=lambda names: names.astype(np.int64)),
        _changed(folders=lambda folders: _text("\0a\0a/..\0a/../b\0a-b\0b\0c\0")),
        _changed(folders=lambda folders: _text("\0a\0/etc\0a/b\0a-b\0b\0c\0")),
        _changed(folders=lambda folders: _text("\0a\0a\0a/b\0a-b\0b\0c\0")),
        _changed(folders=lambda folders: _text("x\0a\0y\0a/b\0a-b\0b\0c\0")),
        _changed(times_ns=lambda times: times[:, 0]),
        _changed(times_ns=lambda times: times.astype(float)),
        _changed(skipped_counts=lambda counts: counts[:0]),
        lambda data: {key: value for key, value in data.items() if key != "names"},
        lambda data: {**data, "names": np.array([object()])},
    ],
)
def test_a_listing_that_is_none_is_made_anew(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict], dict]
) -> None:
    first = listing(tree, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    with np.load(kept) as data:
        changed = change(dict(data))
    np.savez(kept, **changed)
    caplog.clear()
    assert list(listing(tree, tmp_path / "cache").paths()) == list(first.paths())
    assert "ignoring the unreadable listing" in caplog.text
    caplog.clear()
    listing(tree, tmp_path / "cache")
    assert not was_read(caplog)


def test_a_time_that_was_set_back_deceives_nobody(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listing(tree, tmp_path / "cache")
    (tree / "a/1.jpg").unlink()
    settle(tree)
    assert len(listing(tree, tmp_path / "cache")) == 4


def test_what_is_skipped_is_counted_each_time(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.HEIC", "b/2.heic", "b/3.avif", "README", "a/x.csv"):
        (tree / name).touch()
    (tree / "b/lost").symlink_to("nowhere")
    settle(tree)
    for _ in range(2):
        caplog.clear()
        manifest = listing(tree, tmp_path / "cache")
        assert dict(manifest.skipped) == {
            **{".heic": 2, ".avif": 1, ".csv": 1, ".txt": 1},
            **{"": 1, "link to nothing": 1},
        }
        (said,) = [r for r in caplog.records if r.getMessage().startswith("skipped")]
        assert said.levelno == logging.WARNING
        assert "skipped 7 files" in said.getMessage() and "2 .heic" in said.getMessage()


def test_what_is_no_file_is_left_to_who_reads_it(tree: Path) -> None:
    os.mkfifo(tree / "a/pipe.jpg")
    (tree / "a/circle.jpg").symlink_to("circle.jpg")
    (tree / "a/circle").symlink_to("circle")
    paths = list(list_images(tree).paths())
    assert "a/pipe.jpg" in paths and "a/circle.jpg" in paths


def test_a_listing_is_written_through_no_link(tree: Path, tmp_path: Path) -> None:
    listing(tree, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    (tmp_path / "victim").write_text("kept")
    kept.unlink()
    kept.symlink_to(tmp_path / "victim")
    listing(tree, tmp_path / "cache")
    assert (tmp_path / "victim").read_text() == "kept" and not kept.is_symlink()
