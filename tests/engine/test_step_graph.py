"""Steps captured as one CUDA graph, on the CPU: the graph is a list of the operators that ran, and
a replay runs them again on the same tensors, as a device would. Whatever a step took from the host
but its views, its number and its learning rate would be that of the captured step."""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sacl_fast.config import EngineConfig, OptimConfig, SlimConfig
from sacl_fast.engine import cuda_graph
from sacl_fast.engine.cuda_graph import StepGraph, wants_graph
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.plan import try_plans
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import UserError
from sacl_fast.passes import choose_passes, passes_of
from sacl_fast.slim import channels

CPU = Ranks(0, 1, torch.device("cpu"))


class Tape(TorchDispatchMode):
    """The operators that run, with what they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out, torch.is_grad_enabled()))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out, grad in self.calls:
            # Some convolutions are other ones where gradients are enabled.
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(grad):
                again = func(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                    old.detach().copy_(new)


class NoChange(TorchDispatchMode):
    """As on the tape, autograd finds tensors shared, and adds and lays out in the same order."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Emulated:
    """``Graphs`` of a step on the CPU."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.captures = 0
        self.breaks = lambda tape: None
        self.fine_elsewhere = True

    def beside(self, function):
        with NoChange():
            return function()

    def capture(self, function):
        self.captures += 1
        tape, state = Tape(), cuda_graph._State(self.step)
        with tape:
            result = function()
        state.restore()  # nothing is computed while a graph is captured
        self.breaks(tape)
        return tape.replay, result

    def agreed(self, fine):
        return fine and self.fine_elsewhere

    def wait(self):
        pass


def step_of(config, *, graph: bool) -> TrainingStep:
    torch.manual_seed(0)
    passes = choose_passes(config, CPU.device, steps_per_epoch=100)
    step = TrainingStep(build_method(config, passes), config, CPU, steps_per_epoch=4)
    if graph:
        step.graph = StepGraph(step, Emulated(step))  # type: ignore[arg-type]
    torch.manual_seed(1)
    return step


def views_of(config, count):
    generator = torch.Generator().manual_seed(2)
    size = config.views.size
    shape = (count, 2, config.batch_size, 3, size, size)
    for a, b in torch.randn(shape, generator=generator):
        yield tuple(v.contiguous(memory_format=torch.channels_last) for v in (a, b))


def trained(config, *, graph, steps=10, between=lambda step, i: None):
    step = step_of(config, graph=graph)
    losses = []
    for i, (a, b) in enumerate(views_of(config, steps)):
        between(step, i)
        with contextlib.nullcontext() if graph else NoChange():
            loss, parts, z1 = step(a, b, i)
        losses.append(torch.stack([loss, *parts, z1.sum()]).clone())
    return step, torch.stack(losses)


def assert_same(config, **options):
    plain, expected = trained(config, graph=False, **options)
    step, losses = trained(config, graph=True, **options)
    assert torch.equal(losses, expected)
    own, other = step.method.state_dict(), plain.method.state_dict()
    assert all(torch.equal(own[k], other[k]) for k in own if isinstance(own[k], Tensor))
    assert step.graph is not None
    return step.graph


@pytest.mark.parametrize("plan", ["eager", "dense+mask", "dense+skip", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_train_as_steps_do(tiny, plan, precision, monkeypatch):
    monkeypatch.setattr("sacl_fast.passes.choice.plan_obstacle", lambda *_: None)
    config = replace(tiny, epochs=50, precision=precision, engine=EngineConfig(plan=plan))
    graph = assert_same(config)
    assert graph.replays == 5  # after four steps of warm-up and the one that is captured


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_random_numbers_adamw_and_a_learning_rate_that_changes(tiny, mode):
    config = replace(
        tiny,
        encoder=replace(tiny.encoder, name="efficientnet_b0", width=0.25, drop_path=0.5),
        optim=OptimConfig(name="adamw", lr=0.01, warmup_epochs=1),
        slim=SlimConfig(mode=mode),
        epochs=3,
    )
    assert assert_same(config).replays == 5


@pytest.mark.parametrize(("mode", "captures"), [("mask", 2), ("skip", 3)])
def test_captured_anew_where_sizes_change(tiny, mode, captures):
    def between(step, i):
        step.method.slicer.enabled = i >= 7
        if i == 14:
            step.method.slicer.refresh()

    config = replace(tiny, slim=SlimConfig(mode=mode), epochs=50)
    graph = assert_same(config, steps=21, between=between)
    assert isinstance(graph.graphs, Emulated) and graph.graphs.captures == captures


def test_filters_that_change_often(tiny, caplog):
    caplog.set_level(logging.INFO, "sacl_fast")
    config = replace(tiny, slim=SlimConfig(mode="skip", refresh_steps=10), epochs=50)
    assert assert_same(config).replays == 0
    assert "refresh_steps is 10" in caplog.text


def test_another_shape_of_the_views_and_back(tiny):
    config = replace(tiny, epochs=50)
    step = step_of(config, graph=True)
    for i, (a, b) in enumerate(views_of(config, 14)):
        half = slice(0, config.batch_size // 2 if i == 6 else None)
        loss, _, z1 = step(a[half], b[half], i)
        assert loss.isfinite() and len(z1) == len(a[half])
    assert step.graph is not None and step.graph.replays == 1 + 2


def fails(tape):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def does_nothing(tape):
    tape.replay = lambda: None


@pytest.mark.parametrize("fault", [fails, does_nothing])
def test_a_graph_that_fails_or_is_wrong_is_given_up(tiny, fault, caplog):
    config = replace(tiny, epochs=50)
    _, expected = trained(config, graph=False)

    def between(step, i):
        step.graph.graphs.breaks = fault

    step, losses = trained(config, graph=True, between=between)
    assert torch.equal(losses, expected)
    assert step.graph.replays == 0
    assert ("cannot be captured" if fault is fails else "a replay gives another") in caplog.text
    assert "and more" not in caplog.text


def test_ranks_replay_together_or_not_at_all(tiny, caplog):
    def between(step, i):
        if step.graph is not None:
            step.graph.graphs.fine_elsewhere = False

    config = replace(tiny, epochs=50)
    assert assert_same(config, steps=6, between=between).replays == 0
    assert "another process cannot capture a step" in caplog.text


def test_what_a_graph_reads_outlives_the_caches(tiny):
    config = replace(tiny, slim=SlimConfig(mode="skip"))
    step = step_of(config, graph=False)
    ((a, b),) = views_of(config, 1)
    for i in range(4):
        step(a, b, i)
    read = cuda_graph._Read()
    with read:
        step.compute(a, b)
    lists = [c.on(CPU.device) for c in step.method.slicer.kept if not c.in_order]
    assert any(t.untyped_storage().data_ptr() in read.tensors for t in lists)
    assert all(p.untyped_storage().data_ptr() in read.tensors for p in step.method.parameters())
    integers = {k: t for k, t in read.tensors.items() if t.dtype == torch.int64 and t.ndim == 1}
    values = {k: t.clone() for k, t in integers.items()}
    del lists
    step.method.run_by(passes_of("eager", config, CPU.device, steps_per_epoch=1))
    for cached in vars(channels).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    step.method.slicer.refresh()
    gc.collect()
    for tensor in integers.values():  # memory that was free would be taken again
        torch.full_like(tensor, -7)
    assert all(torch.equal(integers[k], values[k]) for k in values)


def test_results_of_a_step_are_not_kept(tiny):
    """They would take the memory of all activations for as long as the graph is there."""
    step = step_of(tiny, graph=False)
    ((a, b),) = views_of(tiny, 1)
    step(a, b, 0)
    read = cuda_graph._Read()
    with read:
        step.compute(a, b)
    held = sum(t.untyped_storage().nbytes() for t in read.tensors.values())
    state = [*step.method.parameters(), *step.method.buffers(), a, b]
    momentum = sum(p.nbytes for p in step.method.parameters())
    assert held < 1.1 * (sum(t.nbytes for t in state) + momentum) + 10_000


def test_on_a_cpu_there_is_none(tiny):
    for setting in ("auto", "off"):
        config = replace(tiny, engine=EngineConfig(cuda_graph=setting))
        assert not wants_graph(config, CPU.device, 1)
    config = replace(tiny, engine=EngineConfig(cuda_graph="on"))
    with pytest.raises(UserError, match="cuda_graph is on, but the device is cpu"):
        wants_graph(config, CPU.device, 1)


def test_on_gpus_by_default_on_one(tiny):
    cuda = torch.device("cuda", 0)
    assert wants_graph(tiny, cuda, 1)
    assert not wants_graph(tiny, cuda, 2)
    assert wants_graph(replace(tiny, engine=EngineConfig(cuda_graph="on")), cuda, 2)


@pytest.mark.parametrize("fault", [None, fails])
def test_plans_are_timed_as_they_will_run(tiny, fault):
    step = step_of(tiny, graph=True)
    assert step.graph is not None and isinstance(step.graph.graphs, Emulated)
    step.graph.graphs.breaks = fault or step.graph.graphs.breaks
    trials = try_plans(tiny, step, ("eager", "dense+mask"))
    assert all(trial.milliseconds for trial in trials), trials
    assert step.graph.graphs.captures == 2
