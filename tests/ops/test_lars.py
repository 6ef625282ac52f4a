"""The update of LARS in PyTorch, and with apex's functions, against the formula in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lars_cases import assert_follows, parameters, set_grads
from torch import Tensor, nn

from sacl_fast.errors import UserError
from sacl_fast.ops import backend as backends
from sacl_fast.ops import lars, lars_apex
from sacl_fast.optim import Lars
from tests.waiting import NoWaiting

# 100 steps of rounding.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 0.5}
SETTINGS = [
    {"weight_decay": 0.01},
    {"weight_decay": 0.01, "clip": True},
    {"weight_decay": 0.0, "clip": True, "momentum": 0.0},
    {"weight_decay": 0.0, "exclude_1d": False},
    {"weight_decay": 0.01, "clip": True, "exclude_1d": False, "on_device": False},
    {"weight_decay": 0.01, "clip": True, "eta": 0.0},
    {"weight_decay": 0.01, "clip": True, "scale": 1024.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_100_steps_equal_the_formula(dtype: torch.dtype, settings: dict[str, Any]):
    assert_follows(parameters(dtype), 100, "torch", relative=TOLERANCES[dtype], **settings)


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[6]], ids=str)
def test_the_reference_equals_the_formula(monkeypatch, settings: dict[str, Any]):
    """Which all tensors have where PyTorch has no fused SGD."""
    monkeypatch.setattr(lars, "_HAS_FUSED_SGD", False)
    assert_follows(parameters(torch.float64), 20, "torch", relative=1e-12, **settings)


def test_half_precision_is_computed_in_single():
    params = [nn.Parameter(torch.full((16, 16), 1.0, dtype=torch.bfloat16))]
    params[0].grad = torch.full_like(params[0], 2.0**-7)
    Lars(params, lr=1.0, eta=0.5).step()
    assert (params[0] == 0.5).all()


# --- launches, host reads ------------------------------------------------------------------------


class Calls(NoWaiting):
    """Notes what is computed, and refuses what waits for the device or copies to another."""

    VIEWS = ("view", "as_strided", "expand", "select", "unbind", "unsqueeze", "alias", "slice")
    ALLOCATES = ("empty", "empty_like", "new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name != "_to_copy" or "device" not in (kwargs or {}), "a copy to another device"
        launches = not name.startswith("_record_function")
        if launches and name not in (*self.VIEWS, *self.ALLOCATES):
            self.names.append(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


def calls_of_a_step(optimizer: Lars) -> list[str]:
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    return calls.names


def trained(count: int, backend: str = "torch", **settings: Any) -> Lars:
    """An optimiser of ``count`` times a weight, a filter and a bias, with gradients."""
    shapes = [(20, 30), (4, 3, 3, 3), (5,)] * count
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    settings = {"lr": torch.tensor(0.1), "weight_decay": 0.01, "eta": 0.02} | settings
    return Lars(params, **settings, backend=backend)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("clip", [False, True])
def test_at_most_twelve_launches_and_no_host_read(count: int, clip: bool):
    names = calls_of_a_step(trained(count, clip=clip))
    assert len(names) <= 12, names
    assert len(names) == (12 if clip else 10), names


def test_a_loss_scale_is_one_launch_more():
    optimizer = trained(5, clip=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # pyright: ignore
    names = calls_of_a_step(optimizer)
    assert len(names) == 13, names


def test_neither_does_the_reference_read_anything(monkeypatch):
    monkeypatch.setattr(lars, "_HAS_FUSED_SGD", False)
    optimizer = trained(2, clip=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # pyright: ignore
    calls_of_a_step(optimizer)


# --- overflow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_after_an_overflow_changes_nothing(monkeypatch, fused: bool):
    monkeypatch.setattr(lars, "_HAS_FUSED_SGD", fused)
    params = parameters()
    optimizer = Lars(params, lr=0.1, weight_decay=0.01, clip=True, backend="torch")
    set_grads(params, 1)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in params if p.grad is not None]
    set_grads(params, 1, scale=float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)  # pyright: ignore
    optimizer.step()
    after = [optimizer.state[p]["momentum_buffer"] for p in params if p.grad is not None]
    for x, y in zip([*before, *momenta], [*params, *after], strict=True):
        assert torch.equal(x, y)


# --- apex ----------------------------------------------------------------------------------------

# The functions as apex's csrc/amp_C_frontend.cpp declares and documents them.
AMP_C = '''
import torch

def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor_python=None):
    """Computes L2 norm for a list of contiguous tensors"""
    (tensors,) = checked(tensor_lists)
    norms = torch.stack([x.float().norm() for x in tensors])
    return norms.norm().view(1), norms if per_tensor_python else norms.new_empty(0)

def multi_tensor_axpby(chunk_size, noop_flag, tensor_lists, a, b, arg_to_check):
    """out = a*x + b*y for a list of contiguous tensors"""
    for x, y, out in zip(*checked(tensor_lists), strict=True):
        flat = [t.as_strided((t.numel(),), (1,)) for t in (x, y, out)]
        flat[2].copy_(a * flat[0] + b * flat[1])

def checked(tensor_lists):
    for tensors in tensor_lists:
        assert len(tensors) == len(tensor_lists[0])
        for i, x in enumerate(tensors):
            contiguous = x.is_contiguous()
            if x.ndim == 4:
                contiguous |= x.is_contiguous(memory_format=torch.channels_last)
            assert contiguous, "A tensor was not contiguous."
            assert x.numel() == tensor_lists[0][i].numel(), "Size mismatch"
    return tensor_lists
'''
APPLIER = """
class MultiTensorApply:
    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)

