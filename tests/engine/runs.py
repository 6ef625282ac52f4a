"""Runs with a checkpoint at each step, and what they leave."""

from dataclasses import replace
from pathlib import Path

from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.engine.metrics import read_metrics


def with_checkpoints(tiny):
    """Three steps an epoch, two epochs, a checkpoint at each step, no evaluation between. To be
    made a fixture."""
    return replace(
        tiny,
        checkpoint=replace(tiny.checkpoint, every_steps=1, keep=9),
        eval=replace(tiny.eval, every=0, encoders="dense"),
    )


def losses(folder):
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def checkpoints(folder):
    return [int(path.stem[5:]) for path in list_checkpoints(Path(folder) / "checkpoints")]
