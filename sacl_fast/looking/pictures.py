"""The pictures of features: two dimensions of them, and a grid of nearest neighbours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sacl_fast.engine.glyphs import drawable, font_path
from sacl_fast.looking.projection import Plane
from sacl_fast.output import plain_text

# Okabe & Ito's palette, told apart with every common colour blindness, without black, which a dark
# page swallows. Where colours do not suffice, shapes tell groups apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B5A900", "#7F7F7F")
SHAPES = ("o", "^", "s")
LEGEND = len(COLOURS) * len(SHAPES)  # groups that can be told apart
SOFTWARE = "sacl-fast features"  # by which a picture says what made it
_NAMED = 12  # of more, the largest, at their middle
_GAP, _TEXT, _LEFT = 4, 15, 8


def scatter_png(plane: Plane, groups: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """The points of a plane, coloured by group.

    Args:
        groups: (n,) positions in ``names``, -1 for none.
    """
    names = drawn_names(names)
    there = [g for g in range(len(names)) if (groups == g).any()]
    figure = Figure(figsize=(9.5, 6.8), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    size = float(np.clip(24_000 / max(1, len(groups)), 5, 40))
    few = len(there) <= LEGEND
    style: Any = {"s": size, "alpha": 0.75, "linewidths": 0}
    if (rest := groups < 0).any():
        axes.scatter(*plane.points[rest].T, color="#BBBBBB", label="no label", **style)
    if few:
        for nth, group in enumerate(there):
            axes.scatter(
                *plane.points[groups == group].T,
                color=COLOURS[nth % len(COLOURS)],
                marker=SHAPES[nth // len(COLOURS)],
                label=_short(names[group]),
                **style,
            )
    else:
        mixed = np.random.default_rng(0).permutation(np.flatnonzero(~rest))
        axes.scatter(*plane.points[mixed].T, c=groups[mixed], cmap="viridis", **style)
        _name_largest(axes, plane.points, groups, names)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(plane.axes[0])
    axes.set_ylabel(plane.axes[1])
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if few and (len(there) > 1 or rest.any()):
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, borderaxespad=0
        )
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set(sizes=[40], alpha=1)
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": SOFTWARE})
    return buffer.getvalue()


def _name_largest(axes: Axes, points: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> None:
    counts = np.bincount(groups[groups >= 0], minlength=len(names))
    for group in np.argsort(-counts, kind="stable")[:_NAMED]:
        x, y = np.median(points[groups == group], axis=0).tolist()
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
        axes.text(x, y, _short(names[int(group)]), fontsize=8, ha="center", va="center", bbox=box)


def drawn_names(names: Sequence[str]) -> list[str]:
    """The names of classes as a picture has them: the number of a class where the font cannot draw
    its name."""
    return [drawable(plain_text(name), f"class {number}") for number, name in enumerate(names)]


def _short(name: str) -> str:
    text = name if len(name) <= 24 else f"{name[:23]}…"
    # A leading underscore would hide it from the legend.
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def grid_png(rows: Sequence[Sequence[tuple[Image.Image, str, bool]]], side: int = 72) -> bytes:
    """A row for each query: itself, a gap, its neighbours. Each image comes with a line of text
    that the font can draw, and whether it is framed, as one of the query's class is."""
    columns = max(len(row) for row in rows)
    font = ImageFont.truetype(font_path(), 11)
    step = side + 2 * _GAP
    width = 2 * _GAP + columns * step + _LEFT
    sheet = Image.new("RGB", (width, _GAP + len(rows) * (step + _TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (image, text, framed) in enumerate(row):
            left = _GAP + c * step + (_LEFT if c else 0)
            top = _GAP + r * (step + _TEXT)
            if framed:
                outer = (left, top, left + side + _GAP, top + side + _GAP)
                draw.rectangle(outer, outline=COLOURS[2], width=_GAP // 2)
            tile = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left + _GAP // 2, top + _GAP // 2))
            while text and font.getlength(text) > side + _GAP:
                text = text[:-1]
            draw.text((left + 1, top + side + _GAP + 1), text, "#333333", font)
    buffer = io.BytesIO()
    made_by = PngInfo()
    made_by.add_text("Software", SOFTWARE)
    sheet.save(buffer, "PNG", pnginfo=made_by)
    return buffer.getvalue()
