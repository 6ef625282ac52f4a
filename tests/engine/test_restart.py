"""Runs of two processes that lose one, and runs that go on in another number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

import sacl_fast
from sacl_fast.config import Config, to_dict
from sacl_fast.engine.checkpoint import checkpoint_path, load_checkpoint
from sacl_fast.engine.step import TrainingStep
from tests.engine.ranks import in_ranks
from tests.engine.runs import checkpoints, losses, with_checkpoints

tiny = pytest.fixture(with_checkpoints)

WORKER = """
import os, signal, sys
from sacl_fast.cli import main
from sacl_fast.engine.step import TrainingStep

whole_step = TrainingStep.__call__

def step_or_die(self, view_a, view_b, step):
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    if (attempt, rank, step) == ("0", "1", 4):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_step(self, view_a, view_b, step)

TrainingStep.__call__ = step_or_die
sys.exit(main())
"""


def in_two(runs: dict[str, Config]) -> None:
    for name in ("undisturbed", "by two", "two after one"):
        sacl_fast.train(runs[name])
    stop_one(runs["stopped"])


@pytest.fixture
def runs(tiny, tmp_path) -> dict[str, Config]:
    """With a checkpoint at step 2 and at each end of an epoch of three."""
    tiny = replace(tiny, checkpoint=replace(tiny.checkpoint, every_steps=2))
    plain = replace(
        tiny,
        encoder=replace(tiny.encoder, drop_path=0.0),
        optim=replace(tiny.optim, lr=0.1),
    )
    start = {
        "undisturbed": tiny,
        "stopped": replace(tiny, log=replace(tiny.log, every=4)),
        "by two": plain,
        "by one": plain,
        "two after one": replace(plain, resume=at(tmp_path / "by one", 4)),
        "one after two": replace(plain, resume=at(tmp_path / "by two", 4)),
    }
    return {name: replace(config, out=str(tmp_path / name)) for name, config in start.items()}


def at(folder: Path, step: int) -> str:
    return str(checkpoint_path(folder / "checkpoints", step))


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(at(Path(config.out or ""), 6)))["model"]


def stop_one(config: Config) -> None:
    """The second process gets a signal in the midst of its second step; both stop after the same,
    at a reading of the metrics (here the end of the epoch), with a checkpoint."""
    whole_step = TrainingStep.__call__

    def step_and_signal(self: TrainingStep, view_a: Tensor, view_b: Tensor, step: int) -> Any:
        if step == 1 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGUSR1)
        return whole_step(self, view_a, view_b, step)

    TrainingStep.__call__ = step_and_signal
    result = sacl_fast.train(config)
    TrainingStep.__call__ = whole_step
    assert (result.finished, result.stopped_by) == (False, signal.SIGUSR1)
    steps = [torch.tensor(0) for _ in range(dist.get_world_size())]
    dist.all_gather(steps, torch.tensor(result.steps))
    assert [int(step) for step in steps] == [3, 3]
    assert checkpoints(result.folder) == [2, 3]
    assert sacl_fast.train(replace(config, resume="auto")).finished


def test_a_killed_worker_and_another_number_of_processes(runs, tmp_path, caplog):
    sacl_fast.train(runs["by one"])
    in_ranks(2, in_two, runs)
    undisturbed = losses(runs["undisturbed"].out)
    assert losses(runs["stopped"].out) == {step: undisturbed[step] for step in (3, 4, 6)}
    killed = by_torchrun(replace(runs["undisturbed"], out=str(tmp_path / "killed")), tmp_path)
    assert losses(killed.out) == losses(runs["undisturbed"].out)
    expected = weights(runs["undisturbed"])
    for name, value in weights(killed).items():
        assert name.endswith("_extra_state") or torch.equal(value, expected[name]), name

    sacl_fast.train(runs["one after two"])
    for name, whole in (("two after one", "by one"), ("one after two", "by two")):
        there, steps = losses(runs[whole].out), losses(runs[name].out)
        assert steps == pytest.approx({step: there[step] for step in (5, 6)}, rel=1e-4), name
        expected = weights(runs[whole])
        for key, value in weights(runs[name]).items():
            if not key.endswith("_extra_state"):
                difference = (value.double() - expected[key].double()).norm()
                assert difference <= 1e-4 * expected[key].double().norm(), (name, key)
    assert "resuming in 1 process what 2 trained: the same batches" in caplog.text


def by_torchrun(config: Config, folder: Path) -> Config:
    """Train by the worker above, of which one is killed; torchrun starts them again."""
    worker, file = folder / "worker.py", folder / "config.yaml"
    worker.write_text(WORKER)
    file.write_text(yaml.safe_dump(to_dict(config)))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1".split()
    command = [sys.executable, *torchrun, str(worker), "train", "demo", "--config", str(file)]
    done = subprocess.run(
        [*command, "--resume", "auto"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr + done.stdout, done.stderr
    return config
