"""The process that checks operators for ``ops/self_check``: it may end at any of them, so it says
what it is at, a line of JSON each."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

import torch

from sacl_fast.verification.verify import verify

MARK = "sacl-fast "  # before each line, since libraries print as well


def main(seconds: int, device: torch.device, names: list[str]) -> None:
    """Check operators, ``"OP BACKEND"`` each, which ends by a SIGALRM if one takes longer than so
    many seconds."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.zeros(2, device=device).add_(1).sum().item()  # else it is the device, not an operator
    for name in names:
        _say(begins=name)
        signal.alarm(seconds)
        error = passing = None
        try:
            op, backend = name.split()
            verify(op, backend, device)
        except torch.OutOfMemoryError as no_room:  # of this moment, says nothing of the operator
            passing = _first_line(no_room)
        except Exception as found:  # whatever a compiler or a driver raises
            error = _first_line(found)
        _say(name=name, error=error, passing=passing)
        if error is not None and device.type == "cuda":
            _leave_if_lost(device)


def _leave_if_lost(device: torch.device) -> None:
    """After some errors a process cannot use the GPU any more: another one checks what is left."""
    try:
        torch.cuda.synchronize(device)
        torch.zeros(2, device=device).add_(1).sum().item()
    except RuntimeError:
        os._exit(0)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:300]


def _say(**what: Any) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()