multi_tensor_applier = MultiTensorApply(2048 * 32)
"""


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes packages ``apex`` and ``amp_C`` that can be imported in this test."""
    monkeypatch.syspath_prepend(tmp_path)
    names = ("apex", "apex.multi_tensor_apply", "amp_C")

    def make(*, applier: str | None = APPLIER, amp_c: str | None = AMP_C, init: str = "") -> None:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex/__init__.py").write_text(init)
        if applier is not None:
            (tmp_path / "apex/multi_tensor_apply.py").write_text(applier)
        if amp_c is not None:
            (tmp_path / "amp_C.py").write_text(amp_c)

    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    lars_apex.obstacle.cache_clear()
    yield make
    lars_apex.obstacle.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def apex_on_cpu(apex, monkeypatch: pytest.MonkeyPatch) -> None:
    apex()
    checks = {"apex": lambda device: lars_apex.obstacle()}
    monkeypatch.setitem(backends.OPERATORS, "lars", checks)
    monkeypatch.setenv("SACL_FAST_SELF_CHECK", "off")  # in whose process it is not so


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[2], SETTINGS[6]], ids=str)
def test_100_steps_with_apex(apex_on_cpu: None, settings: dict[str, Any]):
    assert_follows(parameters(), 100, "apex", relative=3e-6, **settings)


def test_apex_is_used(apex_on_cpu: None):
    optimizer = trained(2, "auto")
    names: list[str] = []

    def noted(function, flag, lists, *arguments):
        names.append(function.__name__)
        assert flag.dtype == torch.int32 and flag.numel() == 1
        return function(65536, flag, lists, *arguments)

    sys.modules["apex.multi_tensor_apply"].multi_tensor_applier = noted  # pyright: ignore
    optimizer.step()
    assert names == ["multi_tensor_l2norm", "multi_tensor_axpby"]


def test_what_apex_lacks_is_told(apex):
    assert lars_apex.obstacle() == "NVIDIA's apex is not installed"
    lars_apex.obstacle.cache_clear()
    apex(applier=None, amp_c=None, init="raise SystemExit('another package of that name')")
    assert lars_apex.obstacle() == "NVIDIA's apex is not installed"


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"amp_c": None}, "without its CUDA extensions"),
        ({"amp_c": "raise OSError('undefined symbol')"}, "does not import .*undefined symbol"),
        ({"amp_c": AMP_C.replace("a, b, arg_to_check", "a, b")}, "multi_tensor_axpby .* 5 arg"),
        ({"amp_c": "multi_tensor_axpby = None"}, "multi_tensor_l2norm .* 0 arguments, not 4"),
        ({"applier": ""}, "does not import .*multi_tensor_applier"),
    ],
    ids=str,
)
def test_an_apex_that_does_not_fit_is_told(apex, made: dict[str, Any], told: str):
    apex(**made)
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(lars_apex.obstacle())


def test_arguments_of_compiled_functions_are_counted():
    """pybind11 writes them into the first line of the documentation, in two styles."""

    class Compiled:
        __signature__ = None
        __doc__ = (
            "multi_tensor_l2norm(arg0: int, arg1: torch.Tensor, arg2: list[list[torch.Tensor]], "
            "arg3: Optional[bool]) -> tuple[torch.Tensor, torch.Tensor]\n\nComputes (arg9: x)"
        )

    assert lars_apex._arguments(Compiled()) == 4


def test_apex_by_name_needs_a_cuda_device():
    with pytest.raises(UserError, match=r"apex.*cannot run lars on cpu \(it needs a CUDA device\)"):
        Lars([nn.Parameter(torch.ones(2))], lr=0.1, backend="apex")


def test_tensors_that_lie_alike() -> None:
    x = torch.empty(4, 3, 5, 5)
    last = x.to(memory_format=torch.channels_last)
    pairs: list[tuple[Tensor, Tensor, bool]] = [
        (x, last, False),
        (
            torch.empty(4, 3, 1, 1),
            torch.empty(4, 3, 1, 1).to(memory_format=torch.channels_last),
            True,
        ),
        (x, x.double(), False),
    ]
    for a, b, alike in pairs:
        assert lars.lies_like(a, b) == alike
    assert lars.is_dense(last) and lars.is_dense(x[1:]) and lars.is_dense(torch.empty(()))
    assert not lars.is_dense(x[:, 1:]) and not lars.is_dense(torch.empty(2, 1).expand(2, 3))
