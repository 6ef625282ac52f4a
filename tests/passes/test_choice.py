"""How the passes of a run are run: the rule, the plans, and that all compute the same."""

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import nn

from sacl_fast.config import Config, EngineConfig, SlimConfig
from sacl_fast.config.choices import Plan, SlimMode
from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from sacl_fast.ops.backend import of_slim_operators, resolve_all
from sacl_fast.passes import (
    Passes,
    RecordedEncoder,
    choice,
    choose_passes,
    passes_of,
    plan_obstacle,
)
from sacl_fast.slim import Slicer
from tests.modules import channels_last

CPU = torch.device("cpu")


def chosen(steps_per_epoch=1, encoder: nn.Module | None = None, /, **changes) -> Passes:
    config = Config(**changes)
    return choose_passes(config, CPU, steps_per_epoch=steps_per_epoch, encoder=encoder)


def test_slim_passes_are_recorded_where_that_pays():
    skip = SlimConfig(mode="skip")
    assert chosen(30, slim=skip).recorded
    assert not chosen(29, slim=skip).recorded
    assert not chosen(1000, slim=replace(skip, refresh_steps=29)).recorded
    assert chosen(1, slim=replace(skip, refresh_steps=30)).recorded
    assert not chosen(1000, slim=SlimConfig(mode="mask")).recorded


def test_dense_passes_are_recorded_too_where_that_pays_on_a_cpu():
    """Of an encoder with depthwise convolutions, on the compiled operators."""
    mobile = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    recorded = chosen(1000).recorded  # where the compiled module is built
    assert chosen(1000, mobile).plan == ("dense+skip" if recorded else "eager")
    for groups in (1, 2):
        plain = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(1, 8, 3))
        assert chosen(1000, plain).plan == "eager"
    assert chosen(29, mobile).plan == "eager"
    others: tuple[dict[str, Any], ...] = (
        {"precision": "bf16"},
        {"backend": "torch"},
        {"channels_last": False},
        {"deterministic": True},
        {"slim": SlimConfig(mode="mask")},
        {"slim": SlimConfig(mode="skip")},
        {"engine": EngineConfig(plan="eager")},
    )
    for other in others:
        assert chosen(1000, mobile, **other).plan == "eager"


