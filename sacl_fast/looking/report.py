"""``sacl-fast report``: runs side by side."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sacl_fast import _version
from sacl_fast.config.file import read_config_file
from sacl_fast.config.looking import ReportConfig
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.plots import draw_line, frame, series
from sacl_fast.engine.run_folder import CONFIG, ENCODER, METRICS
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import kind_of, user_path
from sacl_fast.looking import html
from sacl_fast.looking.files import plain_text
from sacl_fast.looking.pictures import COLOURS
from sacl_fast.looking.run import check_new, made_folder, write_whole

_PANELS = {
    "loss": ("Loss", "loss"),
    "knn_dense": ("kNN accuracy, dense encoder", "top-1 (%)"),
    "knn_slim": ("kNN accuracy, slim encoder", "top-1 (%)"),
    "embedding_std": ("Embeddings' spread", "std (1: healthy, 0: collapsed)"),
    "effective_rank": ("Embeddings' rank", "effective rank"),
}
# Written too, but no news beside those.
_UNDRAWN = {
    *("kind", "step", "epoch", "time", "message", "lr", "on_diagonal", "off_diagonal"),
    *("distillation", "images_per_second", "data_wait", "peak_memory_bytes"),
}
_MOST = 10  # panels
_STYLES = ("-", "--", ":")
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


def compare_runs(paths: Sequence[str], settings: ReportConfig) -> None:
    """Print the comparison, and write it where ``settings.out`` says.

    Raises:
        UserError: a path is no run folder, or the report is there already or cannot be written.
    """
    if settings.out is None:
        _print(open_runs(paths))
        return
    path = user_path(settings.out, "out")
    png = path.with_name(f"{path.stem}_curves.png")
    page = path.suffix == ".html"
    check_new([path] if page else [path, png])
    runs = open_runs(paths)
    _print(runs)
    with made_folder(path.parent):
        if page:
            files = {path: html_of(runs)}
        else:
            files = {png: curves_png(runs), path: markdown_of(runs, png.name).encode()}
        for file, content in files.items():
            write_whole(file, content)
    print(f"written: {', '.join(str(file) for file in files)}")


def open_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders, each once, under names that tell them apart.

    Raises:
        UserError: one of them is no run folder.
    """
    folders = list(dict.fromkeys(user_path(path, "the run folder").absolute() for path in paths))
    for folder in folders:
        if kind_of(folder) != "folder":
            raise UserError(f"{folder} is no folder; the folder of a run works")
        if not any(kind_of(folder / name) == "file" for name in (CONFIG, METRICS)):
            raise UserError(
                f"{folder} holds no run: neither {CONFIG} nor {METRICS}; the folder of a run works"
            )
    return [_open(f, name) for f, name in zip(folders, _names(folders), strict=True)]


def figures_table(runs: Sequence[Run]) -> list[list[str]]:
    """A heading, then a row for each figure that some run has."""
    titles = list(dict.fromkeys(title for run in runs for title in run.figures))
    rows = [[title, *(run.figures.get(title, "") for run in runs)] for title in titles]
    return [["", *(run.name for run in runs)], *rows]


def settings_table(runs: Sequence[Run]) -> list[list[str]]:
    """A heading, then a row for each setting that is not the same in all runs."""
    known = [run for run in runs if run.settings]
    names = list(dict.fromkeys(name for run in known for name in run.settings))
    rows = []
    for name in names:
        values = [_value(run.settings.get(name)) if run.settings else "" for run in runs]
        if len({_value(run.settings.get(name)) for run in known}) > 1:
            rows.append([name, *values])
    return [["setting", *(run.name for run in runs)], *rows]


# --- reading --------------------------------------------------------------------------------------


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
                notes.append(f"{damaged} lines of {METRICS} are damaged and left out")
        except UserError as error:
            notes.append(str(error))
            lines = []
        rows, unusable = _numbers(lines)
        if unusable:
            notes.append(f"{unusable} of {len(lines)} readings cannot be used")
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
    for width in ("dense", "slim"):
        at, values = series(rows, f"knn_{width}")
        if len(values):
            best = int(values.argmax())
            figures[f"kNN {width} %, best"] = f"{values[best]:.1f} (epoch {at[best]:.4g})"
            figures[f"kNN {width} %, last"] = f"{values[-1]:.1f}"
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
                    margin = value["margin"]
                    shown = f"{value['mean']:.1f}" + (f" ± {margin:.1f}" if margin else "")
                    figures[f"eval {result['method']}, {encoder['name']}, {what} %"] = shown
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            notes.append(f"eval/{file.name} cannot be understood ({reason_of(error)})")
    return figures


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return plain_text(", ".join(map(_value, value)) if isinstance(value, list) else str(value))


