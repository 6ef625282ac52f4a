"""A cache whose making is ended: what is left, and what the same command makes of it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from sacl_fast import cli
from sacl_fast.caching import make, partial
from sacl_fast.caching.partial import Partial
from sacl_fast.data.images.source import ArraySource, Splits
from sacl_fast.errors import UserError
from tests.caching.cases import all_kinds, cached, config_of, in_a_process
from tests.data.images.cases import paint

pytestmark = pytest.mark.filterwarnings("ignore:.*Palette images with Transparency")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of which few are decoded at a time, each of them kept at once."""
    monkeypatch.setattr(make, "_AT_ONCE", 3)
    monkeypatch.setattr(partial, "_SETTLE", 1)
    return all_kinds(tmp_path / "x")


def killed_at(write: int, root: Path, out: Path, workers: int = 0) -> None:
    """Make a cache up to the ``write``-th time that something is written, of which half is."""
    whole, count = partial._write, 0

    def half(descriptor: int, data: object) -> None:
        nonlocal count
        count += 1
        if count > write:
            left = memoryview(data).cast("B")  # type: ignore[arg-type]
            os.write(descriptor, left[: len(left) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(descriptor, data)

    partial._write = half
    cached(root, out, workers=workers)


def test_killed_at_any_write_and_again_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    whole = cached(root, tmp_path / "whole").read_bytes()
    out, kept = tmp_path / "out", []
    for write in range(100):
        workers = 2 if write == 4 else 0
        code = in_a_process(lambda w=write, n=workers: killed_at(w, root, out, n))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not out.exists()
        kept.append(len((tmp_path / "out.partial" / "journal").read_bytes().splitlines()))
        # At the same place again, then to the end.
        assert in_a_process(lambda: killed_at(0, root, out)) in (0, -signal.SIGKILL)
        if not out.exists():
            cached(root, out)
        assert out.read_bytes() == whole, write
        assert not (tmp_path / "out.partial").exists()
        out.unlink()
    # The plan, six runs of pixels and of lines, the index
    assert len(kept) == 14 and max(kept) == 7


def test_killed_once_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(shutil, "rmtree", kill)
    assert in_a_process(lambda: cached(root, tmp_path / "out")) == -signal.SIGKILL
    monkeypatch.undo()
    assert (tmp_path / "out").exists() and (tmp_path / "out.partial" / "journal").exists()
    with pytest.raises(UserError, match="out exists already"):
        cached(root, tmp_path / "out")


@pytest.mark.parametrize("damage", ["a bit", "no pixels", "fewer pixels", "a foreign line"])
def test_what_is_left_is_damaged(damage: str, root: Path, tmp_path: Path) -> None:
    whole = cached(root, tmp_path / "whole").read_bytes()
    out, folder = tmp_path / "out", tmp_path / "out.partial"
    assert in_a_process(lambda: killed_at(9, root, out)) == -signal.SIGKILL
    journal = folder / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    if damage == "a bit":
        lines[2] = lines[2].replace(b'"first"', b'"First"')
    elif damage == "a foreign line":
        lines[1] = partial._line({"first": 7, "sizes": [], "checksums": [], "shrunk": 0, "bad": []})
    elif damage == "no pixels":
        (folder / "pixels").unlink()
    else:
        os.truncate(folder / "pixels", (folder / "pixels").stat().st_size - 2500)
    journal.write_bytes(b"".join(lines))
    assert cached(root, out).read_bytes() == whole


def test_another_plan_is_not_gone_on_from(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert in_a_process(lambda: killed_at(9, root, out)) == -signal.SIGKILL
    with pytest.raises(UserError, match=r"out.partial was begun with other size; the same as then"):
        cached(root, out, size=5)
    with pytest.raises(UserError, match="was begun with other images"):
        cached(root, out, labels="none")
    with pytest.raises(UserError, match="was begun with other images"):
        cached(paint(tmp_path / "z", "1.png"), out)
    assert cached(root, out).read_bytes() == cached(root, tmp_path / "whole").read_bytes()


def test_two_at_once(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / "journal", "w") as journal:
        fcntl.lockf(journal, fcntl.LOCK_EX)

        def other() -> None:
            with pytest.raises(UserError, match=r"another process is making .*/out; wait for it"):
                cached(root, out)

        assert in_a_process(other) == 0
    assert journal.closed and (tmp_path / "out.partial" / "journal").exists()
    cached(root, out)


def test_a_file_that_is_there_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out exists already; another name works"):
        cached(root, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists already"):
        cached(root, tmp_path / "link")
    assert (tmp_path / "out").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out", "x"]


def test_a_full_disk(root: Path, tmp_path: Path) -> None:
    whole = cached(root, tmp_path / "whole").read_bytes()
    out, folder = tmp_path / "out", tmp_path / "out.partial"

    def with_limit(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(
            UserError, match=r"cannot write .*/out: File too large \(.*\); (.*)"
        ) as caught:
            cached(root, out)
        done = "is kept" in str(caught.value)
        assert folder.exists() == done, caught.value
        os._exit(10 + done)

    codes = set()
    for limit in (60, 2000, 4096, 4100, 9000, len(whole) - 3000, len(whole) - 1):
        codes.add(in_a_process(lambda limit=limit: with_limit(limit)))
        assert not out.exists()
    assert codes == {10, 11}
    assert cached(root, out).read_bytes() == whole


def test_a_disk_that_is_too_small(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**13, 2**13))
    with pytest.raises(
        UserError, match=r"out needs 0\.0 MiB, and 0.0 MiB are free in .*; a smaller --size takes"
    ):
        cached(root, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(number: int, root: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = ["cache", str(root), str(out), "--data.max-bad-share", "0.5", "--data.workers", "1"]

    def signalled() -> None:
        whole = Partial.append

        def append(self: Partial, decoded) -> None:
            whole(self, decoded)
            if self.done >= 6:
                os.kill(os.getpid(), number)

        Partial.append = append
        logging.getLogger().handlers.clear()
        with open(log, "w", buffering=1) as sys.stderr:
            os._exit(cli.main(command))

    assert in_a_process(signalled) == 128 + number
    said = [line for line in log.read_text().splitlines() if "stopping" in line]
    name = signal.Signals(number).name
    assert said == [f"{name}: stopping; the same command goes on from what is done"]
    assert "Traceback" not in log.read_text()
    first = json.loads((tmp_path / "out.partial" / "journal").read_bytes().splitlines()[2][9:])
    assert first["first"] == 3 and not out.exists()
    assert in_a_process(lambda: os._exit(cli.main(command))) == 0
    assert out.read_bytes() == cached(root, tmp_path / "whole").read_bytes()


def test_large_images_are_written_in_order(tmp_path: Path) -> None:
    """Many more runs than are prepared ahead, by several workers."""
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 3, 5, 3), np.uint8)
    splits = Splits(ArraySource("x", pixels, [0, 1] * 500, ("a", "b")), None)
    files = [tmp_path / "0", tmp_path / "1"]
    for workers, file in zip((0, 3), files, strict=True):
        make.make_cache(splits, file, config_of(workers=workers), quiet=True)
    assert files[0].read_bytes() == files[1].read_bytes()
