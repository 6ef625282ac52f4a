"""Which implementation of an operator runs: decided once a run, with the reason; and checked in
every call.

``resolve`` is asked when a run is set up; the answer is logged and shown by ``sacl-fast doctor``.
An operator lists its backends fastest first; plain ``torch`` is always the last and always works.

``is_faster`` is asked by each call of an operator. There as everywhere a backend's name is an
order: ``cpu``, ``cuda`` or ``triton`` for what it does not take (float64, another memory format,
another device) is an error. An encoder may have layers of such kinds, so what a run gives the calls
is not the name that it resolved but ``Resolution.for_calls``: ``torch``, else ``auto``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sacl_fast.checks import checked, shown
from sacl_fast.config import Backend
from sacl_fast.errors import UserError, nearest

# A backend's check: None where it can run on that device, else why it cannot.
Check = Callable[[torch.device], str | None]


class Resolution(NamedTuple):
    """The backend that runs, and why that one."""

    backend: Backend
    reason: str

    @property
    def for_calls(self) -> Backend:
        """What a run gives the calls of the operator: ``torch``, or ``auto``, by which a call that
        the faster backend is not for (in float64, say) is computed by PyTorch."""
        return "torch" if self.backend == "torch" else "auto"


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can."""
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


def _compiled_draws(_: torch.device) -> str | None:
    from sacl_fast.ops import compiled

    return compiled.obstacle()


def _compiled_for_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    from sacl_fast.ops import compiled

    return compiled.cuda_obstacle(device)


def _apex(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    from sacl_fast.ops import lars_apex

    return lars_apex.obstacle()


_COMPILED: dict[Backend, Check] = {"cuda": _compiled_for_cuda, "cpu": _compiled_for_cpu}

# Operator -> its backends besides ``torch``, fastest first.
OPERATORS: dict[str, dict[Backend, Check]] = {
    "xcorr_loss": {"triton": triton_obstacle},
    "slim_pointwise": _COMPILED,
    "depthwise_conv": _COMPILED,
    "batch_norm_act": _COMPILED,
    "slim_add": _COMPILED,
    "slim_gate": _COMPILED,
    "lars": {"triton": triton_obstacle, "apex": _apex},
    # ``torch``: torchvision, or DALI's own operators (see data/loading/open.py).
    "augment": _COMPILED,
    # ``torch``: numpy. The CPU draws for a GPU, too.
    "draw_views": {"cpu": _compiled_draws},
}
# Those of an encoder's slim passes, which share one module and so one resolution.
SLIM_OPERATORS = ("slim_pointwise", "depthwise_conv", "batch_norm_act", "slim_add", "slim_gate")


def of_slim_operators(backends: dict[str, Resolution]) -> Resolution:
    """What ``resolve_all`` found for ``SLIM_OPERATORS``."""
    (resolution,) = {backends[op] for op in SLIM_OPERATORS}
    return resolution


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


def is_faster(
    op: str, backend: str, unfit: Callable[..., str | None], *given: Tensor | None
) -> bool:
    """Whether this call of operator ``op`` goes to its faster backend rather than to plain PyTorch.

    ``auto``: where it can. A backend that is asked for by name and cannot take what is given, or
    that the operator does not have, is a ``UserError``.

    Args:
        unfit: of ``given``, why the faster backend is not for it; None if it is.
        given: the call's tensors, the first of which says where it runs.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return unfit(*given) is None
    names = ("auto", "torch", *OPERATORS[op])
    if backend not in names:
        close = nearest(str(backend), names)
        hint = f" ({close})" if close.startswith("did you mean") else ""
        raise UserError(f"{op}: backend is {shown(backend)}; one of {', '.join(names)} works{hint}")
    (x, *_), obstacle = given, unfit(*given)
    assert x is not None
    if backend in ("cpu", "cuda") and backend != x.device.type:
        usable = "torch" if obstacle else f"{x.device.type}, torch"
        obstacle = f"the tensors are on {x.device}"
    elif obstacle is None:
        return True
    else:
        usable = "torch"
    raise UserError(f"backend {backend!r} cannot run {op} here ({obstacle}); what can: {usable}")
