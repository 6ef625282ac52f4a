"""Settings of what happens around the steps: optimiser, evaluation, records, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sacl_fast.checks import (
    BelowOne,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Range,
    Settings,
)
from sacl_fast.config.choices import OptimizerName, Widths


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings, path="optim"):
    """The optimiser and its schedule."""

    name: OptimizerName = "lars"
    lr: Positive = 0.3
    """Learning rate for a global batch of 256; the rate used is lr * batch_size / 256."""
    weight_decay: NotNegative = 1e-4
    """Not applied to one-dimensional parameters (biases, norms)."""
    momentum: BelowOne = 0.9
    """LARS."""
    eta: Positive = 0.02
    """LARS trust coefficient."""
    clip: bool = True
    """LARS: bound the trust ratio so that no layer's rate exceeds lr."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW."""
    warmup_epochs: CountOrZero = 10
    """Linear warm-up, then cosine to 0, per step. In a run of no more epochs than this: a tenth of
    the run."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings, path="eval"):
    """Figures of the frozen features, for the dense and the slim encoder: kNN accuracy where there
    are labels, and two effective ranks, RankMe and LiDAR, which need none."""

    every: CountOrZero = 10
    """Epochs between evaluations (0: only before and after training)."""
    k: Count = 20
    """Neighbours."""
    temperature: Annotated[float, Range(1e-4, 1e4)] = 0.07
    """Of the neighbours' weights exp(similarity / temperature)."""
    bank: Count = 50_000
    """Training images to search among, at most."""
    queries: Count = 10_000
    """Validation images to classify, at most."""
    batch_size: Count = 256
    rank_images: CountOrZero = 2048
    """Training images whose features' effective rank is RankMe; LiDAR is of four random views of
    each of a quarter as many (0: neither). An evaluation of an encoder thereby has as many more
    images to encode, twice as many without labels."""
    encoders: Widths = "both"
    recalibrate_batches: Count = 20
    """Batches from which batch-norm statistics are estimated anew for each encoder before it is
    evaluated: the running ones mix the dense and the slim network."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings, path="log"):
    """What is written while training; 'metrics.jsonl' and the pictures always are."""

    every: Count = 10
    """Steps between readings of the metrics. The device is not waited for in between."""
    tensorboard: bool = True
    """Also write TensorBoard events, where it is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    min_std: NotNegative = 0.02
    """Collapse alarm: mean over dimensions of sqrt(D) * std of the length-normalised embeddings
    (1: spread evenly, 0: all the same)."""
    min_rank: NotNegative = 2.0
    """Collapse alarm: effective rank of the embeddings."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings, path="checkpoint"):
    """When the state of the run is written."""

    every_steps: CountOrZero = 0
    """Steps between checkpoints, besides the one at the end of each epoch (0: none besides)."""
    every_epochs: Count = 1
    """Epochs between checkpoints."""
    keep: Count = 2
    """How many of the last checkpoints to keep; the best one (by kNN or, without labels, by RankMe)
    is kept besides."""
