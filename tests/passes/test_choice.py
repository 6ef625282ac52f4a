"""How the slim passes of a run are run is decided once, with the reason."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sacl_fast.config import Config, SlimConfig
from sacl_fast.ops.backend import of_slim_operators, resolve_all
from sacl_fast.passes import Passes, RecordedEncoder, choose_passes
from sacl_fast.slim import Slicer

CPU = torch.device("cpu")


def chosen(steps_per_epoch=1, **changes) -> Passes:
    return choose_passes(Config(**changes), CPU, steps_per_epoch=steps_per_epoch)


def test_slim_passes_are_recorded_where_that_pays():
    skip = SlimConfig(mode="skip")
    assert chosen(30, slim=skip).recorded
    assert not chosen(29, slim=skip).recorded
    assert not chosen(1000, slim=replace(skip, refresh_steps=29)).recorded
    assert chosen(1, slim=replace(skip, refresh_steps=30)).recorded
    assert not chosen(1000, slim=SlimConfig(mode="mask")).recorded


@pytest.mark.parametrize("mode", ["mask", "skip"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mode_that_is_asked_for_is_taken(mode, precision):
    passes = chosen(slim=SlimConfig(mode=mode), precision=precision, backend="torch")
    assert (passes.mode, passes.reason, passes.backend) == (mode, "as requested", "torch")


def test_auto_skips_where_that_is_the_faster_one():
    compiled = of_slim_operators(resolve_all("auto", CPU))
    passes = chosen()
    assert passes.backend == compiled.for_calls
    assert passes.mode == ("skip" if compiled.backend == "cpu" else "mask")
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
