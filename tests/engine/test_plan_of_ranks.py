"""``engine.plan auto`` among ranks: all take the same plan, whatever is wrong on one of them. Two
gloo ranks on the CPU, each with a cache folder of its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from sacl_fast.config import Config
from sacl_fast.config.choices import Plan
from sacl_fast.engine import agreement, distributed
from sacl_fast.engine import plan as module
from sacl_fast.engine.agreement import passes_of_all
from sacl_fast.engine.distributed import Ranks, process_group
from sacl_fast.engine.method import build_method, build_networks
from sacl_fast.engine.plan import Trial, take_plan, try_plans
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import OtherRankFailed, UserError
from sacl_fast.passes import Passes
from tests.engine.ranks import free_port

PLANS: tuple[Plan, ...] = ("eager", "dense+mask")


def step_of(config: Config, ranks: Ranks) -> TrainingStep:
    torch.manual_seed(0)
    networks = build_networks(config)
    passes = passes_of_all(config, ranks, steps_per_epoch=100, encoder=networks.encoder)
    method = build_method(config, passes, networks)
    return TrainingStep(method, config, ranks, steps_per_epoch=100)


def changed(monkeypatch: Any, change: Callable[[Tensor, bool], Tensor]) -> None:
    """What the dense encoder of 'dense+mask' gives; told whether norms are of all ranks."""
    run = Passes.dense_encoder

    def dense_encoder(own: Passes, slicer: Any) -> Any:
        encoder = run(own, slicer)
        if own.plan != "dense+mask":
            return encoder
        norm = next(m for m in slicer.encoder.modules() if hasattr(m, "synchronize"))
        return lambda x: change(encoder(x), norm.synchronize)

    monkeypatch.setattr(Passes, "dense_encoder", dense_encoder)


def fail(when: bool, x: Tensor) -> Tensor:
    if when:
        raise RuntimeError("no kernel")
    return x


def tried(config: Config, ranks: Ranks) -> list[str]:
    return [str(trial) for trial in try_plans(config, step_of(config, ranks), PLANS)]


def all_is_well(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    step = step_of(config, ranks)
    before = [t.clone() for t in (*step.method.parameters(), *step.method.buffers())]
    trials: list[Trial] = []

    def told(config: Config, step: TrainingStep) -> list[Trial]:
        trials.extend(try_plans(config, step, PLANS))
        return trials

    monkeypatch.setattr(module, "try_plans", told)
    take_plan(config, step, None)
    after = [*step.method.parameters(), *step.method.buffers()]
    assert all(map(torch.equal, before, after))
    resumed = step_of(config, ranks)
    take_plan(config, resumed, "dense+mask")
    times = [trial.milliseconds for trial in trials]
    return times, step.method.passes.plan, resumed.method.passes.plan


def it_fails_on_rank_1(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    changed(monkeypatch, lambda z, _: fail(ranks.rank == 1, z))
    return tried(config, ranks)


def it_is_wrong_on_rank_1(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    rows = torch.linspace(1, 1.5, config.batch_size // 2)[:, None]
    changed(monkeypatch, lambda z, _: z * rows if ranks.rank == 1 else z)
    return tried(config, ranks)


def it_fails_on_all_together(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    changed(monkeypatch, lambda z, synchronized: fail(synchronized, z))
    return tried(config, ranks)


def time_is_up_on_rank_1(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    monkeypatch.setattr(module, "_SECONDS", -1.0 if ranks.rank == 1 else math.inf)
    step, reference = step_of(config, ranks), module.why_not_tried
    monkeypatch.setattr(
        module, "why_not_tried", lambda p, *a: None if p == "eager" else reference(p, *a)
    )
    return [str(trial) for trial in try_plans(config, step, PLANS)]


def rank_0_remembers(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    monkeypatch.setattr(module, "try_plans", lambda *_: pytest.fail("nothing is to be tried"))
    step = step_of(config, ranks)
    plan = "dense+mask" if ranks.first else "dense+skip"
    module._remember({module._key(config, step): plan})
    take_plan(config, step, None)
    return step.method.passes.plan


def what_is_remembered_cannot_be_on_rank_1(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    own = module.plan_obstacle
    monkeypatch.setattr(
        module,
        "plan_obstacle",
        lambda plan, *a: "no" if (ranks.rank, plan) == (1, "dense+mask") else own(plan, *a),
    )
    monkeypatch.setattr(module, "try_plans", lambda *_: [Trial("dense+skip", 1.0)])
    step = step_of(config, ranks)
    take_plan(config, step, None)
    cached = json.loads((Path(os.environ["XDG_CACHE_HOME"]) / "sacl-fast/plans.json").read_text())
    return step.method.passes.plan, cached[module._key(config, step)]


def operators_fail_on_rank_1(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    own = agreement.choose_passes

    def choose(*arguments: Any, **named: Any) -> Passes:
        passes = own(*arguments, **named)
        return replace(passes, mode="skip" if ranks.first else "mask")

    monkeypatch.setattr(agreement, "choose_passes", choose)
    networks = build_networks(config)
    return passes_of_all(config, ranks, steps_per_epoch=100, encoder=networks.encoder).reason


def it_fails_on_rank_1_while_the_other_waits(config: Config, ranks: Ranks, monkeypatch: Any) -> Any:
    monkeypatch.setattr(distributed, "_FAILING", 1.0)
    changed(monkeypatch, lambda z, synchronized: fail(ranks.rank == 1 and synchronized, z))
    return tried(config, ranks)


SCENES = (
    all_is_well,
    it_fails_on_rank_1,
    it_is_wrong_on_rank_1,
    it_fails_on_all_together,
    time_is_up_on_rank_1,
    rank_0_remembers,
    what_is_remembered_cannot_be_on_rank_1,
    operators_fail_on_rank_1,
    it_fails_on_rank_1_while_the_other_waits,
)


def play(rank: int, port: int, config: Config, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "XDG_CACHE_HOME": f"{folder}/cache {rank}"}
    for scene in SCENES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(module, "_may_try", lambda step: True)
            monkeypatch.setattr(module, "_SECONDS", math.inf)
            monkeypatch.setattr(module, "_WARM_UP", 3 if scene is all_is_well else 1)
            monkeypatch.setattr(module, "_TIMED", 1)
            try:
                with process_group("cpu") as ranks:
                    outcome = scene(config, ranks, monkeypatch)
            except (UserError, OtherRankFailed) as error:
                outcome = f"{type(error).__name__}: {error}"
        Path(folder, f"{scene.__name__} {rank}").write_text(json.dumps(outcome))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Callable[[Callable[..., Any]], list[Any]]:
    from tests.tiny import tiny_run

    folder = tmp_path_factory.mktemp("plans")
    config = tiny_run(folder, folder / "run")
    config = replace(config, slim=replace(config.slim, refresh_steps=0))
    mp.spawn(play, (free_port(), config, str(folder)), nprocs=2)
    return lambda scene: [
        json.loads((folder / f"{scene.__name__} {rank}").read_text()) for rank in (0, 1)
    ]


def test_all_take_the_fastest_on_the_slowest_rank(outcomes):
    ours, theirs = outcomes(all_is_well)
    assert ours == theirs
    times, taken, resumed = ours
    assert None not in times and taken == PLANS[times.index(min(times))]
    assert resumed == "dense+mask"


@pytest.mark.parametrize(
    ("scene", "why"),
    [
        (it_fails_on_rank_1, "dense+mask not (RuntimeError: no kernel)"),
        (it_is_wrong_on_rank_1, "dense+mask not (its embeddings are off by "),
        (it_fails_on_all_together, "dense+mask not (RuntimeError: no kernel)"),
        (time_is_up_on_rank_1, "dense+mask not (no time left of "),
    ],
)
def test_what_one_rank_cannot_do_none_does(outcomes, scene, why):
    ours, theirs = outcomes(scene)
    assert ours == theirs
    assert ours[1].startswith(why)


def test_rank_0_remembers(outcomes):
    assert outcomes(rank_0_remembers) == ["dense+mask"] * 2
    found = outcomes(what_is_remembered_cannot_be_on_rank_1)
    assert found[0] == ["dense+skip", "dense+skip"], "which rank 0 remembers from then on"
    assert found[1] == ["dense+skip", "dense+skip"]


def test_the_same_passes_where_operators_differ(outcomes):
    assert outcomes(operators_fail_on_rank_1) == ["operators cannot be used on all ranks"] * 2


def test_a_failure_that_others_cannot_know_of_ends_the_run(outcomes):
    waiting, failed = outcomes(it_fails_on_rank_1_while_the_other_waits)
    assert failed.startswith("UserError: trying engine.plan dense+mask failed on rank 1 and not on")
    assert failed.endswith("--engine.plan eager works")
    assert waiting.startswith("OtherRankFailed: rank 1 failed: trying engine.plan dense+mask")
