"""What becomes of a run where an operator did not pass its self-check."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from sacl_fast.config import Config
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import UserError
from sacl_fast.ops import backend as backends
from sacl_fast.ops import compiled, self_check, self_check_process
from sacl_fast.ops.backend import (
    SLIM_OPERATORS,
    for_slim_calls,
    fused_obstacle,
    of_slim_operators,
    resolve,
    resolve_all,
)
from sacl_fast.ops.batch_norm_act import batch_norm_act
from sacl_fast.ops.slim_add import slim_add
from sacl_fast.passes import choose_passes
from tests.checking import Children, forget

CPU = torch.device("cpu")
needs_compiled = pytest.mark.skipif(
    compiled.obstacle() is not None, reason=str(compiled.obstacle())
)


def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def wrong_sum(children: Children) -> Children:
    children.do(slim_add="error = 'Wrong: float32: y is off by 0.3 of its largest value'")
    return children


@needs_compiled
def test_auto_passes_it_over_and_says_so_once(wrong_sum, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            backend, reason = resolve("auto", "slim_add", CPU)
            assert backend == "torch" and "failed its self-check: Wrong: float32: y" in reason
        given = images(), None, None, images(), None, None
        kernel = torch.ops.sacl_fast.slim_add
        calls = []
        monkeypatch.setattr(
            torch.ops.sacl_fast, "slim_add", lambda *a: calls.append(a) or kernel(*a)
        )
        assert torch.equal(slim_add(*given), slim_add(*given, backend="torch"))
        assert not calls
        slim_add(*given, backend="cpu")  # an order, in a call: it runs
        assert len(calls) == 1
        assert resolve("auto", "slim_gate", CPU).backend == "cpu"
    (line,) = caplog.messages
    assert "slim_add: backend cpu is not used on" in line and "is off by 0.3" in line
    assert "plain PyTorch does it (SACL_FAST_SELF_CHECK=again checks anew)" in line


@needs_compiled
def test_what_could_not_be_checked_is_said_once_for_all(children, monkeypatch, caplog):
    children.do(start="sys.exit('all CUDA-capable devices are busy')")
    with caplog.at_level(logging.WARNING):
        assert {r.backend for r in resolve_all("auto", CPU).values()} == {"torch"}
    (line,) = caplog.messages
    assert "nor what else is not checked, since its self-check could not be done" in line
    assert "devices are busy" in line and "SACL_FAST_SELF_CHECK=off" in line
    monkeypatch.setenv("SACL_FAST_SELF_CHECK", "off")
    assert resolve("auto", "slim_add", CPU).backend == "cpu"


@pytest.mark.parametrize("rank", ["0", "1"])
@needs_compiled
def test_the_first_rank_of_a_machine_says_it(rank, wrong_sum, monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with caplog.at_level(logging.WARNING):
        assert resolve("auto", "slim_add", CPU).backend == "torch"
    assert len(caplog.messages) == (rank == "0")


@needs_compiled
def test_a_run_that_asks_for_it_by_name_is_an_error(wrong_sum, caplog):
    with pytest.raises(UserError, match=r"'cpu' cannot run slim_add .*self-check.*can: torch$"):
        resolve_all("cpu", CPU)
    assert not caplog.messages
    assert resolve_all("torch", CPU)["slim_add"] == ("torch", "as requested")


@needs_compiled
def test_the_other_operators_of_slim_passes_stay(wrong_sum, monkeypatch):
    found = resolve_all("auto", CPU)
    assert [found[op].backend for op in SLIM_OPERATORS] == ["cpu", "cpu", "cpu", "torch", "cpu"]
    assert of_slim_operators(found).backend == "torch"
    assert for_slim_calls(found) == "auto"
    kernel, calls = torch.ops.sacl_fast.batch_norm_act, []
    monkeypatch.setattr(
        torch.ops.sacl_fast, "batch_norm_act", lambda *a: calls.append(a) or kernel(*a)
    )
    batch_norm_act(images(), *torch.ones(2, 4))
    assert calls


def test_plain_pytorch_asks_nothing(children):
    assert resolve_all("torch", CPU)
    assert not children.asked


def test_fused_passes_ask_for_their_operators(children, monkeypatch, caplog):
    """On a GPU; on CPUs they are plain PyTorch."""
    assert fused_obstacle(CPU, products=True) is None and not children.asked
    gpu = torch.device("cuda", 0)
    table = {op: {"cuda": lambda _: None} for op in backends.FUSED_OPERATORS}
    monkeypatch.setattr(backends, "FUSED_OPERATORS", table)
    monkeypatch.setattr(self_check, "_about", lambda _: {"name": "a GPU"})
    monkeypatch.setattr(self_check, "device_name", lambda _: "a GPU")
    children.do(**{"norm_pointwise cuda": "error = 'Wrong: y'"})
    assert fused_obstacle(gpu, products=False) is None
    why_not = fused_obstacle(gpu, products=True)
    assert why_not == "norm_pointwise: it failed its self-check: Wrong: y"
    assert len(children.asked) == 1
    (line,) = caplog.messages
    assert "on a GPU, since it failed" in line and "passes are not fused by it" in line


@needs_compiled
@pytest.mark.usefixtures("anew")
def test_operators_that_are_wrong_in_the_process_that_checks(monkeypatch, caplog, tiny):
    """The real one: an operator has a wrong gradient, one raises, one ends the process. What is
    left trains as plain PyTorch does."""
    broken = """