@pytest.mark.parametrize("mode", ["mask", "skip"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mode_that_is_asked_for_is_taken(mode, precision):
    passes = chosen(slim=SlimConfig(mode=mode), precision=precision, backend="torch")
    assert (passes.mode, passes.reason, passes.backend) == (mode, "as requested", "torch")


def test_auto_skips_where_that_is_the_faster_one():
    operators = of_slim_operators(resolve_all("auto", CPU))
    passes = chosen()
    assert passes.backend == operators.for_calls
    assert passes.mode == ("skip" if operators.backend == "cpu" else "mask")
    assert "the faster one on the compiled CPU operators" in passes.reason
    for other in ({"precision": "bf16"}, {"backend": "torch"}, {"channels_last": False}):
        slower = chosen(1000, **other)
        assert (slower.mode, slower.recorded) == ("mask", False)
        assert slower.reason.startswith("skip is the faster one on the compiled CPU operators, in")


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_what_runs_is_what_was_chosen(mode, monkeypatch):
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
    slicer = Slicer(encoder, 0.5)
    x = torch.randn(2, 3, 8, 8)
    with slicer.mode("mask"):
        expected = encoder(x)
    modes, enter = [], Slicer.mode
    monkeypatch.setattr(Slicer, "mode", lambda self, own: modes.append(own) or enter(self, own))
    run = Passes(mode, backend="torch").slim_encoder(slicer)
    torch.testing.assert_close(run(x), expected)
    assert modes == [mode]
    assert slicer.backend == "torch"
    assert isinstance(Passes("skip", recorded=True).slim_encoder(slicer), RecordedEncoder)


def planned(plan, **changes) -> Passes:
    return chosen(100, engine=EngineConfig(plan=plan), **changes)


def test_what_the_plans_are():
    if compiled.obstacle():
        pytest.skip("the operators are not compiled")
    assert planned("auto") == chosen(100)
    found = {plan: planned(plan) for plan in get_args(Plan)}
    assert {plan: (p.dense, p.mode, p.recorded, p.fused) for plan, p in found.items()} == {
        "eager": ("eager", "skip", True, "none"),
        "compile": ("compiled", "mask", False, "none"),
        "dense+mask": ("recorded", "mask", False, "none"),
        "dense+skip": ("recorded", "skip", True, "none"),
        "fused": ("recorded", "skip", True, "all"),
    }
    assert all(p.plan == plan for plan, p in found.items())
    assert all(p.reason == "as requested" for plan, p in found.items() if plan != "eager")


@pytest.mark.parametrize("changes", [{}, {"channels_last": False}])
def test_on_a_gpu_norms_are_fused_around_products(changes, monkeypatch):
    if compiled.obstacle():
        pytest.skip("the operators are not compiled")
    monkeypatch.setattr(choice, "resolve_all", lambda backend, _: resolve_all(backend, CPU))
    monkeypatch.setattr(choice, "fused_obstacle", lambda *_, **__: None)
    gpu, config = torch.device("cuda"), Config(**changes)
    passes = passes_of("dense+skip", config, gpu, steps_per_epoch=100)
    assert passes.fused == ("none" if changes else "around")
    assert passes_of("dense+mask", config, gpu, steps_per_epoch=100).fused == "none"


@pytest.mark.parametrize("changes", [{"backend": "torch"}, {"channels_last": False}])
def test_a_plan_that_cannot_be_says_which_can(changes):
    with pytest.raises(UserError) as caught:
        planned("fused", **changes)
    assert "engine.plan fused cannot be used here (" in str(caught.value)
    assert "what works: eager, compile, dense+mask, dense+skip" in str(caught.value)


def test_a_plan_and_another_slim_mode_contradict_one_another():
    pairs: list[tuple[Plan, SlimMode]] = [
        *(("dense+mask", "skip"), ("fused", "mask"), ("compile", "skip")),
    ]
    for plan, mode in pairs:
        with pytest.raises(UserError, match=f"engine.plan {re.escape(plan)} runs the slim passes"):
            planned(plan, slim=SlimConfig(mode=mode))
    assert planned("dense+skip", slim=SlimConfig(mode="skip")).mode == "skip"


@pytest.mark.parametrize("plan", get_args(Plan))
def test_every_plan_computes_the_same(plan, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    encoder = channels_last(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            *(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
    )
    config = Config(engine=EngineConfig(plan=plan))
    if plan == "fused" and plan_obstacle(plan, config, CPU):
        pytest.skip("the operators are not compiled")
    passes = passes_of(plan, config, CPU, steps_per_epoch=100)
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    found = []
    for own in (passes, Passes()):
        slicer = Slicer(copy.deepcopy(encoder), 0.5)
        for run in (own.dense_encoder(slicer), own.slim_encoder(slicer)):
            for _ in range(3):  # recorded, and from the recording
                found.append(run(x))
                found[-1].square().sum().backward()
        found += [p.grad for p in slicer.encoder.parameters()]
        found += [b for b in slicer.encoder.buffers()]
    half = len(found) // 2
    for ours, theirs in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_other_filters_are_not_compiled_anew(monkeypatch):
    """Compiled code is given the masked weights, as it is given the images."""
    compilations = []

    def counted(graph, _):
        compilations.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    encoder = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())
    slicer, passes = Slicer(encoder, 0.5), Passes(dense="compiled")
    dense, slim = passes.dense_encoder(slicer), passes.slim_encoder(slicer)
    x, counts = torch.randn(2, 3, 8, 8), []
    for _ in range(4):
        for run in (dense, slim):
            run(x).sum().backward()
            with torch.no_grad():
                run(x)
        counts.append(len(compilations))
        with torch.no_grad():
            conv.weight.copy_(conv.weight[torch.randperm(8)])
        slicer.refresh()
        with slicer.mode("mask"):
            expected = encoder(x)
        torch.testing.assert_close(slim(x), expected)
    assert counts == [4] * 4  # two encoders, with and without gradient
