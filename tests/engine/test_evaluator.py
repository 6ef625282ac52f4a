"""kNN evaluation by several ranks against that of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sacl_fast.config import Config
from sacl_fast.data.images.open import open_sources
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.evaluator import Evaluator
from sacl_fast.engine.method import build_method
from sacl_fast.evaluation import evaluate
from sacl_fast.passes import Passes
from tests.engine.ranks import in_ranks


def evaluated(config: Config) -> dict[str, Any]:
    """The figures, and what was compared; the model and random numbers are left as they were."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    torch.manual_seed(0)
    method = build_method(config, Passes())
    for norm in method.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.weight)
    before = [t.clone() for t in (*method.parameters(), *method.buffers())]
    drawn = torch.get_rng_state()
    banks: list[torch.Tensor] = []
    hits = evaluate.knn_hits

    def noted(bank: torch.Tensor, *rest: Any, **options: Any) -> int:
        banks.append(bank)
        return hits(bank, *rest, **options)

    evaluate.knn_hits = noted
    try:
        scores = Evaluator(open_sources(config.data, config.seed), config, ranks, None).evaluate(
            method
        )
    finally:
        evaluate.knn_hits = hits
    after = (*method.parameters(), *method.buffers())
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert torch.equal(drawn, torch.get_rng_state()) and method.training
    return {"scores": scores, "banks": banks}


def evaluate_all(configs: list[Config], folder: str) -> None:
    for i, config in enumerate(configs):
        torch.save(evaluated(config), f"{folder}/{i} {dist.get_rank()}.pt")


@pytest.fixture
def configs(tiny) -> list[Config]:
    broken = Path(tiny.data.root) / "dark" / "broken.png"
    broken.write_bytes(b"no picture")
    tiny = replace(tiny, data=replace(tiny.data, max_bad_share=0.1))
    few = {"batch_size": 10, "recalibrate_batches": 2}
    return [
        # 5 batches of the bank, one of queries
        replace(tiny, eval=replace(tiny.eval, **few, rank_images=0)),
        replace(tiny, eval=replace(tiny.eval, **few, bank=8, k=5)),  # some ranks have nothing to do
        replace(tiny, eval=replace(tiny.eval, **few), data=replace(tiny.data, labels="none")),
    ]


def test_three_ranks_share_an_evaluation(configs, tmp_path):
    in_ranks(3, evaluate_all, configs, str(tmp_path))
    for i, config in enumerate(configs):
        expected = evaluated(config)
        for rank in range(3):
            found = torch.load(tmp_path / f"{i} {rank}.pt")
            assert found["scores"] == expected["scores"]
            assert len(expected["scores"]) == (2, 6, 4)[i]
            for ours, theirs in zip(found["banks"], expected["banks"], strict=True):
                assert torch.equal(ours, theirs)
