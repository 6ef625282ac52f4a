"""Nothing in a step waits for the device, in the first ones and in those run from recordings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sacl_fast.config import EngineConfig, OptimConfig
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes
from tests.waiting import NoWaiting

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("plan", ["eager", "dense+mask", "dense+skip", "fused"])
@pytest.mark.parametrize(("optimizer", "precision"), [("lars", "fp32"), ("adamw", "bf16")])
def test_a_step_waits_for_nothing(tiny, plan, optimizer, precision, monkeypatch):
    monkeypatch.setattr("sacl_fast.passes.choice.plan_obstacle", lambda *_: None)
    config = replace(
        tiny,
        precision=precision,
        optim=OptimConfig(name=optimizer),
        engine=EngineConfig(plan=plan),
    )
    passes = choose_passes(config, CPU.device, steps_per_epoch=100)
    step = TrainingStep(build_method(config, passes), config, CPU, steps_per_epoch=4)
    shape = (2, config.batch_size, 3, config.views.size, config.views.size)
    a, b = (v.contiguous(memory_format=torch.channels_last) for v in torch.randn(shape))
    for i in range(5):
        with NoWaiting():
            step(a, b, i)


@pytest.mark.parametrize(
    "reads",
    [
        torch.Tensor.item,
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        torch.nonzero,
        lambda x: torch.equal(x, x),
        lambda x: x.index_put((x > 0,), torch.zeros(())),
    ],
)
def test_what_waits_is_noticed(reads):
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError)):
        reads(torch.ones(1))
