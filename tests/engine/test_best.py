"""The best evaluation of a run: which it is, what of it is kept, without labels too."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sacl_fast.encoders import build_encoder, read_encoder_metadata
from sacl_fast.engine.best import Best, measure_of
from sacl_fast.engine.checkpoint import load_checkpoint
from sacl_fast.engine.evaluator import Evaluator
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.trainer import train
from sacl_fast.evaluation.trained import open_trained
from tests.engine.runs import losses


def test_the_best_by_knn_else_by_rankme():
    assert measure_of({"rankme_dense": 1, "knn_dense": 2}) == "knn_dense"
    assert measure_of({"lidar_dense": 1, "rankme_slim": 2}) == "rankme_slim"
    best = Best()
    told = [best.is_met({"knn_dense": v}, i, 3) for i, v in enumerate([9, 5, 9, 20, 19])]
    assert told == [False, False, True, True, False]
    best = Best()
    values = [90, 5, 4, math.nan, 6]
    told = [best.is_met({"rankme_dense": v}, i) for i, v in enumerate(values)]
    assert told == [False, True, False, False, True]
    assert not best.is_met({}, 1)
    warming = Best()  # while the warm-up lasts, the rank is what is left of an untrained encoder's
    told = [warming.is_met({"rankme_dense": v}, i, 1) for i, v in enumerate([90, 50, 4, 5, 5])]
    assert told == [False, False, True, True, True]
    again = Best()
    again.load(best.state())
    assert (again.knn, again.rankme) == (-1, 6)
    again.load({"best_knn": 3.0})  # of a version that knew kNN alone
    assert (again.knn, again.rankme) == (3, -1)


@pytest.fixture
def worse_at_the_end(monkeypatch):
    """Evaluations of which the first after training began is the best."""
    evaluate = Evaluator.evaluate

    def measured(self, method):
        figures = evaluate(self, method)
        left = {"n": figures_of.setdefault(id(self), [3.0, 9.0, 5.0, 1.0]).pop(0)}
        return {name: left["n"] for name in figures}

    figures_of: dict[int, list[float]] = {}
    monkeypatch.setattr(Evaluator, "evaluate", measured)


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_the_best_encoder_is_kept_beside_the_last(tiny, worse_at_the_end, labels):
    optim = replace(tiny.optim, warmup_epochs=0)  # since no rank counts before its end
    config = replace(tiny, optim=optim, data=replace(tiny.data, labels=labels))
    result = train(config)
    best = load_checkpoint(result.folder / "checkpoints" / "best.pt")
    assert best["step"] == 3 and result.steps == 6
    names = {p.name for p in result.folder.glob("*.safetensors")}
    best_names = {"encoder_best.safetensors", "encoder_best_slim.safetensors"}
    assert names == {"encoder.safetensors", "encoder_slim.safetensors", *best_names}
    state = load_file(result.folder / "encoder_best.safetensors")
    parameters = dict(build_encoder("resnet20", width=0.25, image_size=16).named_parameters())
    assert all(torch.equal(state[k], best["model"][f"encoder.{k}"]) for k in parameters)
    said = read_encoder_metadata(result.folder / "encoder_best.safetensors")
    by = "knn_dense" if labels == "auto" else "rankme_dense"
    assert (said["best_by"], said["steps"], said["epochs"], said[by]) == (by, "3", "1.0", "9.0")
    last = read_encoder_metadata(result.folder / "encoder.safetensors")
    assert "best_by" not in last and last["steps"] == "6" and last[by] == "5.0"
    slim = open_trained(result.folder / "encoder_best_slim.safetensors")
    assert slim.widths == ("slim",) and slim.steps == 3

    # Once finished, nothing is written anew; what is missing is.
    path = result.folder / "encoder_best.safetensors"
    kept = load_file(path)
    path.unlink()
    last_state = load_file(result.folder / "encoder.safetensors")
    train(replace(config, resume="auto"))
    assert read_encoder_metadata(path) == said
    assert all(torch.equal(v, kept[k]) for k, v in load_file(path).items())
    again = load_file(result.folder / "encoder.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in last_state.items())


def test_without_labels_ranks_are_measured_and_training_is_the_same(tiny):
    quiet = replace(tiny, out=f"{tiny.out}-2", data=replace(tiny.data, labels="none"))
    quiet = replace(quiet, eval=replace(quiet.eval, rank_images=0))
    measured = replace(tiny, data=replace(tiny.data, labels="none"))
    result = train(measured)
    assert train(quiet).label_free == {} and losses(quiet.out) == losses(measured.out)
    names = {f"{name}_{width}" for name in ("rankme", "lidar") for width in ("dense", "slim")}
    rows = [r for r in read_metrics(result.folder / "metrics.jsonl") if r["kind"] == "label_free"]
    assert [r["epoch"] for r in rows] == [0, 1, 2] and result.knn == {}
    assert all(names <= r.keys() and all(1 <= r[n] <= 48 for n in names) for r in rows)
    assert result.label_free.keys() == result.label_free_before.keys() == names
    assert (result.folder / "checkpoints" / "best.pt").exists()


def test_an_earlier_version_s_checkpoint_is_resumed(tiny):
    result = train(replace(tiny, checkpoint=replace(tiny.checkpoint, keep=9)))
    path = result.folder / "checkpoints" / "step_00000003.pt"
    state = torch.load(path, weights_only=True)
    for key in ("label_free", "label_free_before", "best_rankme"):
        del state[key]
    del state["config"]["eval"]["rank_images"], state["config"]["encoder"]["pretrained"]
    torch.save({**state, "format": 1}, path)
    whole = losses(tiny.out)
    again = train(replace(tiny, resume=str(path)))
    assert again.finished and losses(tiny.out) == whole
