"""What is decided for an Apple GPU. There is none here: what PyTorch does on it is not tested."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sacl_fast.config import Config, EngineConfig
from sacl_fast.data.loading.open import resolve_loader
from sacl_fast.engine import distributed, memory_use
from sacl_fast.engine.checkpoint import random_state, restore_random_state
from sacl_fast.engine.clock import Clock, HostEvent
from sacl_fast.engine.cuda_graph import wants_graph
from sacl_fast.engine.distributed import device_name, pick_device
from sacl_fast.errors import UserError
from sacl_fast.ops.backend import resolve_all
from sacl_fast.passes import choose_passes
from sacl_fast.precision import autocast, autocast_dtype

MPS = torch.device("mps")


def test_a_machine_without_one_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device 'mps' .* no Apple GPU; --device cpu works"):
        pick_device("mps")


def test_one_process_takes_it_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("mps") == MPS and pick_device("auto").type == "cpu"
    assert device_name(MPS) == "Apple GPU"
    monkeypatch.setattr(distributed, "read_launch", lambda: distributed.Launch(0, 2))
    with pytest.raises(UserError, match="one process"):
        pick_device("mps")


def test_nothing_compiled_and_nothing_of_cuda():
    backends = resolve_all("auto", MPS)
    backends.pop("draw_views")  # on the CPU, for any device
    assert {resolution.backend for resolution in backends.values()} == {"torch"}
    config = Config(device="mps")
    assert not wants_graph(config, MPS, 1)
    passes = choose_passes(config, MPS, steps_per_epoch=1000)
    assert (passes.plan, passes.mode, passes.recorded) == ("eager", "mask", False)
    assert Clock(1, MPS)._event is HostEvent
    assert (
        resolve_loader(config, MPS).loader != "dali" or "CPU" in resolve_loader(config, MPS).reason
    )
    for plan in ("dense+mask", "dense+skip", "fused"):
        wanted = replace(config, engine=EngineConfig(plan=plan))
        with pytest.raises(UserError, match=r"float64.*what works: eager, compile"):
            choose_passes(wanted, MPS, steps_per_epoch=1000)
    with pytest.raises(UserError, match="backend 'cpu' cannot run"):
        resolve_all("cpu", MPS)


def test_precision():
    assert autocast_dtype("auto", MPS) is None
    assert autocast_dtype("bf16", MPS) is torch.bfloat16
    with pytest.raises(
        UserError, match="'fp16' needs a CUDA GPU; 'fp32' and 'bf16' work on an App"
    ):
        autocast_dtype("fp16", MPS)
    with autocast(MPS, torch.bfloat16):
        pass
    assert not torch.amp.GradScaler(MPS.type, enabled=False).is_enabled()


def test_memory_and_random_numbers(monkeypatch):
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10)
    assert memory_use.peak_memory(MPS) == {"peak_memory_bytes": 3}
    assert memory_use.memory_here(MPS) == (10, 7)
    given = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.ones(3))
    monkeypatch.setattr(torch.mps, "set_rng_state", given.append)
    state = random_state(MPS)
    restore_random_state(state, MPS)
    assert given[0] is state["mps"]
    assert "mps" not in random_state(torch.device("cpu"))
    restore_random_state(state, torch.device("cpu"))
    assert len(given) == 1
