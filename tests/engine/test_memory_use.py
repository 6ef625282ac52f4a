"""Memory foretold from a few images is that of a whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sacl_fast
from sacl_fast.config import (
    Config,
    EncoderConfig,
    EngineConfig,
    OptimConfig,
    ProjectorConfig,
    SlimConfig,
)
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine import dry_run
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.memory_use import (
    Forecast,
    LiveBytes,
    forecast,
    memory_here,
    peak_memory,
    trace,
)
from sacl_fast.engine.method import build_method, build_networks
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
    networks = build_networks(config)
    passes = choose_passes(config, CPU, steps_per_epoch=100, encoder=networks.encoder)
    method = build_method(config, passes, networks)
    step = TrainingStep(method, config, Ranks(0, 1, CPU), steps_per_epoch=100)
    return int(trace(step, config, config.batch_size)[0].max())


MASK = SlimConfig(mode="mask")
RECOMPUTING = EngineConfig(activation_checkpointing=True)


@pytest.mark.parametrize(
    "config",
    [
        config_of("mobilenetv1_100", 32, 32),
        config_of("mobilenetv3_large_100", 48, 16, engine=EngineConfig(accumulate=4), slim=MASK),
        config_of("resnet18", 32, 16, precision="bf16"),
        config_of("resnet18", 64, 8, engine=RECOMPUTING, slim=MASK),
        config_of("vit_tiny_patch16_224", 32, 64, slim=MASK, optim=OptimConfig(name="adamw")),
    ],
    ids=lambda c: f"{c.encoder.name}-{c.batch_size}x{c.views.size}",
)
def test_a_forecast_comes_true(config):
    expected = forecast(config, CPU).peak(config.batch_size, config.engine.accumulate)
    assert expected == pytest.approx(measured(config), rel=0.05)


def of(*, image: int = 0, world_size: int = 1, batches: int = 0) -> Forecast:
    """Of a step whose peak is in backward for a few images, and in forward for many."""
    return Forecast(
        plan="eager",
        state=100,
        fixed=torch.tensor([100.0, 200.0]),
        per_image=torch.tensor([20.0, 1.0]),
        image=image,
        world_size=world_size,
        embedding=3,
        batches=batches,
    )


def test_the_peak_of_many_images_is_elsewhere():
    factors = 8 * 10 * 10
    assert of().peak(2) == 202 + 32 and of().peak(10) == 300 + factors
    assert of().peak(20, parts=2) == 300 + factors
    assert of(image=7).peak(20, parts=2) == 300 + factors + 10 * 7
    assert of(image=7, batches=2).peak(10) == 300 + factors + 20 * 7
    assert of(world_size=4).peak(10) == 300 + 4 * factors + 3 * 10 * 2 * 3


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
    ("gib", "ways"),
    [
        (9.0, []),
        (4.0, ["accumulate 2", "activation-checkpointing", "batch-size 32"]),
        (2.0, ["accumulate 4", "batch-size 16"]),
        (0.1, ["nor would less of a batch"]),
    ],
)
def test_what_does_not_fit_and_what_would(monkeypatch, gib, ways):
    """8 GiB for 64 images, and 3 GiB where activations are computed again."""

    def foretold(config: Config, device: torch.device, world_size: int, **_: int) -> Forecast:
        total = 3 if config.engine.activation_checkpointing else 8
        per_image = torch.tensor([total * 2**30 / 64])
        return replace(of(), fixed=torch.zeros(1), per_image=per_image, embedding=0)

    room = int(gib * 2**30) + dry_run._RUNTIME + 2**20
    monkeypatch.setattr(dry_run, "forecast", foretold)
    monkeypatch.setattr(dry_run, "memory_here", lambda device: (room, room))
    lines = list(dry_run._memory(config_of("resnet20", 32, 64), 1, 100))
    assert lines[0][1].startswith("8.00 GiB per process, estimated")
    assert bool(lines[2:]) == bool(ways)
    for way in ways:
        assert way in lines[2][1]
    assert len(ways) == lines[-1][1].count(" or ") + bool(ways)
