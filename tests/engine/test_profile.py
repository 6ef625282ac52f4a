"""``--profile``: a trace of some of a run's steps, which changes nothing else about it."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sacl_fast
from sacl_fast.cli import main
from sacl_fast.engine import profiling
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.profiling import Profile, first_profiled
from sacl_fast.engine.regions import REGIONS as ALL
from sacl_fast.errors import UserError
from tests.engine.runs import losses

CPU = torch.device("cpu")
REGIONS = [name for name in ALL if name != "replay"]


@pytest.fixture
def brief(tiny):
    """Nine steps of three epochs, no evaluation between."""
    return replace(
        tiny,
        epochs=3,
        data=replace(tiny.data, labels="none"),
        log=replace(tiny.log, every=100),
        slim=replace(tiny.slim, mode="mask"),
    )


def regions_of(path: Path) -> list[str]:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    found = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    found = sorted(found, key=lambda e: e["ts"])
    return [e["name"] for e in found if e["name"] in REGIONS]


def test_a_profiled_run_is_the_same_run(brief, capsys):
    brief = replace(
        brief,
        engine=replace(brief.engine, plan="dense+skip"),
        slim=replace(brief.slim, mode="auto"),
    )
    sacl_fast.train(brief)
    again = replace(brief, out=f"{brief.out}-2")
    capsys.readouterr()
    result = sacl_fast.train(again, profile=True)
    assert result.finished and losses(again.out) == losses(brief.out)
    # The ninth step is its epoch's last, and evaluations are not profiled.
    path = Path(again.out) / "trace.json.gz"
    assert regions_of(path) == [*REGIONS, "data wait"]
    assert path.stat().st_size < 2**20
    said = capsys.readouterr().out
    assert "profile of steps 9 to 9\n" in said and str(path) in said
    for row in (
        "z2_t slim a",
        "update",
        "operators called, a step",
        "for data, by the host's clock",
    ):
        assert row in said
    assert not torch.autograd.profiler._is_profiler_enabled
    assert not (Path(brief.out) / "trace.json.gz").exists()


def test_steps_are_named_whoever_profiles_them(brief):
    with torch.profiler.profile(acc_events=True) as profiler:
        sacl_fast.train(replace(brief, epochs=1))
    calls = {e.key: e.count for e in profiler.key_averages()}
    assert {name: calls[name] for name in REGIONS} == {
        **dict.fromkeys(REGIONS, 3), "data wait": 4, "reading": 1
    }  # fmt: skip


def test_a_run_that_goes_on_is_profiled(brief, capsys):
    longer = replace(brief, epochs=4)

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sacl_fast.engine.step.TrainingStep.note_nonfinite", stop)
        assert not sacl_fast.train(longer).finished
    sacl_fast.train(replace(longer, resume="auto"), profile=True)
    assert "profile of steps 12 to 12\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("done", "total", "per_epoch", "refresh", "first"),
    [
        (0, 1000, 100, 0, 8),
        (0, 8, 8, 0, None),
        (0, 9, 9, 0, 8),
        (95, 1000, 100, 0, 108),  # passes are recorded anew in an epoch's first steps
        (0, 1000, 100, 10, 8),
        (0, 1000, 100, 3, 8),
        (2, 1000, 100, 10, 18),
        (0, 12, 3, 0, 8),
        (0, 9, 1, 0, 8),
        (995, 1000, 100, 0, None),
    ],
)
def test_where_profiling_begins(done, total, per_epoch, refresh, first):
    assert first_profiled(done, total, per_epoch, refresh) == first


def test_too_short_a_run_is_refused_and_one_that_goes_on_is_not(tiny, capsys, caplog):
    with pytest.raises(UserError, match=r"leaves out the first 8 steps or more.* this run has 6;"):
        sacl_fast.train(tiny, profile=True)
    assert not Path(tiny.out).exists()
    with caplog.at_level(logging.WARNING):
        ranks = Ranks(0, 1, CPU)
        profile = Profile(tiny, Path(tiny.out), ranks, asked=True, done=3, per_epoch=3)
    assert list(profile.over(iter("abc"))) == ["a", "b", "c"]
    assert "this run has 3;" in caplog.text
    assert main(["train", "demo", "--profile", "--data.limit", "64", "--out", tiny.out]) == 2
    assert "this run has 5;" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["full", "no room for a raw trace", "another profiler"])
def test_what_cannot_be_profiled_is_trained(brief, tmp_path, monkeypatch, caplog, trouble):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if trouble == "full":
        monkeypatch.setattr(profiling, "whole_file", full)
    if trouble == "no room for a raw trace":
        monkeypatch.setattr(profiling.tempfile, "TemporaryDirectory", full)
    folder = tmp_path / "run"
    folder.mkdir()
    profile = Profile(brief, folder, Ranks(0, 1, CPU), asked=True, done=0, per_epoch=20)
    other = torch.profiler.profile(acc_events=True)
    with caplog.at_level(logging.INFO), other if trouble == "another profiler" else nullcontext():
        assert list(profile.over(iter(range(20)))) == list(range(20))
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert warning.startswith("cannot ")
    assert ("profile of steps 9 to 13\n" in caplog.text) == (trouble == "full")
    assert not list(folder.iterdir())


def test_an_end_amid_profiled_steps_ends_the_profiler(brief, tmp_path):
    folder = tmp_path / "run"
    profile = Profile(brief, folder, Ranks(1, 2, CPU), asked=True, done=0, per_epoch=20)
    batches = profile.over(iter(range(20)))
    for _ in range(16):
        next(batches)
    assert torch.autograd._profiler_enabled()
    profile.close()
    del batches
    assert not torch.autograd._profiler_enabled() and not folder.exists()


def test_each_rank_has_a_trace(brief, tmp_path):
    for rank in range(2):
        profile = Profile(brief, tmp_path, Ranks(rank, 2, CPU), True, done=0, per_epoch=20)
        assert list(profile.over(iter(range(20)))) == list(range(20))
    assert sorted(path.name for path in tmp_path.glob("trace*")) == [
        "trace_rank0.json.gz",
        "trace_rank1.json.gz",
    ]
    assert regions_of(tmp_path / "trace_rank1.json.gz") == 5 * ["data wait"]
