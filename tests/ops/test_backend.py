"""A backend that is asked for by name runs or is an error; `auto` falls back; a run resolves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sacl_fast.errors import UserError
from sacl_fast.losses import SaclXdLoss
from sacl_fast.ops import backend as module
from sacl_fast.ops import compiled
from sacl_fast.ops.backend import (
    OPERATORS,
    SLIM_OPERATORS,
    Resolution,
    is_faster,
    of_slim_operators,
    resolve_all,
)
from sacl_fast.ops.batch_norm_act import batch_norm_act
from sacl_fast.ops.depthwise_conv import depthwise_conv
from sacl_fast.ops.slim_add import slim_add
from sacl_fast.ops.slim_gate import slim_gate
from sacl_fast.ops.slim_pointwise import slim_pointwise
from sacl_fast.ops.xcorr_loss import sacl_xd_loss

needs_compiled = pytest.mark.skipif(
    compiled.obstacle() is not None, reason=str(compiled.obstacle())
)


def pointwise(x: Tensor, **options: Any) -> Any:
    return slim_pointwise(x, torch.ones(5, 4, 1, 1, dtype=x.dtype), **options)


def depthwise(x: Tensor, **options: Any) -> Any:
    return depthwise_conv(x, torch.ones(4, 1, 3, 3, dtype=x.dtype), **options)


def norm(x: Tensor, **options: Any) -> Any:
    return batch_norm_act(x, *torch.ones(2, 4, dtype=x.dtype), **options)[0]


def add(x: Tensor, **options: Any) -> Any:
    return slim_add(x, None, None, x, None, None, **options)


def gate(x: Tensor, **options: Any) -> Any:
    return slim_gate(x, None, torch.ones(len(x), 4, 1, 1, dtype=x.dtype), **options)


def loss(x: Tensor, **options: Any) -> Any:
    return sacl_xd_loss(*[x.flatten(1)] * 4, **options)[0]


CALLS: dict[str, Callable[..., Any]] = {
    "slim_pointwise": pointwise,
    "depthwise_conv": depthwise,
    "batch_norm_act": norm,
    "slim_add": add,
    "slim_gate": gate,
    "xcorr_loss": loss,
}


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 4, 6, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)


def test_every_operator_with_backends_is_called_here():
    made_elsewhere = {"lars", "augment", "draw_views"}  # asked for a backend once
    assert set(CALLS) == set(OPERATORS) - made_elsewhere


@pytest.mark.parametrize("op", CALLS)
def test_an_unknown_name_is_an_error_that_lists_what_works(op):
    with pytest.raises(
        UserError, match=rf"{op}: backend is 'no such'; one of auto, torch, .* works"
    ):
        CALLS[op](images(), backend="no such")
    with pytest.raises(UserError, match="did you mean torch"):
        CALLS[op](images(), backend="torhc")
    with pytest.raises(UserError, match="backend is None"):
        CALLS[op](images(), backend=None)


@pytest.mark.parametrize("op", SLIM_OPERATORS)
def test_cuda_on_tensors_of_the_cpu_is_an_error(op):
    what_can = "cpu, torch" if compiled.obstacle() is None else "torch"
    says = rf"'cuda' cannot run {op} here \(the tensors are on cpu\); what can: {what_can}$"
    with pytest.raises(UserError, match=says):
        CALLS[op](images(), backend="cuda")


@needs_compiled
@pytest.mark.parametrize("op", SLIM_OPERATORS)
@pytest.mark.parametrize(
    ("x", "why_not"),
    [
        (images(torch.float64), "float32"),
        (images().contiguous(), "channels-last memory"),
        (images().to(torch.bfloat16), "float32"),
    ],
    ids=["float64", "contiguous", "bfloat16"],
)
def test_by_name_what_it_does_not_take_is_an_error_and_auto_falls_back(op, x, why_not):
    with pytest.raises(UserError, match=rf"'cpu' cannot run {op} here .*{why_not}.*can: torch$"):
        CALLS[op](x, backend="cpu")
    assert torch.equal(CALLS[op](x, backend="auto"), CALLS[op](x, backend="torch"))


@pytest.mark.parametrize("op", SLIM_OPERATORS)
def test_without_the_compiled_module_cpu_is_an_error_and_auto_falls_back(op, monkeypatch):
    owner = __import__(f"sacl_fast.ops.{op}", fromlist=[op])
    monkeypatch.setattr(owner, "is_compiled", lambda: False)
    monkeypatch.setattr(compiled, "obstacle", lambda: "sacl_fast._C is not here")
    with pytest.raises(UserError, match=rf"cannot run {op} here \(sacl_fast._C is not here\)"):
        CALLS[op](images(), backend="cpu")
    assert torch.equal(CALLS[op](images()), CALLS[op](images(), backend="torch"))


@needs_compiled
@pytest.mark.parametrize("op", SLIM_OPERATORS)
def test_auto_is_the_compiled_operator_where_it_can(op):
    assert torch.equal(CALLS[op](images(), backend="auto"), CALLS[op](images(), backend="cpu"))


def test_triton_is_not_for_the_cpu_nor_for_float64(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"'triton' cannot run xcorr_loss here .*what can: torch$"):
        loss(images(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match=r"not float64\); what can: torch$"):
        loss(images(torch.float64), backend="triton")
    assert loss(images(torch.float64)).dtype == torch.float64


def test_the_loss_of_a_run_resolves_nothing(monkeypatch):
    def forbidden(*_: Any) -> None:
        raise AssertionError("resolved in a call")

    for name in ("resolve", "triton_obstacle"):
        monkeypatch.setattr(module, name, forbidden)
        monkeypatch.setattr("sacl_fast.ops.xcorr_loss.triton_obstacle", forbidden)
    z = torch.randn(8, 6, requires_grad=True)
    value, _ = SaclXdLoss(backend="torch")(z, z.detach(), z.detach(), z.detach())
    value.backward()
    assert z.grad is not None


def test_a_call_asks_once_whether_the_faster_backend_takes_it():
    asked = []

    def unfit(x: Tensor) -> str | None:
        asked.append(x)
        return None

    assert not is_faster("slim_add", "torch", unfit, images())
    assert not asked
    assert is_faster("slim_add", "auto", unfit, images())
    assert is_faster("slim_add", "cpu", unfit, images())
    assert len(asked) == 2


def test_what_a_run_gives_its_calls():
    """``auto``, since a layer may be of a kind that the named backend does not take."""
    assert Resolution("cpu", "as requested").for_calls == "auto"
    assert Resolution("torch", "as requested").for_calls == "torch"
    backends = resolve_all("torch", torch.device("cpu"))
    assert set(backends) == set(OPERATORS)
    assert of_slim_operators(backends) == Resolution("torch", "as requested")
