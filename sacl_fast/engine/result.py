"""What ``sacl_fast.train`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    steps: int
    finished: bool
    """False if a signal ended it; its last checkpoint goes on from there."""
    knn: dict[str, float]
    """The last kNN accuracies in percent, ``knn_dense`` and ``knn_slim``; empty without labels."""
    knn_before: dict[str, float]
    """Those of the untrained encoder; empty where they were not measured."""
    stopped_by: int = 0
    """The number of the signal that ended it, 0 for none."""
    label_free: dict[str, float] = field(default_factory=dict)
    """The last effective ranks of features, ``rankme_dense``, ``lidar_dense`` and so on."""
    label_free_before: dict[str, float] = field(default_factory=dict)
