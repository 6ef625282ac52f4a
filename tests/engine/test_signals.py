"""What signals do: to a run, to everything around it, and in processes that a run forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from sacl_fast.engine.signals import StopRequest
from sacl_fast.errors import Stopped

HEADER = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from sacl_fast.engine import signals
from sacl_fast.engine.signals import *
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started the tests."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HEADER + code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | variables
    )


def test_the_first_signal_asks_and_nothing_is_raised():
    stop, said = StopRequest(), []
    stop.check()
    assert not stop.requested
    with stop.by_signals(said.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
    assert stop.requested and stop.number == signal.SIGTERM
    assert len(said) == 1 and said[0].startswith("SIGTERM: stopping after this step")
    with pytest.raises(Stopped) as stopped:
        stop.check()
    assert stopped.value.number == signal.SIGTERM


def test_handlers_are_as_before_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest().by_signals(print):
        assert all(signal.getsignal(n) is not b for n, b in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_among_several_processes_waits_last_a_little_longer():
    stop = StopRequest(patience=1000)
    stop.ask(signal.SIGTERM)
    stop.check_wait()
    assert not stop.requested and stop.number
    stop.patience = 0
    assert stop.requested
    with pytest.raises(Stopped):
        stop.check_wait()


def test_a_terminal_that_goes_away_stops_nothing(monkeypatch):
    stop, said = StopRequest(), []
    with stop.by_signals(said.append):
        signal.raise_signal(signal.SIGHUP)
        assert not stop.number and "the terminal is gone; training goes on" in said[0]
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop.by_signals(said.append):  # torchrun ends what it has hung up on, so save
        signal.raise_signal(signal.SIGHUP)
    assert stop.number == signal.SIGHUP


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ("SIGINT", "SIGINT", -signal.SIGINT),
        ("SIGTERM", "SIGTERM", 128 + signal.SIGTERM),
        ("SIGTERM", "SIGINT", -signal.SIGINT),
        ("SIGUSR1", "SIGTERM", 0),  # a scheduler's warning and its end: the checkpoint goes first
        ("SIGUSR1", "SIGUSR1", 0),
    ],
)
def test_a_second_one_ends_at_once(first, second, status):
    code = f"""
with StopRequest().by_signals(lambda text: None):
    os.kill(os.getpid(), signal.{first})
    time.sleep(0.5)
    os.kill(os.getpid(), signal.{second})
    time.sleep(0.1)
"""
    done = run(code)
    assert done.returncode == status, done.stderr
    assert ("--resume auto" in done.stderr) == (status != 0)


@pytest.mark.parametrize("variables", [{}, {"TORCHELASTIC_RUN_ID": "1"}])
def test_one_ctrl_c_that_arrives_twice_is_one(variables):
    assert run("print(signals._one_signal())", **variables).stdout == (
        "5.0\n" if variables else "0.3\n"
    )
    code = """
signals._one_signal = lambda: 1000.0  # however slow this machine is
with StopRequest().by_signals(lambda text: None):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
"""
    assert run(code, **variables).returncode == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_outside_of_the_steps_a_signal_ends_at_once(name):
    """Also where an exception would be swallowed, as it is while garbage is collected."""
    code = f"""
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.1)
with ended_by_signals():
    Swallows()
    print("goes on")
"""
    done = run(code)
    number = getattr(signal, name)
    assert done.returncode == (-number if number == signal.SIGINT else 128 + number)
    assert f"ended by {name}" in done.stderr
    assert "Exception" not in done.stderr and "goes on" not in done.stdout


def test_what_a_process_is_to_ignore_it_ignores():
    code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop = StopRequest()
with ended_by_signals(), stop.by_signals(print):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGHUP)
print(stop.number)
"""
    assert run(code).stdout == "0\n"


def test_a_forked_child_leaves_signals_to_its_parent():
    code = """
with ended_by_signals():
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code).stdout == "7\n"


def test_another_thread_leaves_signals_alone():
    code = """
import threading
def work():
    with StopRequest().by_signals(print):
        pass
    print("fine")
thread = threading.Thread(target=work)
thread.start(); thread.join()
"""
    assert run(code).stdout == "fine\n"
