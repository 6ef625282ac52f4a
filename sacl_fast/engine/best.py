"""Which evaluation of a run was the best: by kNN where there are labels, else by RankMe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# By the first that was measured.
MEASURES = ("knn_dense", "knn_slim", "rankme_dense", "rankme_slim")


def measure_of(figures: Mapping[str, float]) -> str | None:
    """The figure by which an evaluation is compared with others; None where it has none."""
    return next((name for name in MEASURES if name in figures), None)


class Best:
    """The best figures so far, -1 where there are none yet. What a checkpoint has of it may be of
    a version that knew kNN alone."""

    def __init__(self) -> None:
        self.knn = self.rankme = -1.0

    def is_met(self, figures: Mapping[str, float], epochs: float, warmup: float = 0) -> bool:
        """Note an evaluation after so many ``epochs``; whether it is the best, or as good, of a
        trained encoder.

        What an untrained encoder has by kNN is to be met. Its effective rank is no achievement, nor
        is what is left of it after ``warmup`` epochs.
        """
        name = measure_of(figures)
        if name is None or not math.isfinite(value := figures[name]):
            return False
        if name.startswith("knn"):
            before, self.knn = self.knn, max(self.knn, value)
        elif epochs > warmup:
            before, self.rankme = self.rankme, max(self.rankme, value)
        else:
            return False
        return epochs > 0 and value >= before

    def state(self) -> dict[str, float]:
        return {"best_knn": self.knn, "best_rankme": self.rankme}

    def load(self, state: Mapping[str, Any]) -> None:
        self.knn, self.rankme = state["best_knn"], state.get("best_rankme", -1.0)