# --- writing --------------------------------------------------------------------------------------


def curves_png(runs: Sequence[Run]) -> bytes:
    """The readings of all runs, a panel for each, over epochs."""
    found = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    panels = [key for key in _PANELS if key in found]
    panels += [key for key in sorted(found) if key not in _PANELS and key not in _UNDRAWN]
    panels = panels[:_MOST] or ["loss"]
    lines = math.ceil(len(panels) / 2)
    told_apart = len(runs) <= len(COLOURS) * len(_STYLES)
    height = 3.4 * lines + 0.25 * (math.ceil(len(runs) / 2) if told_apart else 0) + 0.3
    picture = Figure(figsize=(11, height), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(picture)
    axes = np.atleast_1d(picture.subplots(lines, 2)).ravel()
    last = max([row["epoch"] for run in runs for row in run.rows if row["epoch"] > 0], default=1)
    for key, panel in zip(panels, axes, strict=False):
        frame(panel, *_PANELS.get(key, (key, key)))
        drawn = []
        for nth, run in enumerate(runs):
            epochs, values = series(run.rows, key)
            if not len(values):
                continue
            drawn.append(values)
            marker = "o" if len(values) < 30 else None
            draw_line(
                panel, epochs, values, _colour(nth, len(runs)), None, marker=marker,
                style=_STYLES[nth // len(COLOURS)] if told_apart else "-",
            )  # fmt: skip
        values = np.concatenate(drawn) if drawn else np.zeros(0)
        if key == "loss" and len(values) and values.min() > 0 and values.max() > 30 * values.min():
            panel.set_yscale("log")
        panel.set_xlim(-0.015 * last, 1.015 * last)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    if told_apart:
        handles = [
            picture.axes[0].plot(
                [], [], color=_colour(n, len(runs)), linestyle=_STYLES[n // len(COLOURS)]
            )[0]
            for n in range(len(runs))
        ]
        names = [run.name[-50:].replace("$", r"\$") for run in runs]
        picture.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _colour(nth: int, of: int) -> Any:
    if of > len(COLOURS) * len(_STYLES):
        return colormaps["viridis"](nth / (of - 1))
    return COLOURS[nth % len(COLOURS)]


def markdown_of(runs: Sequence[Run], png: str) -> str:
    """The report, with the picture of that name."""
    lines = ["# Runs", "", *_markdown(figures_table(runs)), ""]
    differ = settings_table(runs)
    if len(runs) > 1:
        lines += ["## Settings that differ", ""]
        lines += [*_markdown(differ), ""] if len(differ) > 1 else ["None.", ""]
    lines += [f"- {_escaped(run.name)}: {_escaped(n)}" for run in runs for n in run.notes]
    lines += ["", f"![Curves]({png})", "", f"sacl-fast {_version.__version__}."]
    return "\n".join(lines) + "\n"


def html_of(runs: Sequence[Run]) -> bytes:
    """The report as one page."""
    title = "Runs" if len(runs) > 1 else f"Run {runs[0].name}"
    body = [f"<header><h1>{html.text(title)}</h1></header><main>"]
    body += ["<h2>Figures</h2>", html.table(figures_table(runs), numbers=True)]
    if len(runs) > 1:
        differ = settings_table(runs)
        body.append("<h2>Settings that differ</h2>")
        body.append(html.table(differ, numbers=True) if len(differ) > 1 else "<p>None.</p>")
    if any(run.notes for run in runs):
        notes = (f"<li>{html.text(r.name)}: {html.text(n)}</li>" for r in runs for n in r.notes)
        body.append(f"<h2>Notes</h2><ul>{''.join(notes)}</ul>")
    body += ["<h2>Curves</h2>", html.picture(curves_png(runs), "curves of all runs over epochs")]
    body.append(f'<p class="soft">sacl-fast {_version.__version__}</p></main>')
    return html.document(f"sacl-fast: {title}", "\n".join(body), command="report")


def _markdown(rows: list[list[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
    return [head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]


def _escaped(text: str) -> str:
    """So that Markdown shows it as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!~$&" else c for c in text)


def _print(runs: Sequence[Run]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    differ = settings_table(runs)
    for rows in (figures_table(runs), differ if len(differ) > 1 else None):
        if rows is None:
            continue
        table = Table(box=None, pad_edge=False)
        for i, title in enumerate(rows[0]):
            table.add_column(Text(title), justify="right" if i else "left", overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    for run in runs:
        for note in run.notes:
            console.print(Text(f"{run.name}: {note}"))
