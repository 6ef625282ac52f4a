"""Which implementation of an operator runs: decided once a run, with the reason; and checked in
every call.

``resolve`` is asked when a run is set up; the answer is logged and shown by ``sacl-fast doctor``.
An operator lists its backends fastest first; plain ``torch`` is always the last and always works.

Of what can run on a device, only what is right there is taken: see ``self_check``.

``is_faster`` is asked by each call of an operator. There as everywhere a backend's name is an
order: ``cpu``, ``cuda`` or ``triton`` for what it does not take (float64, another memory format,
another device) is an error. An encoder may have layers of such kinds, so what a run gives the calls
is not the name that it resolved but ``Resolution.for_calls``: ``torch``, else ``auto``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from sacl_fast.checks import checked, shown
from sacl_fast.config import Backend
from sacl_fast.errors import UserError, nearest
from sacl_fast.ops import self_check
from sacl_fast.ops.self_check import Outcome

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
# Those of an encoder's slim passes, which share one module.
SLIM_OPERATORS = ("slim_pointwise", "depthwise_conv", "batch_norm_act", "slim_add", "slim_gate")

# Those that fused passes are made of, by no name that is asked for: on CPUs they are plain PyTorch.
FUSED_OPERATORS: dict[str, dict[Backend, Check]] = {
    **{
        op: {"cuda": _compiled_for_cuda}
        for op in ("norm_act", "norm_depthwise", "norm_slim_add", "norm_slim_gate", "slim_border")
    },
    "norm_pointwise": {"triton": triton_obstacle},
}


def of_slim_operators(backends: dict[str, Resolution]) -> Resolution:
    """What ``resolve_all`` found for ``SLIM_OPERATORS``: plain PyTorch where that is so for one of
    them, and then the others are not worth what they are for."""
    found = [backends[op] for op in SLIM_OPERATORS]
    return next((resolution for resolution in found if resolution.backend == "torch"), found[0])


def for_slim_calls(backends: dict[str, Resolution]) -> Backend:
    """What a run gives the calls of ``SLIM_OPERATORS``: ``auto`` as long as one of them is not
    plain PyTorch."""
    found = {backends[op].for_calls for op in SLIM_OPERATORS}
    return "auto" if "auto" in found else "torch"


def fused_obstacle(device: torch.device, *, products: bool) -> str | None:
    """Why operators of fused passes, 1x1 convolutions (``products``) or the others, cannot run on a
    device, or are wrong there, of which the log tells; None if they can."""
    if device.type != "cuda":
        return None
    for op, checks in FUSED_OPERATORS.items():
        if (op == "norm_pointwise") == products:
            for name, check in checks.items():
                if why_not := check(device):
                    return f"{op}: {why_not}"
                if why_not := _passed_over(op, name, device, "passes are not fused by it"):
                    return f"{op}: {why_not}"
    return None


def outcome_of_self_check(op: str, backend: Backend, device: torch.device) -> Outcome:
    """What came of it, which is done where it was not yet.

    Args:
        op: of ``OPERATORS`` or ``FUSED_OPERATORS``, with a backend that can run on the device.
    """
    device = _where(backend, device)
    table = OPERATORS if op in OPERATORS else FUSED_OPERATORS
    return self_check.outcome_of(op, backend, device, partial(_runnable, table, device))


def _where(backend: Backend, device: torch.device) -> torch.device:
    """The device on which a backend works for another: the CPU draws for a GPU."""
    return torch.device("cpu") if backend == "cpu" else device


def _self_check_obstacle(op: str, backend: Backend, device: torch.device) -> str | None:
    if self_check.is_off():
        return None
    return outcome_of_self_check(op, backend, device).obstacle


def _passed_over(op: str, backend: Backend, device: torch.device, instead: str = "") -> str | None:
    """Why ``auto`` does not take a backend that can run, which the log tells; None if it does."""
    if self_check.is_off():
        return None
    outcome = outcome_of_self_check(op, backend, device)
    if outcome.obstacle is not None:
        plain = {"augment": "torchvision", "draw_views": "numpy"}.get(op, "PyTorch")
        instead = instead or f"plain {plain} does it"
        self_check.warn_once(op, backend, _where(backend, device), outcome, instead)
    return outcome.obstacle


def _runnable(table: dict[str, dict[Backend, Check]], device: torch.device) -> Iterable[str]:
    for op, checks in table.items():
        for backend, check in checks.items():
            if check(device) is None:
                yield f"{op} {backend}"


@checked
def resolve(backend: Backend, op: str, device: torch.device) -> Resolution:
    """The backend of operator ``op`` on ``device``.

    ``auto`` takes the fastest that can run and has passed its self-check; of one that has not, the
    log tells. A backend asked for by name that cannot run, has not passed, or that the operator
    does not have, is a ``UserError`` that lists what can.
    """
    if op not in OPERATORS:
        raise UserError(f"unknown operator {op!r}; {nearest(op, OPERATORS)}")
    if backend == "torch":
        return Resolution("torch", "as requested")
    obstacle = _passed_over if backend == "auto" else _self_check_obstacle
    obstacles: dict[Backend, str | None] = {}
    for name, check in OPERATORS[op].items():
        obstacles[name] = check(device) or obstacle(op, name, device)
        if backend == "auto" and obstacles[name] is None:
            break  # those after it are slower
    usable: list[Backend] = [name for name, why_not in obstacles.items() if why_not is None]
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


@torch.compiler.assume_constant_result
@cache
def _is_right(op: str, device: torch.device) -> bool:
    """Whether the backend of an operator that takes tensors on a device passed its self-check."""
    names, own = OPERATORS[op], "cpu" if device.type == "cpu" else "cuda"
    backend = own if own in names else next(iter(names))
    return _passed_over(op, backend, device) is None


def is_faster(
    op: str, backend: str, unfit: Callable[..., str | None], *given: Tensor | None
) -> bool:
    """Whether this call of operator ``op`` goes to its faster backend rather than to plain PyTorch.

    ``auto``: where it can, and has passed its self-check. A backend that is asked for by name and
    cannot take what is given, or that the operator does not have, is a ``UserError``; that one runs
    unchecked.

    Args:
        unfit: of ``given``, why the faster backend is not for it; None if it is.
        given: the call's tensors, the first of which says where it runs.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        x, *_ = given
        assert x is not None
        return unfit(*given) is None and _is_right(op, x.device)
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
