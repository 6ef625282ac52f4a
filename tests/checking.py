"""A script in place of the process that checks operators: it says what ``verification/child.py``
would, without importing torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sacl_fast.ops import backend as backends
from sacl_fast.ops import self_check

# What an operator of this name does to the process that checks it.
CHILD = """
import json, os, signal, sys
path, seconds, each, device, *names = json.loads(sys.argv[1])
open(os.environ["ASKED"], "a").write(" ".join(names) + "\\n")
deeds = json.loads(os.environ["DEEDS"])

def say(**what):
    print("sacl-fast " + json.dumps(what), flush=True)

def kill(number):
    os.kill(os.getpid(), number)

exec(deeds.get("start", ""))
for name in names:
    say(begins=name)
    error = passing = None
    print("a library says something", name)
    exec(deeds.get(name, ""))
    say(name=name, error=error, passing=passing)
    if error is not None:
        exec(deeds.get("after an error", ""))
"""


class Children:
    """What the processes that check were asked, and are to do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._asked = folder / "asked"
        self._set = monkeypatch.setenv
        self._set("ASKED", str(self._asked))
        self.do()

    def do(self, **deeds: str) -> None:
        """By operator's name; ``start``: before the first one."""
        of_names = {f"{name} cpu": deed for name, deed in deeds.items()}
        self._set("DEEDS", json.dumps({**of_names, **deeds}))

    @property
    def asked(self) -> list[str]:
        return self._asked.read_text().splitlines() if self._asked.exists() else []


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process knows."""
    monkeypatch.setattr(self_check, "_found", {})
    monkeypatch.setattr(self_check, "_warned", set())
    backends._is_right.cache_clear()
