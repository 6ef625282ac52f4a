"""What features look like: the images that are shown, as a page and as pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from sacl_fast import _version
from sacl_fast.checks import counted
from sacl_fast.config.looking import FeaturesConfig
from sacl_fast.data.images.decode import BadImage
from sacl_fast.evaluation.progress import EvaluationProgress
from sacl_fast.looking import html
from sacl_fast.looking.features import Features
from sacl_fast.looking.neighbours import (
    Neighbours,
    Purity,
    look_alike,
    neighbours_of,
    purity_of,
    spread_choice,
)
from sacl_fast.looking.pictures import COLOURS, LEGEND, drawn_names, grid_png, scatter_png
from sacl_fast.looking.projection import Plane, clusters_of, plane_of

_PLOTTED = 20_000  # points of the picture, at most
_PAIRS = 24


@dataclass(frozen=True)
class Look:
    """What was found of the features of images."""

    groups: np.ndarray
    """(N,) class or cluster of each image."""
    names: tuple[str, ...]
    """Of the groups."""
    clustered: bool
    queries: np.ndarray
    nearest: Neighbours
    """Of the queries, among all images."""
    purity: Purity | None
    shown: np.ndarray
    """(M,) the images on the page."""
    plotted: np.ndarray
    """(P,) the images of the picture, sorted; those on the page are among them."""
    plane: Plane
    """Of ``plotted``, in two dimensions."""
    near: Neighbours
    """Of each of those, among those: positions in ``shown``."""
    thumbnails: dict[int, Image.Image]
    """Of up to 64 px, by image."""
    alike: list[tuple[int, int]]
    """Pairs of images that are one picture, or nearly so."""
    folder: str
    """In which all images with a thumbnail are: names are shown without it."""

    def name(self, found: Features, i: int) -> str:
        """What an image is called on the page."""
        return html.short(found.name(i).removeprefix(self.folder))

    @property
    def kind(self) -> str:
        return "cluster" if self.clustered else "class"

    def group(self, i: int) -> str:
        """The name of an image's class or cluster."""
        return self.names[self.groups[i]] if self.groups[i] >= 0 else "no label"


def look_at(found: Features, settings: FeaturesConfig, *, quiet: bool = False) -> Look:
    """Clusters, neighbours and thumbnails of features."""
    seed = settings.seed
    clustered = len(found.classes) < 2
    with EvaluationProgress(quiet=quiet) as progress:
        tell = progress.steps("clusters, dimensions and neighbours", 3)
        groups = clusters_of(found, settings.clusters, seed) if clustered else found.labels
        tell()
        queries = spread_choice(groups, settings.queries, seed + 1)
        nearest = neighbours_of(found, queries, settings.neighbours)
        shown = spread_choice(groups, settings.shown, seed)
        part = Features(
            found.directions(shown), found.labels[shown], found.classes,
            found.splits[shown], found.index[shown], {}, {}, found.sources,
        )  # fmt: skip
        plotted = np.arange(len(found))
        if len(found) > _PLOTTED:
            rng = np.random.default_rng(seed)
            plotted = np.union1d(rng.choice(len(found), _PLOTTED, replace=False), shown)
        plane = plane_of(found, plotted, settings.project, seed)
        near = neighbours_of(part, np.arange(len(shown)), settings.neighbours)
        tell()
        purity = purity_of(found, settings.neighbours, seed)
        tell()
        wanted = np.unique(np.concatenate([shown, queries, nearest.index.ravel()]))
        tell = progress.steps("thumbnails", len(wanted))
        thumbnails = {int(i): _thumbnail(found, int(i), tell) for i in wanted}
    if clustered:
        names = tuple(f"cluster {i + 1}" for i in range(int(groups.max()) + 1))
    else:
        names = found.classes
    pairs = _pairs(shown, shown[near.index]) | _pairs(queries, nearest.index)
    folder = _common_folder([found.name(i) for i in thumbnails])
    alike = [(a, b) for a, b in sorted(pairs) if look_alike(thumbnails[a], thumbnails[b])]
    return Look(
        groups=groups,
        names=names,
        clustered=clustered,
        queries=queries,
        nearest=nearest,
        purity=purity,
        shown=shown,
        plotted=plotted,
        plane=plane,
        near=near,
        thumbnails=thumbnails,
        alike=alike,
        folder=folder,
    )


def _common_folder(names: list[str]) -> str:
    """The folder that all of the paths are in, with its slash; '' where there is none."""
    first, *others = (name.split("/")[:-1] for name in names)
    count = len(first)
    for other in others:
        while first[:count] != other[:count]:
            count -= 1
    return "".join(f"{part}/" for part in first[:count])


