"""Which implementation of an operator runs, decided once, with the reason.

``resolve`` is asked when a run is set up; the answer is logged and shown by ``sacl-fast doctor``.
An operator lists its backends fastest first; plain ``torch`` is always the last and always works.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from sacl_fast.checks import checked
from sacl_fast.config import Backend
from sacl_fast.errors import UserError, nearest

# A backend's check: None where it can run on that device, else why it cannot.
Check = Callable[[torch.device], str | None]


class Resolution(NamedTuple):
    """The backend that runs, and why that one."""

    backend: Backend
    reason: str


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton(device: torch.device) -> str | None:
    if not _triton_is_installed():
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # its interpreter runs kernels anywhere, to look into them
    if device.type != "cuda":
        return "Triton kernels need a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def _compiled_for_cpu(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it runs on the CPU only"
    from sacl_fast.ops import compiled

    return compiled.obstacle()


def _compiled_views(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "on a GPU, DALI augments"
    return _compiled_for_cpu(device)


def _compiled_for_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    from sacl_fast.ops import compiled

    return compiled.cuda_obstacle(device)


# Operator -> its backends besides ``torch``, fastest first.
OPERATORS: dict[str, dict[Backend, Check]] = {
    "xcorr_loss": {"triton": _triton},
    "slim_conv": {"cuda": _compiled_for_cuda, "cpu": _compiled_for_cpu},
    "lars": {},
    # ``torch``: torchvision, or DALI's own operators (see data/loading/open.py).
    "augment": {"cpu": _compiled_views},
}


@checked
def resolve(backend: Backend, op: str, device: torch.device) -> Resolution:
    """The backend of operator ``op`` on ``device``.

    ``auto`` takes the fastest that can run. A backend asked for by name that cannot run, or that
    the operator does not have, is a ``UserError`` that lists what can.
    """
    if op not in OPERATORS:
        raise UserError(f"unknown operator {op!r}; {nearest(op, OPERATORS)}")
    checks = OPERATORS[op]
    obstacles = {name: check(device) for name, check in checks.items()}
    usable: list[Backend] = [name for name in checks if obstacles[name] is None]
    usable.append("torch")
    if backend == "auto":
        passed_over = [f"{name}: {why_not}" for name, why_not in obstacles.items() if why_not]
        if usable[0] != "torch":
            return Resolution(usable[0], f"the fastest that runs on {device.type}")
        return Resolution("torch", "; ".join(passed_over) or "the only backend")
    if backend in usable:
        return Resolution(backend, "as requested")
    why_not = obstacles.get(backend) or f"{op} has no such backend"
    raise UserError(
        f"backend {backend!r} cannot run {op} on {device.type} ({why_not}); "
        f"what can: {', '.join(usable)}"
    )


def asked_of(op: str, backend: Backend) -> Backend:
    """The backend that is asked of one operator where ``backend`` is asked of all: that one
    where the operator has it, else ``auto``. Every operator has ``torch``."""
    return backend if backend in ("torch", *OPERATORS[op]) else "auto"


@checked
def resolve_all(backend: Backend, device: torch.device) -> dict[str, Resolution]:
    """The backend of every operator, as ``asked_of`` it.

    ``UserError`` where no operator has the backend, or one that has it cannot run.
    """
    known = {name for checks in OPERATORS.values() for name in checks}
    if backend not in ("auto", "torch", *known):
        works = ", ".join(["auto", "torch", *sorted(known)])
        raise UserError(f"no operator has the backend {backend!r}; what works: {works}")
    return {op: resolve(asked_of(op, backend), op, device) for op in OPERATORS}
