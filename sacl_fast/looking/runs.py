"""What run folders say: settings, readings and figures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.config.file import read_config_file
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.plots import series
from sacl_fast.engine.run_folder import CONFIG, ENCODER, METRICS
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.report import figure_from
from sacl_fast.files import kind_of, user_path
from sacl_fast.output import plain_text

_FINETUNED = "finetune.json"
_PAUSE = 600.0  # seconds without a reading, at least, that are no part of the run's time


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    name: str
    path: Path
    settings: dict[str, Any]
    """By full name, such as ``optim.lr``."""
    rows: list[dict[str, Any]]
    """Readings: numbers by name; one of a kind for each step."""
    figures: dict[str, str]
    """What to say of it, by title."""
    notes: list[str] = field(default_factory=list)


def open_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders, each once, under names that tell them apart.

    Raises:
        UserError: one of them is no run folder.
    """
    given: dict[str, list[str]] = {}  # links followed, to the paths that lead there
    for path in paths:
        folder = user_path(path, "the run folder").absolute()
        if kind_of(folder) != "folder":
            raise UserError(f"{folder} is no folder; the folder of a run works")
        if kind_of(folder / CONFIG) != "file" and kind_of(folder / _FINETUNED) == "file":
            raise UserError(
                f"{folder} holds a fine-tuning, whose figures are in its finetune.md; the folder "
                "of a run of 'sacl-fast train' works"
            )
        if not any(kind_of(folder / name) == "file" for name in (CONFIG, METRICS)):
            raise UserError(
                f"{folder} holds no run: neither {CONFIG} nor {METRICS}; the folder of a run works"
            )
        given.setdefault(os.path.realpath(folder), []).append(str(path))
    folders = [user_path(same[0], "the run folder").absolute() for same in given.values()]
    runs = [_open(f, name) for f, name in zip(folders, _names(folders), strict=True)]
    for run, (_, *again) in zip(runs, given.values(), strict=True):
        if again:
            run.notes.append(f"given more than once ({', '.join(again)}), and shown once")
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as much of each as tells them apart."""
    depth = 1
    names = [folder.name for folder in folders]
    while len({*names}) < len(names):  # which whole paths are not
        depth += 1
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
    return [plain_text(name) for name in names]


def _open(folder: Path, name: str) -> Run:
    notes: list[str] = []
    settings: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    if kind_of(folder / CONFIG) != "file":
        notes.append(f"no {CONFIG}, so its settings are not known")
    else:
        try:
            settings = dict(_flat(read_config_file(folder / CONFIG)))
        except UserError as error:
            notes.append(f"its settings cannot be read ({error})")
    if kind_of(folder / METRICS) != "file":
        notes.append(f"no {METRICS}, so no readings")
    else:
        try:
            lines = read_metrics(folder / METRICS)
            damaged = (folder / METRICS).read_bytes().count(b"\n") - len(lines)
            if damaged > 0:
                notes.append(f"{counted(damaged, 'damaged line')} of {METRICS} left out")
        except UserError as error:
            notes.append(str(error))
            lines = []
        rows, unusable = _numbers(lines)
        if unusable:
            notes.append(f"{unusable} of {counted(len(lines), 'reading')} cannot be used")
        elif not rows:
            notes.append("no readings yet")
    figures = _figures(folder, settings, rows, notes)
    return Run(name, folder, settings, rows, figures, notes)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat += _flat(value, f"{name}.")
        elif name not in ("out", "resume"):  # of where and when, not of what
            flat.append((name, value))
    return flat


def _numbers(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The readings with their finite numbers; the last one of each kind and step. How many were
    of no use."""
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    unusable = 0
    for line in lines:
        kept = {name: value for name, value in line.items() if _is_number(value)}
        if line.get("kind") == "event":
            continue
        if not {"epoch", "step"} <= kept.keys() or not isinstance(line.get("kind"), str):
            unusable += 1
            continue
        rows[line["kind"], kept["step"]] = {"kind": line["kind"], **kept}
    return sorted(rows.values(), key=lambda row: row["step"]), unusable


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300  # which no nan and no infinity is


def _figures(
    folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]
) -> dict[str, str]:
    figures: dict[str, str] = {}
    if rows:
        epochs, steps = (max(row[key] for row in rows) for key in ("epoch", "step"))
        said = str(settings.get("epochs"))
        asked = float(said) if said.isdecimal() else None
        whole = asked is None or epochs >= asked - 1e-6
        done = whole and kind_of(folder / ENCODER) == "file"
        of = "" if whole else f" of {asked:g}"
        figures["epochs"] = f"{epochs:.4g}{of}{'' if done else ', unfinished'}"
        figures["steps"] = f"{steps:,.0f}"
        figures["time"] = _time(rows, notes)
    speeds = series(rows, "images_per_second")[1]
    if len(speeds):
        figures["images/s (median)"] = f"{np.median(speeds):,.0f}"
    losses = series(rows, "loss")[1]
    if len(losses):
        figures["loss, last"] = f"{losses[-1]:.4g}"
    quality = (("knn", "kNN", " %"), ("rankme", "RankMe", ""), ("lidar", "LiDAR", ""))
    for (key, title, unit), width in product(quality, ("dense", "slim")):
        at, values = series(rows, f"{key}_{width}")
        if len(values):
            best, title = int(values.argmax()), f"{title} {width}{unit}"
            figures[f"{title}, best"] = f"{values[best]:.1f} (epoch {at[best]:.4g})"
            figures[f"{title}, last"] = f"{values[-1]:.1f}"
    for key, title in (("embedding_std", "std"), ("effective_rank", "effective rank")):
        values = series(rows, key)[1]
        if len(values):
            figures[f"{title}, last"] = f"{values[-1]:.3g}"
    return figures | _evaluations(folder / "eval", notes)


def _time(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """From the first to the last reading, without the pauses of a run that was resumed."""
    gaps = np.diff(np.sort(series(rows, "time")[1]))
    if not len(gaps):
        return ""
    pauses = gaps > max(_PAUSE, 20 * float(np.median(gaps)))
    if pauses.any():
        notes.append(f"{_clock(gaps[pauses].sum())} without readings are not counted as its time")
    return _clock(gaps[~pauses].sum())


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _evaluations(folder: Path, notes: list[str]) -> dict[str, str]:
    """What ``sacl-fast eval`` left of the trained encoders."""
    figures: dict[str, str] = {}
    try:
        files = sorted(folder.glob("*.json")) if kind_of(folder) == "folder" else []
    except OSError as error:
        notes.append(f"cannot read {folder}: {reason_of(error)}")
        return figures
    for file in files:
        try:
            result = json.loads(file.read_bytes())
            for encoder in result["encoders"]:
                if "untrained" in encoder["name"]:
                    continue
                for what, value in encoder["figures"].items():
                    unit = "of images, %" if what.endswith("%") else "%"
                    title = f"eval {result['method']}, {encoder['name']}, {what} {unit}"
                    figures[title] = figure_from(value).shown()
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            notes.append(f"eval/{file.name} cannot be understood ({reason_of(error)})")
    return figures


# --- writing --------------------------------------------------------------------------------------