def _pairs(images: np.ndarray, others: np.ndarray) -> set[tuple[int, int]]:
    """Each image (n,) with each of its others (n, k), the lower one first."""
    both = np.stack([np.broadcast_to(images[:, None], others.shape), others], axis=-1)
    return {(a, b) for a, b in np.sort(both, axis=-1).reshape(-1, 2).tolist()}


def _thumbnail(found: Features, i: int, tell: Callable[[], None]) -> Image.Image:
    try:
        image = found.load(i)
        image.thumbnail((html.THUMBNAIL, html.THUMBNAIL))
    except BadImage:  # gone since its features were computed
        image = Image.new("RGB", (html.THUMBNAIL, html.THUMBNAIL), "#BBBBBB")
    tell()
    return image


def picture_of(found: Features, look: Look) -> bytes:
    """The PNG of two dimensions of the features."""
    groups = f"by {'k-means cluster' if look.clustered else 'class'}"
    count = len(look.plotted)
    some = "" if count == len(found) else f"{count:,} of "
    title = f"{look.plane.title} of features, {some}{counted(len(found), 'image')}, {groups}"
    return scatter_png(look.plane, look.groups[look.plotted], look.names, title)


def grid_of(found: Features, look: Look) -> bytes:
    """The PNG of the queries and their neighbours."""
    rows = []
    names = [*drawn_names(look.names), "no label"]  # the last is that of group -1
    for query, others, cosines in zip(look.queries, *look.nearest, strict=True):
        row = [(look.thumbnails[int(query)], names[look.groups[query]], False)]
        for other, cosine in zip(others, cosines, strict=True):
            same = not look.clustered and _same(look, query, other)
            said = f"{cosine:.3f} {names[look.groups[other]]}"
            row.append((look.thumbnails[int(other)], said, same))
        rows.append(row)
    return grid_png(rows)


def page_of(found: Features, look: Look, settings: FeaturesConfig) -> bytes:
    """The HTML page."""
    said = found.settings
    title = f"Features: {said.get('path', said['encoder'])}"
    described = f"{said['encoder']}, {said.get('width', 'dense')} encoder"
    body = [
        f"<header><h1>{html.text(title)}</h1>",
        f'<p class="soft">{counted(len(found), "image")}, '
        f"{counted(found.features.shape[1], 'feature')} of "
        f"{html.text(described)}</p></header><main>",
        _figures(found, look),
        _explorer(look),
        _queries(found, look),
        _alike(found, look),
        "<h2>How</h2>",
        "<p>Neighbours, clusters and dimensions are of features at length 1 (cosine).</p>",
        html.table(_settings(found, settings)),
        "</main>",
    ]
    return html.document(
        *(title, "\n".join(body)),
        command="features",
        script="features.js",
        data=_data(found, look),
    )


def purity_line(look: Look) -> str:
    """The purity of neighbours in a sentence; '' without labels."""
    of = look.purity
    if of is None:
        return ""
    return (
        f"{of.same.mean:.1f} % of the {of.k} nearest neighbours are of the image's own class "
        f"({of.chance:.1f} % by chance; {counted(of.images, 'image')})"
    )


def _figures(found: Features, look: Look) -> str:
    items = [("images", f"{len(found):,}")]
    if (of := look.purity) is not None:
        items += [
            (f"of the {of.k} nearest are of the same class", f"{of.same.mean:.1f} %"),
            ("by chance", f"{of.chance:.1f} %"),
            (
                f"kNN accuracy (k {of.k}, {counted(of.images, 'image')})",
                f"{of.accuracy.mean:.1f} %",
            ),
        ]
    if look.clustered:
        items.append(("clusters, for want of labels", str(len(look.names))))
    items.append(("pairs that look alike, of those shown", str(len(look.alike))))
    if found.bad:
        items.append(("unreadable images left out", f"{len(found.bad):,}"))
    cells = [f"<li><strong>{value}</strong>{html.text(name)}</li>" for name, value in items]
    return f'<ul class="figures">{"".join(cells)}</ul>'


