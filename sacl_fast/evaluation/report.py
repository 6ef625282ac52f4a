"""A result as text, Markdown, JSON and a picture."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from sacl_fast import _version
from sacl_fast.checks import counted
from sacl_fast.engine.glyphs import drawable
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.scores import Figure, Result
from sacl_fast.files import write_whole_files
from sacl_fast.output import plain_text

_NAMED = 40  # classes up to which the confusion matrix names them
_NUMBERED = 15


def result_files(result: Result, folder: Path) -> list[Path]:
    """Where ``write_result`` writes."""
    names = [f"{result.method}.md", f"{result.method}.json"]
    if result.scores[0].confusion is not None:
        names.append(f"{result.method}_confusion.png")
    return [folder / name for name in names]


def write_result(result: Result, folder: Path) -> None:
    """Write it into a folder that exists, all files or none.

    Raises:
        UserError: it cannot be written.
    """
    content = [markdown(result).encode(), (json.dumps(as_dict(result), indent=1) + "\n").encode()]
    if result.scores[0].confusion is not None:
        content.append(_confusion_png(result))
    try:
        write_whole_files(dict(zip(result_files(result, folder), content, strict=True)))
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename}: {reason_of(error)}; --out names another folder"
        ) from error


def table(result: Result) -> list[list[str]]:
    """A heading and a row for each encoder."""
    columns = list(result.scores[0].figures)
    gains = any(scores.control for scores in result.scores)
    notes = any(scores.note for scores in result.scores)
    control = "over scratch" if result.method == "finetune" else "over untrained"
    over = [control] if gains else []
    first = "precision in %" if result.main.startswith("mAP") else "accuracy in %"
    rows = [[first, *columns, *over, *([""] if notes else [])]]
    for scores in result.scores:
        row = [scores.name, *(scores.figures[name].shown() for name in columns)]
        if gains:
            gain = result.gain(scores)
            row.append("" if gain is None else gain.shown("+"))
        rows.append(row + ([scores.note] if notes else []))
    return rows


def plain(result: Result) -> str:
    """The table and the verdict, for a terminal."""
    rows = table(result)
    figures = len(rows[0]) - any(scores.note for scores in result.scores)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < i < figures else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", result.verdict])


def markdown(result: Result) -> str:
    """The whole of it."""
    rows = table(result)
    lines = [f"# {result.method}: {plain_text(result.path)}", "", result.verdict, ""]
    lines += _markdown_table(rows)
    tested = counted(result.test_images, "image") + (
        " of the training images, held out for want of validation images"
        if result.held_out
        else ", those for validation"
    )
    lines += [
        "",
        f"{_how(result)} Classified: {tested}. ± is the 95 % interval, which stands in full where "
        f"the figure is not in its midst. sacl-fast {_version.__version__}.",
    ]
    if result.note:
        lines += ["", f"Note: {_escaped(result.note)}."]
    first = result.scores[0]
    if first.confusion is not None or first.images is not None:
        images = first.images if first.confusion is None else first.confusion.sum(axis=1)
        assert images is not None
        each = [scores.per_class for scores in result.scores]
        rows = [["class", "images", *(f"{scores.name} %" for scores in result.scores)]]
        for i, name in enumerate(result.classes):
            shares = ["" if math.isnan(of[i]) else f"{of[i]:.1f}" for of in each]
            rows.append([_escaped(name), f"{images[i]:,}", *shares])
        lines += ["", "## By class", "", *_markdown_table(rows)]
    if first.confusion is not None:
        lines += ["", f"![Confusion matrix]({result.method}_confusion.png)"]
    return "\n".join(lines) + "\n"


def as_dict(result: Result) -> dict[str, Any]:
    """For JSON: figures in percent, gains in percentage points."""

    def figure(value: Figure | None) -> dict[str, float | None] | None:
        if value is None:
            return None
        known = math.isfinite(value.margin)
        interval = {"margin": value.margin, "low": value.low, "high": value.high}
        return {"mean": value.mean} | {k: v if known else None for k, v in interval.items()}

    encoders = []
    for scores in result.scores:
        of: dict[str, Any] = {
            "name": scores.name,
            "figures": {name: figure(value) for name, value in scores.figures.items()},
            "over_untrained": figure(result.gain(scores)),
            "note": scores.note,
        }
        if scores.confusion is not None or scores.by_class is not None:
            of["per_class"] = [None if math.isnan(v) else v for v in scores.per_class.tolist()]
        if scores.confusion is not None:
            of["confusion"] = scores.confusion.tolist()
        encoders.append(of)
    return {
        "method": result.method,
        "path": result.path,
        "verdict": result.verdict,
        "note": result.note,
        "train_images": result.train_images,
        "test_images": result.test_images,
        "held_out": result.held_out,
        "classes": list(result.classes),
        "encoders": encoders,
        "settings": result.settings,
        "sacl_fast": _version.__version__,
    }


def figure_from(value: dict[str, Any]) -> Figure:
    """A figure of ``as_dict``; earlier versions wrote of its interval the margin alone."""
    mean, margin = value["mean"], value["margin"]
    if margin is None:
        return Figure(mean)
    return Figure(mean, value.get("low", mean - margin), value.get("high", mean + margin))


def _how(result: Result) -> str:
    settings, images = result.settings, counted(result.train_images, "training image")
    if result.method == "knn":
        k, temperature = settings["eval"]["k"], settings["eval"]["temperature"]
        return f"Weighted kNN among {images}, k {k}, temperature {temperature:g}."
    if result.method == "finetune":
        few = f" ({result.few_labels}, seed {settings['seed']})" if result.few_labels else ""
        rate = f"learning rate {settings['lr']:g}"
        if (backbone := settings["backbone_lr"]) is not None:
            rate += f", of the pre-trained encoder {backbone:g}"
        return (
            f"All weights trained on {images}{few}: {counted(settings['steps'], 'step')} of "
            f"{settings['batch_size']}, {rate}, {settings['size']} px."
        )
    if result.method == "linear":
        return (
            f"A linear layer trained on {images} (random resized crop and flip) by "
            f"{counted(settings['epochs'], 'epoch')} of SGD."
        )
    if result.method == "linear-fast":
        return (
            f"Logistic regression by L-BFGS on the standardised features of {images} (not "
            "augmented), weight decay chosen on a tenth of them."
        )
    return (
        f"{settings['draws']} draws of {images}: nearest class mean of so many images per class, "
        "logistic regression of so many percent."
    )


def _markdown_table(rows: list[list[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]


def _escaped(name: str) -> str:
    return plain_text(name).replace("|", "\\|")


def _confusion_png(result: Result) -> bytes:
    """A panel for each trained encoder: rows are classes, columns what they were taken for, in
    percent of the images of a class."""
    shown = [scores for scores in result.scores if scores.control] or [result.scores[0]]
    classes, count = result.classes, len(result.classes)
    side = min(14.0, 3.2 + 0.32 * count)
    picture = Picture(figsize=(side * len(shown), side + 1.0), dpi=110, layout="compressed")
    canvas = FigureCanvasAgg(picture)
    panels = np.atleast_1d(picture.subplots(1, len(shown)))
    for axes, scores in zip(panels, shown, strict=True):
        assert scores.confusion is not None
        images = np.maximum(scores.confusion.sum(axis=1, keepdims=True), 1)
        share = 100.0 * scores.confusion / images
        axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        top1 = scores.figures["top-1"].mean
        axes.set_title(f"{scores.name}: {top1:.1f} %", loc="left", fontsize=11)
        axes.set_xlabel("taken for (% of the images of a class)")
        axes.set_ylabel("class")
        if count <= _NAMED:
            names = [drawable(name, f"class {nth}")[:20] for nth, name in enumerate(classes)]
            names = [name.replace("$", r"\$") for name in names]
            axes.set_xticks(range(count), names, rotation=90, fontsize=8)
            axes.set_yticks(range(count), names, fontsize=8)
        if count <= _NUMBERED:
            for i, j in np.ndindex(count, count):
                if share[i, j] >= 0.5:
                    color = "white" if share[i, j] > 60 else "black"
                    axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=color,
                              fontsize=7)  # fmt: skip
    buffer = io.BytesIO()
    # The matrices are squares: "tight" cuts off what the sheet has beyond them.
    canvas.print_figure(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()
