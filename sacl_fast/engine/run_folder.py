"""The run folder: where a run writes, and what it says about itself there.

::

    config.yaml          the resolved configuration; sacl-fast train --config reads it
    environment.json     versions, device, git commit, command line
    metrics.jsonl        every reading of the metrics
    views.png            both views of some images, as the encoder sees them
    curves.png           the metrics as curves
    checkpoints/         step_NNNNNNNN.pt (the last ones), best.pt (best kNN)
    encoder.safetensors  the dense encoder after training, under timm's names
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import yaml

from sacl_fast.config import Config, to_dict
from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.errors import UserError

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
VIEWS, CURVES, CHECKPOINTS = "views.png", "curves.png", "checkpoints"
ENCODER = "encoder.safetensors"


def choose_run_folder(config: Config) -> Path:
    """The folder of this run: ``config.out``, or one under ``runs/PRESET``.

    With ``resume`` ``auto`` and no ``out`` it is the preset's newest unfinished run, if there is
    one; with a checkpoint's path and no ``out`` it is the run that the checkpoint is of.

    Raises:
        UserError: the folder holds a run already and ``resume`` is ``never``.
    """
    if config.out is not None:
        folder = Path(config.out)
        if config.resume == "never" and (folder / METRICS).exists():
            raise UserError(
                f"{folder} already holds a run; --resume auto goes on with it, another --out "
                "starts a new one"
            )
        return folder
    runs = Path("runs") / config.preset
    if config.resume == "auto" and (unfinished := _unfinished_runs(runs)):
        return unfinished[-1]
    if config.resume not in ("auto", "never"):
        checkpoint = Path(config.resume)
        if checkpoint.parent.name == CHECKPOINTS:
            return checkpoint.parent.parent
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = runs / stamp, 2
    while folder.exists():
        folder, number = runs / f"{stamp}-{number}", number + 1
    return folder


def make_run_folder(folder: Path, config: Config, environment: dict[str, object]) -> None:
    """Create the folder and write the configuration and the environment into it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        (folder / ENVIRONMENT).write_text(json.dumps(environment, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to run folder {folder}: {error.strerror}; --out names another"
        ) from error


def resume_candidates(config: Config, folder: Path) -> list[Path]:
    """The checkpoints to resume from, the one to try first at the front."""
    if config.resume == "never":
        return []
    if config.resume == "auto":
        return list_checkpoints(folder / CHECKPOINTS)[::-1]
    checkpoint = Path(config.resume)
    if checkpoint.is_dir():
        found = list_checkpoints(checkpoint) or list_checkpoints(checkpoint / CHECKPOINTS)
        if not found:
            raise UserError(f"no checkpoint in {checkpoint}")
        return found[::-1]
    return [checkpoint]


def _unfinished_runs(runs: Path) -> list[Path]:
    """Run folders with checkpoints and no final encoder, oldest first."""
    folders = sorted(runs.iterdir()) if runs.is_dir() else []
    return [
        folder
        for folder in folders
        if list_checkpoints(folder / CHECKPOINTS) and not (folder / ENCODER).exists()
    ]
