"""Streams that drop what cannot be written, and an exit status that is true all the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sacl_fast.output import show_log

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")

# A command in which much is printed to a standard output that is a courtesy.
LONG = """
import sys
from sacl_fast.output import make_courtesy, open_standard_streams
open_standard_streams()
make_courtesy("stderr")
make_courtesy("stdout")
for i in range(5000):
    print("a line with an umlaut, ü", i)
print("done", file=sys.stderr)
sys.exit(7)
"""


def run(code: str, **options) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", code], text=True, timeout=100, **options)


def sacl_fast(*args: str, **options) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-m", "sacl_fast", *args]
    return subprocess.run(command, text=True, timeout=200, **options)


def test_what_can_be_written_is_written_whole():
    done = run(LONG, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 7 and done.stderr == "done\n"
    lines = [rf"a line with an umlaut, \xfc {i}" for i in range(5000)]
    assert done.stdout.splitlines() == lines


@needs_full
def test_a_full_disk_is_told_of_once_and_changes_no_status():
    with FULL.open("w") as full:
        done = run(LONG, stdout=full)
        assert done.returncode == 7
        told, last = done.stderr.splitlines()
        assert "not written to any more (No space left on device)" in told and last == "done"
        assert run(LONG, stdout=full, stderr=full).returncode == 7


def test_a_reader_that_goes_away():
    process = subprocess.Popen(
        [sys.executable, "-c", LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 7
    assert "(Broken pipe)" in said and said.endswith("done\n") and "Exception" not in said


def test_a_live_display_whose_terminal_goes_away():
    code = """
import os, pty, sys
from sacl_fast.output import make_courtesy, open_standard_streams
master, slave = pty.openpty()
os.dup2(slave, 1)
os.close(slave)
open_standard_streams()
make_courtesy("stderr")
make_courtesy("stdout")
from sacl_fast.engine.console import RunConsole
with RunConsole(10, 100, 256) as console:
    console.update(1, 0.1, {"loss": 1.0})
    os.close(master)
    for step in range(2, 5):
        console.update(step, 0.1, {"loss": 1.0})
        console.message("a line")
sys.exit(7)
"""
    done = run(code, env=os.environ | {"TERM": "xterm"})
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("\n") == 1 and "(Input/output error)" in done.stderr


def test_a_reader_that_waits_holds_nobody_up():
    code = LONG.replace("open_standard_streams()\n", "output._PATIENCE = 0.2\n", 1)
    code = "import sacl_fast.output as output\n" + code
    reader, writer = os.pipe()  # nobody reads: it takes 64 KB
    try:
        done = run(code, stdout=writer)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 7 and "its reader waits" in done.stderr


def test_descriptors_that_are_closed_are_not_given_to_files(tmp_path):
    code = (
        "import sys; from sacl_fast.output import open_standard_streams\n"
        "open_standard_streams()\n"
        f"file = open({str(tmp_path / 'x')!r}, 'w')\n"
        "print('to nobody'); print('to nobody', file=sys.stderr); sys.stdin.read()\n"
        "sys.exit(file.fileno() > 2 and 7)"
    )
    command = f'exec {sys.executable} -c "$CODE" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command], env=os.environ | {"CODE": code}, timeout=60)
    assert done.returncode == 7


@needs_full
@pytest.mark.parametrize("args", ["--help", "--version", "train --help"])
def test_a_command_whose_output_is_lost_has_failed(args):
    with FULL.open("w") as full:
        done = sacl_fast(*args.split(), stdout=full)
    assert done.returncode == 1
    assert (
        "cannot write the output: No space left on device" in done.stderr
        and "Traceback" not in done.stderr
    )


@needs_full
def test_bad_input_is_bad_input_wherever_the_sentence_goes():
    with FULL.open("w") as full:
        assert sacl_fast("trian", stderr=full).returncode == 2
        assert sacl_fast("trian", stderr=full, stdout=full).returncode == 2
    closed = subprocess.run(["sh", "-c", f"{sys.executable} -m sacl_fast trian 2>&-"], timeout=60)
    assert closed.returncode == 2


def test_head_has_seen_enough_of_the_help():
    command = f"{sys.executable} -m sacl_fast train --help | true; exit $PIPESTATUS"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


def test_the_log_steers_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    show_log()
    logging.getLogger("sacl_fast.data").info("class %s", "\x1b[31m\udcff\n\tü")
    assert capsys.readouterr().err == "class \\x1b[31m\\udcff\n\tü\n"
