"""The draws of views as DALI's graph takes them: one array per decision, (n, ...) for n images.

They hold only what the view can need, so a graph built from their names has no needless operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.draw import ViewDraw, draw_view, sample_rng

# Name to an array over the batch.
Parameters = dict[str, np.ndarray]

_TONES = ("brightness", "contrast")


def jitter_slots(view: ViewConfig) -> tuple[str, ...]:
    """The operations of the colour jitter in the order in which the graph has them, each of which
    an image may pass or skip.

    torchvision applies the four in an order drawn for each image. Here brightness and contrast
    stand on both sides of saturation and hue, and saturation on both sides of hue, so that every
    image takes them in its own order, but that saturation stays next to hue. (Brightness and
    contrast commute with saturation but where values are clipped.)
    """
    tones = sum(getattr(view, name) > 0 for name in _TONES) if view.jitter > 0 else 0
    saturation, hue = (view.jitter > 0 and getattr(view, n) > 0 for n in ("saturation", "hue"))
    early = tuple(f"early{i}" for i in range(tones))
    late = tuple(f"late{i}" for i in range(tones)) if saturation or hue else ()
    middle = ("saturation0",) * saturation + ("hue",) * hue
    return (*early, *middle, *("saturation1",) * (saturation and hue), *late)


def is_tone(slot: str) -> bool:
    """Whether a slot is for brightness or contrast."""
    return slot.startswith(("early", "late"))


def parameter_names(view: ViewConfig) -> tuple[str, ...]:
    """What ``pack`` gives for this view: nothing for what never happens, no flag for what always
    does."""
    return tuple(_neutral(view, 0))


def _neutral(view: ViewConfig, count: int) -> Parameters:
    """The parameters of ``count`` images to which nothing happens."""

    def flags() -> np.ndarray:
        return np.zeros(count, bool)

    def factors(value: float) -> np.ndarray:
        return np.full(count, value, np.float32)

    found: Parameters = {
        "start": np.zeros((count, 2), np.float32),
        "end": np.ones((count, 2), np.float32),
    }
    for slot in jitter_slots(view):
        found[slot] = factors(0 if slot == "hue" else 1)
        if slot != "hue" or view.jitter < 1:
            found[f"{slot}_on"] = flags()
        if slot == "hue":
            found["hue_backward"] = flags()
            if view.hue > 1 / 6:
                found["hue_turns"] = np.zeros(count, np.int32)
        if is_tone(slot):
            found[f"{slot}_contrast"] = flags()
    for name in ("grayscale", "blur", "solarize"):
        if 0 < getattr(view, name) < 1:
            found[name] = flags()
    if view.blur > 0:
        found |= {"sigma": factors(1), "window": np.ones(count, np.int32)}
    return found


def pack(draws: Iterable[ViewDraw], count: int, views: ViewsConfig, view: ViewConfig) -> Parameters:
    """The draws of one view of ``count`` images as arrays over the images:

    - ``start``, ``end`` (n, 2): corners of the crop (y, x) in pixels; from right to left, if it is
      to be flipped.
    - ``grayscale``, ``blur``, ``solarize`` (n,): whether it happens.
    - for each slot S of ``jitter_slots`` the factor ``S`` and whether it happens, ``S_on``; of
      brightness and contrast whether it is the latter, ``S_contrast``.
    - ``hue``: the shift in sixths of the colour circle, 0 to 1; ``hue_backward``: to be taken the
      other way; ``hue_turns``: thirds of the circle besides, 0 to 2, where ``view.hue`` allows any.
    - ``sigma``, ``window``: of the blur, in pixels of the view.
    """
    found = _neutral(view, count)
    slots = jitter_slots(view)
    for i, draw in enumerate(draws):
        top, left, height, width = draw.crop
        sides = (left + width, left) if draw.flip else (left, left + width)
        found["start"][i], found["end"][i] = (top, sides[0]), (top + height, sides[1])
        if draw.jitter:
            _pack_jitter(found, i, draw.jitter, slots)
        if draw.sigma is not None:
            found["sigma"][i] = draw.sigma
            found["window"][i] = blur_taps(draw.sigma, views)
        flags = {
            "grayscale": draw.grayscale,
            "blur": draw.sigma is not None,
            "solarize": draw.solarize,
        }
        for name in flags.keys() & found.keys():
            found[name][i] = flags[name]
    return found


def _pack_jitter(
    found: Parameters, i: int, jitter: Sequence[tuple[str, float]], slots: Sequence[str]
) -> None:
    names = [name for name, _ in jitter]
    pivot = next((names.index(n) for n in ("hue", "saturation") if n in names), len(names))
    tones = {"early": 0, "late": 0}
    for position, (name, factor) in enumerate(jitter):
        if name == "hue":
            # Pillow keeps hue in 8 bits, torchvision cuts the shift to them, and both round down.
            turn = (math.trunc(255 * factor) - 0.5) / 255
            # A third of the circle is a permutation of the channels; the rest is a sixth at most.
            thirds = round(3 * turn)
            rest = 6 * turn - 2 * thirds
            found["hue"][i], found["hue_backward"][i] = abs(rest), rest < 0
            if "hue_turns" in found:
                found["hue_turns"][i] = thirds % 3
            if "hue_on" in found:
                found["hue_on"][i] = True
            continue
        if name == "saturation":
            first = position <= pivot or "saturation1" not in slots
            slot = "saturation0" if first else "saturation1"
        else:
            side = "early" if position < pivot else "late"
            slot = f"{side}{tones[side]}"
            tones[side] += 1
            found[f"{slot}_contrast"][i] = name == "contrast"
        found[slot][i], found[f"{slot}_on"][i] = factor, True


def draw_parameters(
    views: ViewsConfig, seed: int, epoch: int, indices: np.ndarray, sizes: np.ndarray
) -> tuple[Parameters, Parameters]:
    """The draws of both views of the images ``indices`` (n,), whose heights and widths are
    ``sizes`` (n, 2), packed."""
    images = list(zip(indices.tolist(), sizes.tolist(), strict=True))
    a, b = (
        pack(
            (
                draw_view(view, sample_rng(seed, epoch, index, which), width, height)
                for index, (height, width) in images
            ),
            len(images),
            views,
            view,
        )
        for which, view in enumerate((views.a, views.b))
    )
    return a, b


def blur_taps(sigma: float, views: ViewsConfig) -> int:
    """The window of a Gaussian blur: ``views.blur_window``, less the taps beyond some three sigma,
    which are 0.3 % of the weight and most of the time."""
    # No more than 2 size - 1 can be mirrored.
    return min(views.blur_window, 2 * max(1, round(3 * sigma)) + 1, 2 * views.size - 1)