def _explorer(look: Look) -> str:
    plane = look.plane
    axes = [html.text(axis) for axis in plane.axes]
    return f"""<h2>{len(look.shown):,} of the images</h2>
<noscript><p>Looking at single images needs JavaScript; neighbours of some are below.</p></noscript>
<div class="filter"><label for="filter">{look.kind}</label> <select id="filter"></select>
<span id="count" class="soft" role="status"></span></div>
<div class="look"><div><svg class="plane" id="plane" viewBox="0 0 720 480" role="img"
 aria-label="{plane.title} of the features; the images below are the same ones">
<text x="712" y="474" text-anchor="end">{axes[0]}</text>
<text x="-8" y="14" transform="rotate(-90)" text-anchor="end">{axes[1]}</text></svg>
<p class="soft">{plane.title}. Point at a dot to see the image; click on one, or on an image below,
 for its nearest neighbours.</p>
<ul class="legend soft" id="legend"></ul></div>
<section class="panel" id="panel" aria-live="polite"><p class="soft">Choose an image.</p></section>
</div>
<div class="tiles scroll" id="tiles" role="group" aria-label="images"></div>"""


def _queries(found: Features, look: Look) -> str:
    rows = [
        "<h2>Nearest neighbours among all images</h2>",
        "<p>Each row: an image, and its nearest by cosine"
        + ("." if look.clustered else ", framed where they are of its class.")
        + "</p>",
    ]
    for query, others, cosines in zip(look.queries, *look.nearest, strict=True):
        figures = [_figure(found, look, int(query), look.group(query), False)]
        for other, cosine in zip(others, cosines, strict=True):
            same = not look.clustered and _same(look, query, other)
            said = f"{cosine:.3f} {look.group(other)}"
            figures.append(_figure(found, look, int(other), said, same))
        rows.append(f'<div class="row">{"".join(figures)}</div>')
    return "\n".join(rows)


def _alike(found: Features, look: Look) -> str:
    if not look.alike:
        return ""
    rows = [
        f"<h2>Pairs that look alike: {len(look.alike):,}</h2>",
        "<p>Neighbours whose pixels hardly differ: duplicates, or nearly so"
        + (f"; the first {_PAIRS}" if len(look.alike) > _PAIRS else "")
        + ".</p>",
    ]
    for pair in look.alike[:_PAIRS]:
        figures = [_figure(found, look, i, look.name(found, i), False) for i in pair]
        rows.append(f'<div class="row pair">{"".join(figures)}</div>')
    return "\n".join(rows)


def _figure(found: Features, look: Look, i: int, said: str, same: bool) -> str:
    name = html.text(look.name(found, i))
    source = f"data:image/jpeg;base64,{html.thumbnail(look.thumbnails[i])}"
    return (
        f'<figure{" class=same" * same} title="{name}"><img src="{source}" alt="{name}">'
        f'<figcaption class="name">{html.text(said)}</figcaption></figure>'
    )


def _same(look: Look, one: int, other: int) -> bool:
    return bool(look.groups[one] == look.groups[other] and look.groups[one] >= 0)


def _settings(found: Features, settings: FeaturesConfig) -> list[list[str]]:
    rows = [["setting", "value"], ["sacl-fast", _version.__version__]]
    for name, value in found.settings.items():
        if isinstance(value, dict):
            rows += [[f"{name}.{inner}", str(v)] for inner, v in value.items()]
        else:
            rows.append([name, str(value)])
    of_page = ("project", "clusters", "queries", "neighbours", "shown")
    return rows + [[name, str(getattr(settings, name))] for name in of_page]


def _data(found: Features, look: Look) -> dict[str, Any]:
    used = np.unique(look.groups[look.shown])
    names = [g for g in range(len(look.names)) if g in set(used.tolist())]
    position = {g: i for i, g in enumerate(names)}
    points = look.plane.points[np.searchsorted(look.plotted, look.shown)]
    images = []
    for nth, i in enumerate(look.shown.tolist()):
        near = zip(look.near.index[nth].tolist(), look.near.cosine[nth].tolist(), strict=True)
        images.append(
            {
                "name": look.name(found, i),
                "group": position.get(int(look.groups[i]), -1),
                "at": [round(float(v), 5) for v in points[nth]],
                "near": [[j, round(c, 4)] for j, c in near],
                "jpeg": html.thumbnail(look.thumbnails[i]),
            }
        )
    groups = [
        {"name": html.short(look.names[g]), **_style(i, len(names))} for i, g in enumerate(names)
    ]
    return {"images": images, "groups": groups, "told_apart": LEGEND}


def _style(nth: int, of: int) -> dict[str, Any]:
    if of > LEGEND:
        return {"colour": to_hex(colormaps["viridis"](nth / max(1, of - 1))), "shape": 0}
    return {"colour": COLOURS[nth % len(COLOURS)], "shape": nth // len(COLOURS)}
