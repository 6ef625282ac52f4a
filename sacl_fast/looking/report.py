"""``sacl-fast report``: runs side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sacl_fast import _version
from sacl_fast.config.looking import ReportConfig
from sacl_fast.engine.plots import draw_line, frame, series
from sacl_fast.files import user_path
from sacl_fast.looking import html
from sacl_fast.looking.pictures import COLOURS
from sacl_fast.looking.run import check_new, made_folder, write_whole
from sacl_fast.looking.runs import Run, open_runs
from sacl_fast.output import plain_text

_PANELS = {
    "loss": ("Loss", "loss"),
    "knn_dense": ("kNN accuracy, dense encoder", "top-1 (%)"),
    "knn_slim": ("kNN accuracy, slim encoder", "top-1 (%)"),
    "rankme_dense": ("RankMe, dense encoder", "effective rank"),
    "rankme_slim": ("RankMe, slim encoder", "effective rank"),
    "lidar_dense": ("LiDAR, dense encoder", "effective rank"),
    "lidar_slim": ("LiDAR, slim encoder", "effective rank"),
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


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return plain_text(", ".join(map(_value, value)) if isinstance(value, list) else str(value))


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
