"""``--deterministic``: torch's settings within and after, and the same bits from run to run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sacl_fast
from sacl_fast.config import Config, SlimConfig
from sacl_fast.engine import plan
from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.engine.determinism import deterministic
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.errors import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # pyright: ignore
        os.environ.get(CUBLAS),
    )


@pytest.mark.parametrize("given", [None, ":16:8", ":0:0"])
def test_settings_within_and_after(monkeypatch, given):
    monkeypatch.delenv(CUBLAS, raising=False)
    if given:
        monkeypatch.setenv(CUBLAS, given)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with pytest.raises(KeyError), deterministic(True):
        fixed = ":16:8" if given == ":16:8" else ":4096:8"
        assert settings() == (True, False, True, False, False, fixed)
        raise KeyError
    assert settings() == before
    with deterministic(False):
        assert settings() == before


def test_where_cuda_has_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv(CUBLAS, raising=False)
    with (
        pytest.raises(UserError, match=f"{CUBLAS}=:4096:8 in the environment"),
        deterministic(True),
    ):
        pass
    monkeypatch.setenv(CUBLAS, ":4096:8")
    with deterministic(True):
        pass


def test_an_operation_without_such_a_form():
    with pytest.raises(UserError, match="put_ has no deterministic form"), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another")


def test_no_plan_is_tried(monkeypatch, tiny):
    monkeypatch.setattr(plan, "_may_try", lambda step: pytest.fail("tried"))
    plan.take_plan(replace(tiny, deterministic=True), step=None, resumed=None)  # type: ignore[arg-type]


def state(folder: Path) -> dict[str, Any]:
    last = list_checkpoints(folder / "checkpoints")[-1]
    return torch.load(last, weights_only=False)["model"]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]


def test_two_runs_and_one_in_two_pieces(tiny: Config, tmp_path: Path):
    """With workers, random views and drop path, and passes that are recorded."""
    config = replace(
        tiny,
        deterministic=True,
        data=replace(tiny.data, workers=2),
        slim=SlimConfig(mode="skip", refresh_steps=100),
        eval=replace(tiny.eval, every=0, encoders="dense"),
        checkpoint=replace(tiny.checkpoint, every_steps=1, keep=9),
    )
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders[:2]:
        sacl_fast.train(replace(config, out=str(folder)))
    middle = list_checkpoints(folders[0] / "checkpoints")[1]
    sacl_fast.train(replace(config, out=str(folders[2]), resume=str(middle)))
    assert losses(folders[0]) == losses(folders[1])
    assert losses(folders[0])[2:] == losses(folders[2])
    expected, *others = map(state, folders)
    tensors = {name: value for name, value in expected.items() if torch.is_tensor(value)}
    assert all(torch.equal(other[name], tensors[name]) for other in others for name in tensors)
    assert not torch.are_deterministic_algorithms_enabled()
