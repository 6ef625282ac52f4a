"""Memory foretold from a few images is that of a whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sacl_fast
from sacl_fast.config import Config, EncoderConfig, EngineConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine import dry_run
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.memory_use import LiveBytes, forecast, memory_here, peak_memory, trace
from sacl_fast.engine.method import build_method
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes

CPU = torch.device("cpu")


def config_of(name: str, size: int, batch: int, **changes) -> Config:
    config = Config(
        batch_size=batch,
        device="cpu",
        views=replace(CIFAR, size=size),
        encoder=EncoderConfig(name=name),
        projector=ProjectorConfig(hidden=64, out=96),
    )
    return replace(config, **changes)


def measured(config: Config) -> int:
    """Bytes alive at most in a step of the whole batch."""
    torch.manual_seed(0)
    method = build_method(config, choose_passes(config, CPU, steps_per_epoch=100))
    step = TrainingStep(method, config, Ranks(0, 1, CPU), steps_per_epoch=100)
    return int(trace(step, config, config.batch_size)[0].max())


MASK = SlimConfig(mode="mask")


@pytest.mark.parametrize(
    "config",
    [
        config_of("mobilenetv1_100", 32, 32),
        config_of("mobilenetv1_100", 48, 16, engine=EngineConfig(accumulate=4), slim=MASK),
        config_of("mobilenetv3_large_100", 48, 8, engine=EngineConfig(plan="dense+skip")),
        config_of("resnet18", 32, 16, precision="bf16"),
        config_of("resnet18", 64, 8, engine=EngineConfig(activation_checkpointing=True)),
        config_of("vit_tiny_patch16_224", 64, 8, slim=MASK),
        config_of("vit_tiny_patch16_224", 32, 64, optim=sacl_fast.config.OptimConfig(name="adamw")),
    ],
    ids=lambda c: f"{c.encoder.name}-{c.batch_size}x{c.views.size}",
)
def test_a_forecast_comes_true(config):
    expected = forecast(config, CPU).peak(config.batch_size, config.engine.accumulate)
    assert expected == pytest.approx(measured(config), rel=0.05)


def test_processes_share_the_batch_and_exchange():
    expected = forecast(config_of("resnet20", 32, 16), CPU)
    ranks = forecast(config_of("resnet20", 32, 16), CPU, world_size=4)
    assert ranks.peak(16) > expected.peak(16) > ranks.peak(4)
    assert ranks.state > expected.state  # buckets of gradients


def test_bytes_alive():
    x = torch.ones(1000)
    with LiveBytes([x]) as live:
        y = x * 2
        view = y[:10]
        assert live.alive == 8000
        del y
        assert live.alive == 8000  # its memory is the view's, too
        del view
        z = x.clone()
        z.mul_(2)
        assert live.alive == 8000
    assert max(live.trace) == 8000


def test_what_was_taken(monkeypatch, tiny):
    total, free = memory_here(CPU)
    assert 0 < free <= total
    assert 2**26 < peak_memory(CPU)["peak_memory_bytes"] < total
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 6)
    found = peak_memory(torch.device("cuda", 0))
    assert found == {"peak_memory_bytes": 5, "peak_reserved_bytes": 6}
    result = sacl_fast.train(replace(tiny, epochs=1, eval=replace(tiny.eval, every=0)))
    row = next(r for r in read_metrics(result.folder / "metrics.jsonl") if r["kind"] == "train")
    assert row["peak_memory_bytes"] > 2**26


@pytest.mark.parametrize(
    ("share", "says"),
    [(2.0, ""), (0.6, "--engine.activation-checkpointing"), (0.6, "--engine.accumulate 2")],
)
def test_what_does_not_fit_and_what_would(monkeypatch, capsys, tiny, share, says):
    config = replace(config_of("mobilenetv1_100", 32, 64), data=tiny.data)
    peak = forecast(config, CPU).peak(64)
    room = int(share * peak) + dry_run._RUNTIME
    monkeypatch.setattr(dry_run, "memory_here", lambda device: (room, room))
    dry_run.print_dry_run(config)
    said = capsys.readouterr().out
    assert f"{peak / 2**30:.2f} GiB per process, estimated" in said
    assert says in said and ("will not fit" in said) == bool(says)


def test_nothing_fits(monkeypatch, capsys, tiny):
    config = replace(config_of("resnet20", 32, 8), data=tiny.data)
    monkeypatch.setattr(dry_run, "memory_here", lambda device: (1, 1))
    dry_run.print_dry_run(config)
    assert "nor would less of a batch" in capsys.readouterr().out