import os
from sacl_fast.ops import batch_norm_act, slim_add, slim_gate
assert all(of.is_compiled() for of in (batch_norm_act, slim_add, slim_gate))
ops = torch.ops.sacl_fast
own = ops.slim_add_backward
ops.slim_add_backward = lambda *given: tuple(t * 1.01 for t in own(*given))
def no_kernel(*given):
    raise RuntimeError("no kernel image is available\\nCompile with ...")
ops.slim_gate = no_kernel
ops.draw_views = lambda *given: os.abort()
"""
    monkeypatch.setattr(
        self_check_process,
        "_CHILD",
        self_check_process._CHILD.replace("import torch\n", f"import torch\n{broken}"),
    )
    expected = {
        "slim_add": "Wrong: float32: gradient of a is off by 0.01 of its largest value",
        "slim_gate": "RuntimeError: no kernel image is available",
        "draw_views": "its process ended by SIGABRT",
    }
    with caplog.at_level(logging.WARNING):
        first = resolve_all("auto", CPU)
        assert resolve_all("auto", CPU) == first
    for op, resolution in first.items():
        if op in expected:
            assert resolution.backend == "torch"
            assert resolution.reason.endswith(f"cpu: it failed its self-check: {expected[op]}")
        elif op not in ("xcorr_loss", "lars"):
            assert resolution.backend == "cpu"
    assert len(caplog.messages) == 3
    forget(monkeypatch)
    monkeypatch.setattr(self_check_process, "_CHILD", "raise SystemExit")
    assert resolve_all("auto", CPU) == first
    assert losses(tiny) == losses(replace(tiny, backend="torch"))  # both by masks
    skip = replace(tiny, slim=replace(tiny.slim, mode="skip"))
    torch.testing.assert_close(
        losses(skip), losses(replace(skip, backend="torch")), rtol=1e-4, atol=0
    )


@pytest.mark.gpu
def test_all_pass_on_this_gpu():
    gpu = torch.device("cuda", 0)
    for table in (backends.OPERATORS, backends.FUSED_OPERATORS):
        for op, checks in table.items():
            for backend, check in checks.items():
                if check(gpu) is None:
                    outcome = backends.outcome_of_self_check(op, backend, gpu)
                    assert outcome.state == "passed", (op, str(outcome))


@pytest.mark.gpu
@pytest.mark.usefixtures("anew")
def test_a_kernel_that_loses_the_gpu_loses_it_for_the_process_that_checks(monkeypatch):
    if compiled.cuda_obstacle(torch.device("cuda", 0)):
        pytest.skip("there is no code for this GPU")
    broken = """
from sacl_fast.ops import slim_gate
assert slim_gate.is_compiled()
def out_of_range(x, *given):
    return torch.zeros(2, device=x.device)[torch.tensor([9], device=x.device)]
torch.ops.sacl_fast.slim_gate = out_of_range
"""
    monkeypatch.setattr(
        self_check_process,
        "_CHILD",
        self_check_process._CHILD.replace("import torch\n", f"import torch\n{broken}"),
    )
    resolutions = resolve_all("auto", torch.device("cuda", 0))
    assert resolutions.pop("slim_gate").backend == "torch"
    assert "torch" not in [resolutions[op].backend for op in SLIM_OPERATORS if op in resolutions]
    assert torch.ones(2, device="cuda").sum().item() == 2


def break_there(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process that checks run this first."""
    script = self_check_process._CHILD.replace("import torch\n", f"import torch\n{how}")
    monkeypatch.setattr(self_check_process, "_CHILD", script)


def losses(config: Config) -> list[float]:
    """Of three steps."""
    torch.manual_seed(0)
    passes = choose_passes(config, CPU, steps_per_epoch=100)
    method = build_method(config, passes)
    step = TrainingStep(method, config, Ranks(0, 1, CPU), steps_per_epoch=100)
    shape = (2, config.batch_size, 3, config.views.size, config.views.size)
    a, b = (v.contiguous(memory_format=torch.channels_last) for v in torch.randn(shape))
    return [step(a, b, i).loss.item() for i in range(3)]
