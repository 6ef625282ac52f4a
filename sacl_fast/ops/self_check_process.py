"""The process that checks operators for ``self_check``, as whoever starts it sees it: what it says,
and what it means where it ends.

It runs ``sacl_fast.verification.child``, with this process's path for imports and environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

VARIABLE = "SACL_FAST_SELF_CHECK"
_EACH = 60  # seconds for an operator, which may have to be compiled
ALL = 180  # seconds for those of a device, and for importing torch, from a slow disk perhaps

_CHILD = """
import json, signal, sys
path, seconds, each, device, *names = json.loads(sys.argv[1])
signal.alarm(seconds)  # where whoever started this is gone
sys.path[:] = path
import torch
from sacl_fast.verification.child import main
main(each, torch.device(device), names)
"""
_MARK = "sacl-fast "  # see verification/child.py

State = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Outcome:
    """What became of the check of an operator by a backend."""

    state: State
    why: str = ""
    """The error; why it was not checked."""
    when: float = 0.0
    """Seconds since 1970."""

    @property
    def obstacle(self) -> str | None:
        """Why the operator is not used; None where it passed."""
        if self.state == "passed":
            return None
        if self.state == "failed":
            return f"it failed its self-check: {self.why}"
        return f"its self-check could not be done: {self.why}"

    def __str__(self) -> str:
        if self.state == "not checked":
            return f"self-check not done ({self.why})"
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        return f"self-check {self.state} {day}" + (f" ({self.why})" if self.why else "")


def checked(names: Sequence[str], device: torch.device) -> dict[str, Outcome]:
    """The outcome of each. A process that ends at one of them is followed by another one for those
    after it."""
    outcomes: dict[str, Outcome] = {}
    left, end = list(names), time.monotonic() + ALL
    while left:
        found, why = _by_a_child(left, device, end - time.monotonic())
        if not found:
            outcomes |= {name: Outcome("not checked", why) for name in left}
            break
        outcomes |= found
        left = [name for name in left if name not in outcomes]
    return outcomes


def _by_a_child(
    names: list[str], device: torch.device, seconds: float
) -> tuple[dict[str, Outcome], str]:
    """What a process finds before it ends, and if that is nothing, why."""
    if seconds < 1:
        return {}, f"no time is left of {ALL} s"
    if not sys.executable:
        return {}, "it is not known where this Python's interpreter is"
    path = [str(entry) for entry in sys.path]
    given = json.dumps([path, int(seconds) + 5, _EACH, str(device), *names])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, given],  # nothing of the current folder
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env={**os.environ, VARIABLE: "off"},
                start_new_session=True,
            )
        except OSError as error:
            return {}, f"no process can be started: {error.strerror}"
        try:
            ended = _ending(child.wait(seconds))
        except subprocess.TimeoutExpired:
            ended = _NO_TIME
        finally:
            if child.poll() is None:  # also after Ctrl-C; with what it started, such as a compiler
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        out.seek(0)
        errors.seek(0)
        said = out.read().decode(errors="replace")
        last = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    found, at = _heard(said)
    if at is not None:
        state: State = "not checked" if ended in _OF_THE_MOMENT else "failed"
        found[at] = Outcome(state, ended, time.time())
    why = next((line for line in reversed(last) if line), "it said nothing")
    return found, f"{ended}: {why[:200]}"


def _heard(said: str) -> tuple[dict[str, Outcome], str | None]:
    """What was found, and the operator at which the process ended."""
    found: dict[str, Outcome] = {}
    at = None
    for line in said.splitlines():
        if not line.startswith(_MARK):
            continue
        try:
            told: dict[str, Any] = json.loads(line.removeprefix(_MARK))
        except ValueError:  # it was killed as it wrote
            continue
        if "begins" in told:
            at = told["begins"]
            continue
        at = None
        if told["passing"] is not None:
            outcome = Outcome("not checked", told["passing"])
        elif told["error"] is not None:
            outcome = Outcome("failed", told["error"], time.time())
        else:
            outcome = Outcome("passed", when=time.time())
        found[told["name"]] = outcome
    return found, at


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit status {code}"
    if code == -signal.SIGALRM:
        return f"it did not end within {_EACH} s"
    return f"its process ended by {signal.Signals(-code).name}"


_NO_TIME = f"there was not enough time within {ALL} s"
# What says nothing of the operator: it is checked again by the next process that asks.
_OF_THE_MOMENT = (_NO_TIME, *(_ending(-n) for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)))
