"""The cases by which users' machines are checked, on the CUDA operators: here they are emulated,
and pass; and a kernel that is wrong on one type alone does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cuda_devices import ROOT, Device
from torch import Tensor

from sacl_fast.ops import (
    batch_norm_act,
    compiled,
    depthwise_conv,
    slim_add,
    slim_gate,
    slim_pointwise,
)
from sacl_fast.ops.backend import FUSED_OPERATORS, SLIM_OPERATORS
from sacl_fast.verification import Wrong, views
from sacl_fast.verification.comparison import compare
from sacl_fast.verification.verify import CASES, _register
from sacl_fast.verification.views import _compare

pytestmark = [
    pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle())),
    pytest.mark.parametrize("device", ["emulated"], indirect=True),
]
CPU, DTYPES = torch.device("cpu"), (torch.float32, torch.bfloat16)
SCHEMAS = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc/operators.cpp").read_text())


@pytest.fixture
def emulated(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated operators in place of all, but in float64, in which cases are exact."""
    for module in (batch_norm_act, depthwise_conv, slim_add, slim_gate, slim_pointwise):
        assert module.is_compiled()  # and tells torch of the operators before they are replaced
    _register()

    def by_type(name: str) -> Any:
        plain, own = getattr(torch.ops.sacl_fast, name), getattr(device.ops, name)

        def call(*given: Any, **named: Any) -> Any:
            exact = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in given)
            return (plain if exact else own)(*given, **named)

        return call

    for name in SCHEMAS:
        if name not in ("augment", "augment_packed", "draw_views"):
            monkeypatch.setattr(torch.ops.sacl_fast, name, by_type(name))
    monkeypatch.setattr(compiled, "unfit", lambda *_: None)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("op", sorted({*SLIM_OPERATORS, *FUSED_OPERATORS} - {"norm_pointwise"}))
def test_passes(op):
    compare(CASES[op], CPU, "cpu", DTYPES)


@pytest.mark.usefixtures("emulated")
def test_what_is_wrong_in_half_precision_alone_is_found(monkeypatch):
    own = torch.ops.sacl_fast.norm_act_gradient

    def forgets_the_gate(dy: Tensor, x: Tensor, affine: Tensor, act: int, *more: Any) -> Any:
        gate, dmean = more
        return own(dy, x, affine, act, None if dy.dtype == torch.bfloat16 else gate, dmean)

    monkeypatch.setattr(torch.ops.sacl_fast, "norm_act_gradient", forgets_the_gate)
    with pytest.raises(Wrong, match=r"^bfloat16: gradient of"):
        compare(CASES["norm_act"], CPU, "cpu", DTYPES)


def test_views(device: Device, monkeypatch):
    """By the emulated kernels, in both types that a GPU's are checked in."""
    compared, emulated = [], device.ops.augment_packed

    def compare(what: str, *given: Tensor) -> None:
        compared.append(what)
        _compare(what, *given)

    monkeypatch.setattr(
        views,
        "augment_packed",
        lambda *given, window, mean, std, out: emulated(*given, window, mean, std, out, 1),
    )
    monkeypatch.setattr(views, "_compare", compare)
    monkeypatch.setattr(views, "_TYPES", {"cpu": views._TYPES["cuda"]})
    views.augment(CPU)
    assert compared == ["of images", "of one buffer, float32", "of one buffer, bfloat16"]
