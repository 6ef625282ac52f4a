"""Every operator has a case, passes it here, and does not when its results are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sacl_fast.ops import batch_norm_act, compiled, depthwise_conv, slim_add, slim_gate
from sacl_fast.ops import slim_pointwise as pointwise
from sacl_fast.ops.backend import FUSED_OPERATORS, OPERATORS, SLIM_OPERATORS, triton_obstacle
from sacl_fast.verification import Wrong, verify, views
from sacl_fast.verification.comparison import TOLERANCES, Here, compare
from sacl_fast.verification.verify import CASES, OF_VIEWS, _register

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_compiled = pytest.mark.skipif(
    compiled.obstacle() is not None, reason=str(compiled.obstacle())
)
ON_CPU = [op for op, backends in OPERATORS.items() if "cpu" in backends]
SCHEMAS = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc/operators.cpp").read_text())
KERNELS = [*SCHEMAS, "norm_pointwise", "norm_pointwise_backward"]


def operator_of(kernel: str) -> str:
    return "norm_act" if kernel.startswith("norm_act_") else kernel.partition("_backward")[0]


@pytest.fixture(autouse=True)
def described() -> None:
    """PyTorch is told of the operators before a test replaces one."""
    for module in (batch_norm_act, depthwise_conv, slim_add, slim_gate, pointwise):
        module.is_compiled()
    _register()


def replaced(monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[Any], Any]) -> None:
    own = getattr(torch.ops.sacl_fast, kernel)
    monkeypatch.setattr(torch.ops.sacl_fast, kernel, lambda *a, **k: change(own(*a, **k)))


def slightly_off(t: Tensor) -> Tensor:
    """One value of all, by a hundredth of the largest."""
    t = t.clone(memory_format=torch.preserve_format)
    where = (-1,) * t.ndim
    t[where] += 0.01 * t.abs().max()
    return t


def test_every_operator_has_a_case():
    assert {*CASES, *OF_VIEWS} == {*OPERATORS, *FUSED_OPERATORS}
    assert {operator_of(kernel) for kernel in KERNELS} >= {*SLIM_OPERATORS, *FUSED_OPERATORS}


@needs_compiled
@pytest.mark.parametrize("op", ON_CPU)
def test_passes_on_this_cpu(op):
    verify(op, "cpu", CPU)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, b) for table in (OPERATORS, FUSED_OPERATORS) for op in table for b in table[op]],
)
def test_passes_on_this_gpu(op, backend):
    device = CPU if backend == "cpu" else CUDA
    if why_not := {**OPERATORS, **FUSED_OPERATORS}[op][backend](device):
        pytest.skip(why_not)
    verify(op, backend, device)


@needs_compiled
@pytest.mark.parametrize("op", FUSED_OPERATORS)
def test_rounding_passes_where_the_types_are_those_of_a_gpu(op):
    """Of operators of fused passes, on the CPU plain PyTorch in float32 and bfloat16."""
    compare(CASES[op], CPU, "torch", (torch.float32, torch.bfloat16))


@needs_compiled
@pytest.mark.parametrize("kernel", [k for k in KERNELS if operator_of(k) in CASES])
def test_any_output_of_which_a_value_is_off_is_found(kernel, monkeypatch):
    """Kernels of fused passes are plain PyTorch here."""
    own = getattr(torch.ops.sacl_fast, kernel)
    for number in range(len(own.default._schema.returns)):
        changed = []

        def call(*given: Any, number: int = number, changed: list[int] = changed, **more: Any):
            out = own(*given, **more)
            several = list(out) if isinstance(out, tuple) else [out]
            exact = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in given)
            if exact or not several[number].numel():
                return out
            changed.append(number)
            several[number] = slightly_off(several[number])
            return tuple(several) if isinstance(out, tuple) else several[0]

        monkeypatch.setattr(torch.ops.sacl_fast, kernel, call)
        with pytest.raises(Wrong, match=r"^float32: .* is off by 0\.0"):
            compare(CASES[operator_of(kernel)], CPU, "cpu", (torch.float32,))
        assert changed


@needs_compiled
def test_a_wrong_gradient_is_told(monkeypatch):
    def off(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*gradients[:3], slightly_off(gradients[3]))

    replaced(monkeypatch, "slim_add_backward", off)
    why = "float32: gradient of constants of b is off by 0.01 of its largest value"
    with pytest.raises(Wrong, match=f"^{re.escape(why)}$"):
        verify("slim_add", "cpu", CPU)


@needs_compiled
def test_no_number_is_wrong_and_what_raises_is_told(monkeypatch):
    replaced(monkeypatch, "slim_add", lambda y: y.fill_(torch.nan))
    with pytest.raises(Wrong, match="y is off by nan"):
        verify("slim_add", "cpu", CPU)

    def refuses(_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    replaced(monkeypatch, "slim_gate", refuses)
    with pytest.raises(RuntimeError, match="no kernel image"):
        verify("slim_gate", "cpu", CPU)


@needs_compiled
def test_running_statistics_count(monkeypatch):
    own = torch.ops.sacl_fast.batch_norm_act

    def forgets(*given: Any) -> Any:
        kept = [None if t is None else t.clone() for t in given[5:7]]
        return own(*given[:5], *kept, *given[7:])

    monkeypatch.setattr(torch.ops.sacl_fast, "batch_norm_act", forgets)
    with pytest.raises(Wrong, match="running mean"):
        verify("batch_norm_act", "cpu", CPU)


@needs_compiled
def test_wrong_pixels_are_found(monkeypatch):
    own = torch.ops.sacl_fast.augment
    monkeypatch.setattr(torch.ops.sacl_fast, "augment", lambda *a: own(*a) + 1)
    with pytest.raises(Wrong, match="views of images: pixels are off by 1 of 255"):
        verify("augment", "cpu", CPU)


@needs_compiled
def test_a_wrong_blur_alone_is_found(monkeypatch):
    own = torch.ops.sacl_fast.augment

    def blurs_more(images: Any, draws: Tensor, *more: Any) -> Tensor:
        draws = draws.clone()
        draws[..., -2] *= 1.2
        return own(images, draws, *more)

    monkeypatch.setattr(torch.ops.sacl_fast, "augment", blurs_more)
    with pytest.raises(Wrong, match="blurred pixels are off"):
        verify("augment", "cpu", CPU)


@needs_compiled
def test_other_draws_than_numpys_are_wrong(monkeypatch):
    monkeypatch.setattr(views, "agrees_with_numpy", lambda: False)
    with pytest.raises(Wrong, match="does not draw what numpy"):
        verify("draw_views", "cpu", CPU)


def test_of_another_shape_is_wrong():
    def case(here: Here) -> dict[str, Tensor]:
        return {"y": here.images(2, 3 + (here.dtype == torch.float32), 1, 1)}

    with pytest.raises(Wrong, match=r"y is \(2, 4, 1, 1\), not \(2, 3, 1, 1\)"):
        compare(case, CPU, "torch", tuple(TOLERANCES))


def test_the_same_random_numbers_everywhere():
    rounded = Here(CPU, "cpu", torch.bfloat16, torch.bfloat16)
    exact = Here(CPU, "torch", torch.bfloat16, torch.float64)
    for draw in (
        lambda h: h.images(2, 3, 4, 5, shift=1.0),
        lambda h: h.values(7),
        lambda h: h.parameters(2, 3),
        lambda h: h.order(9),
    ):
        assert torch.equal(draw(rounded).double(), draw(exact).double())


def test_triton_is_for_gpus():
    if torch.cuda.is_available():
        assert triton_obstacle(CUDA) is None
    assert triton_obstacle(CPU)
