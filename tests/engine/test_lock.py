"""The run folder's lock: who has it, who had it, and how one is told from the other."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from sacl_fast.engine import lock as module
from sacl_fast.engine.lock import LOCK, RunLock
from sacl_fast.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from sacl_fast.engine.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    monkeypatch.setattr(module, "_SETTLE", 0.1)


def left_by(folder, **changes):
    """A lock file that a process left which is no more, or which this machine does not know."""
    owner = asdict(replace(module._this_process(), **changes))
    (folder / LOCK).write_text(json.dumps(owner))


def test_held_and_released(tmp_path):
    lock = RunLock(tmp_path)
    said = json.loads((tmp_path / LOCK).read_text())
    assert said["pid"] == os.getpid() and said["host"]
    with pytest.raises(UserError, match=r"is in use by this process already; .* --out"):
        RunLock(tmp_path)
    lock.check()
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    RunLock(tmp_path).release()


def test_another_process_is_named(tmp_path, holder):
    said = rf"is in use by process {holder.pid} on \S+, which started at 20"
    for _ in range(3):  # looking does not take the lock away
        with pytest.raises(UserError, match=said):
            RunLock(tmp_path)
    holder.communicate("\n")
    assert holder.returncode == 0
    RunLock(tmp_path).release()


def test_a_killed_process_is_followed(tmp_path, holder, caplog):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    for state in ("a zombie", "reaped"):
        lock = RunLock(tmp_path)
        assert f"was left by process {holder.pid}" in caplog.text, state
        lock.release()
        holder.wait()


def test_a_stopped_process_still_holds_it(tmp_path, holder, soon):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        RunLock(tmp_path)


def test_children_do_not_hold_it(tmp_path):
    """As a worker that outlives its parent would."""
    lock = RunLock(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        RunLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"{}", b"[1]", b'{"pid": 1}', b"\0" * 99, b"\xff", b"[" * 4000]
)
def test_content_that_is_none(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_number_that_another_process_has_now(tmp_path):
    left_by(tmp_path, start=1)
    RunLock(tmp_path).release()


def test_another_machine_s_process_that_is_silent(tmp_path, soon, caplog):
    left_by(tmp_path, machine="other", host="node7", pid=77)
    RunLock(tmp_path).release()
    assert "whether it still runs" in caplog.text
    assert "was left by process 77 on node7" in caplog.text


def test_another_machine_s_process_that_runs(tmp_path, soon, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 100.0)
    left_by(tmp_path, machine="other", host="node7", pid=77)
    end = threading.Event()

    def beat():
        while not end.wait(0.02):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 77 on node7"):
            RunLock(tmp_path)
    finally:
        end.set()
        thread.join()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 77


def test_another_machine_s_process_that_ends_meanwhile(tmp_path, soon):
    left_by(tmp_path, machine="other")
    timer = threading.Timer(0.1, (tmp_path / LOCK).unlink)
    timer.start()
    RunLock(tmp_path).release()
    timer.join()


def test_the_holder_shows_that_it_runs(tmp_path, soon):
    lock = RunLock(tmp_path)
    before, end = lock.path.stat().st_mtime_ns, time.monotonic() + 20
    while lock.path.stat().st_mtime_ns == before:
        assert time.monotonic() < end
        time.sleep(0.02)
    lock.release()


@pytest.fixture
def no_locks(monkeypatch, soon):
    """A file system that knows none."""

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_without_locks_on_the_file_system(tmp_path, no_locks, holder):
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path)
    with pytest.raises(UserError, match="in use by this process already"):
        RunLock(tmp_path)
    lock.release()


def test_without_locks_the_last_to_write_has_it(tmp_path, no_locks, monkeypatch):
    """Another one writes while this one waits for such."""
    monkeypatch.setattr(module.time, "sleep", lambda _: left_by(tmp_path, pid=77, start=1))
    with pytest.raises(UserError, match="in use by process 77"):
        RunLock(tmp_path)


def test_one_of_many_that_start_at_once_gets_it(tmp_path):
    code = HOLD.replace("lock =", "print('ready', flush=True); sys.stdin.readline(); lock =")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], text=True, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    first = [process.stdout.readline() for process in processes if process.stdout]
    said = [process.communicate("end\n")[1] for process in processes]
    assert sorted(first) == ["", "", "", "held\n"]
    for line, text in zip(first, said, strict=True):
        assert "is in use by process" in text if not line else not text


def test_a_folder_that_was_taken_over(tmp_path):
    lock = RunLock(tmp_path)
    left_by(tmp_path, machine="other", pid=77)
    with pytest.raises(UserError, match="was taken over by process 77"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists()  # the other's


def test_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / LOCK).symlink_to(victim)
    with pytest.raises(UserError, match="cannot write to run folder"):
        RunLock(tmp_path)
    assert victim.read_text() == "mine"
