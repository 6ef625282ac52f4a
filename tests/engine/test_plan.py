"""``engine.plan auto``: what is tried, what is left out and why, what is remembered and resumed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from sacl_fast.config import EngineConfig, SlimConfig
from sacl_fast.config.choices import Plan
from sacl_fast.engine import plan as module
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.plan import Trial, take_plan, try_plans
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from sacl_fast.passes import Passes, choose_passes

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_may_try", lambda step: True)
    monkeypatch.setattr(module, "_SECONDS", math.inf)  # however busy this machine is
    return tmp_path / "cache/sacl-fast/plans.json"


def step_of(config) -> TrainingStep:
    torch.manual_seed(0)
    method = build_method(config, choose_passes(config, CPU.device, steps_per_epoch=100))
    return TrainingStep(method, config, CPU, steps_per_epoch=100)


def state_of(step):
    found = [*step.method.parameters(), *step.method.buffers(), torch.random.get_rng_state()]
    return [t.detach().clone() for t in found]


def test_every_plan_is_tried_and_nothing_is_changed(tiny):
    step = step_of(tiny)
    before, passes = state_of(step), step.method.passes
    trials = {trial.plan: trial for trial in try_plans(tiny, step)}
    assert list(trials) == list(get_args(Plan))
    assert trials["compile"].why_not == "it takes longer to compile than all others to try"
    if compiled.obstacle() is None:
        assert all(t.milliseconds for plan, t in trials.items() if plan != "compile"), trials
    assert all(map(torch.equal, before, state_of(step)))
    assert all(p.grad is None for p in step.method.parameters())
    assert step.method.passes == passes


def test_a_plan_that_is_wrong_is_left_out(tiny, monkeypatch):
    step, run = step_of(tiny), Passes.slim_encoder
    monkeypatch.setattr(
        Passes,
        "slim_encoder",
        lambda own, slicer: (
            (lambda x: run(own, slicer)(x) * torch.linspace(1, 1.5, x.shape[0]).view(-1, 1))
            if own.plan == "dense+mask"
            else run(own, slicer)
        ),
    )
    eager, wrong = try_plans(tiny, step, ("eager", "dense+mask"))
    assert eager.milliseconds is not None
    assert wrong.milliseconds is None
    assert wrong.why_not.startswith("its embeddings are off by ")


def failing(monkeypatch, plan, error):
    run = Passes.dense_encoder

    def fail(x):
        raise error

    def dense_encoder(own, slicer):
        return fail if own.plan == plan else run(own, slicer)

    monkeypatch.setattr(Passes, "dense_encoder", dense_encoder)


def test_a_plan_that_fails_is_left_out(tiny, monkeypatch):
    failing(monkeypatch, "dense+mask", RuntimeError("no kernel for this device\nand more"))
    step = step_of(tiny)
    eager, failed = try_plans(tiny, step, ("eager", "dense+mask"))
    assert eager.milliseconds is not None
    assert str(failed) == "dense+mask not (RuntimeError: no kernel for this device)"
    assert step.method.passes.plan == "eager"


def test_a_plan_that_takes_the_gpu_with_it_is_named(tiny, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel")
    failing(monkeypatch, "dense+mask", error)
    with pytest.raises(UserError, match=r"engine.plan dense\+mask.*--engine.plan eager works"):
        try_plans(tiny, step_of(tiny), ("eager", "dense+mask"))


def test_the_reference_is_not_left_out(tiny, monkeypatch):
    failing(monkeypatch, "eager", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        try_plans(tiny, step_of(tiny))


def test_slim_mode_bounds_what_is_tried(tiny):
    config = replace(tiny, slim=SlimConfig(mode="mask"))
    left_out = {t.plan: t.why_not for t in try_plans(config, step_of(config)) if t.why_not}
    assert left_out["dense+skip"] == left_out["fused"] == "slim.mode is mask"
    assert "dense+mask" not in left_out


def test_the_fastest_is_taken_and_remembered(tiny, cache, monkeypatch):
    calls = []

    def tried(config, step):
        calls.append(config)
        return [
            Trial("eager", 9.0),
            Trial("compile", None, "no"),
            Trial("dense+mask", 4.0),
            Trial("fused", None, "RuntimeError: it fails"),
        ]

    monkeypatch.setattr(module, "try_plans", tried)
    step = step_of(tiny)
    take_plan(tiny, step, None)
    assert step.method.passes.plan == "dense+mask"
    assert step.method.passes.reason == (
        "tried: eager 9.0 ms, compile not (no), dense+mask 4.0 ms, "
        "fused not (RuntimeError: it fails)"
    )
    assert list(json.loads(cache.read_text()).values()) == ["dense+mask"]
    again = step_of(tiny)
    take_plan(tiny, again, None)
    assert again.method.passes.plan == "dense+mask"
    assert "remembers" in again.method.passes.reason
    larger = replace(tiny, batch_size=32)
    take_plan(larger, step_of(larger), None)
    assert len(calls) == 2, "of other shapes it is not known"
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}'])
def test_a_damaged_memory_is_none(tiny, cache, content, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    monkeypatch.setattr(module, "try_plans", lambda config, step: [Trial("eager", 9.0)])
    step = step_of(tiny)
    take_plan(tiny, step, None)
    assert step.method.passes.plan == "eager"
    assert "eager" in json.loads(cache.read_text()).values()


def test_a_resumed_run_keeps_its_plan(tiny, monkeypatch):
    monkeypatch.setattr(module, "try_plans", lambda *_: pytest.fail("nothing is to be tried"))
    step = step_of(tiny)
    take_plan(tiny, step, "dense+mask")
    assert step.method.passes.plan == "dense+mask"
    assert step.method.passes.reason == "as before it was resumed"


def test_a_plan_that_was_asked_for_is_not_tried(tiny, monkeypatch):
    monkeypatch.setattr(module, "try_plans", lambda *_: pytest.fail("nothing is to be tried"))
    config = replace(tiny, engine=EngineConfig(plan="dense+mask"))
    step = step_of(config)
    take_plan(config, step, "eager")
    assert step.method.passes.plan == "dense+mask"
