"""What DALI is fed: encoded images, and everything random about their views as arrays.

The draws are those of ``data/augment.py``; here they become one array per decision, (n, ...) for
a batch of n images. Only what a view can need is among them, so a graph built from their names
has no operator too many.

Images that DALI and Pillow decode alike are handed on as they are. All others (CMYK, 16 bits,
transparency, GIF, WebP, ...) are decoded by Pillow and handed on as PPM, so that no image works
with one loader only. Broken files are found here too, by a check of header and end that costs
nothing while the bytes are at hand; a pass over all files before the first step would cost
minutes on a network disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sacl_fast.config import Config, ViewConfig, ViewsConfig
from sacl_fast.data.augment import ViewDraw, draw_view, sample_rng
from sacl_fast.data.decode import decode_rgb, plain_size, to_ppm
from sacl_fast.data.readers import first_readable
from sacl_fast.data.sources import Source

# Name to an array over the batch.
Parameters = dict[str, np.ndarray]

_TONES = ("brightness", "contrast")


class Feed(NamedTuple):
    """A batch as it leaves a worker."""

    images: Tensor
    """(n, H, W, 3) uint8 pixels, or (bytes,) uint8: the encoded images end to end"""
    ends: Tensor
    """(n,) int64: where each encoded image ends; empty for pixels"""
    a: Parameters
    b: Parameters
    index: Tensor
    """(n,) int64"""
    bad: list[tuple[int, str]]
    """unreadable images met, and why"""

    def arrays(self) -> np.ndarray | list[np.ndarray]:
        """The images as DALI takes them."""
        images = self.images.numpy()
        return np.split(images, self.ends.numpy()[:-1]) if len(self.ends) else images


class FeedReader(Dataset[Feed]):
    """(epoch, indices) to what DALI makes the views of those images from.

    For an unreadable image the next readable one is taken, cyclically. ``by_pillow`` holds the
    images that DALI turned out not to decode.
    """

    def __init__(self, source: Source, config: Config) -> None:
        self.source, self.views, self.seed = source, config.views, config.seed
        self.patience = int(config.data.max_bad_share * len(source))
        self.by_pillow: set[int] = set()

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Feed:
        epoch, wanted = key
        images, sizes, index, bad = [], [], wanted.copy(), {}
        for slot, i in enumerate(wanted.tolist()):
            found, index[slot] = first_readable(self._load, i, len(self.source), self.patience, bad)
            if found is None:  # more are bad than may be: the loader will say so
                nothing = torch.empty(0)
                return Feed(nothing, nothing, {}, {}, nothing, list(bad.items()))
            images.append(found[0])
            sizes.append(found[1])
        a, b = (
            pack(
                (
                    draw_view(view, sample_rng(self.seed, epoch, i, which), *size)
                    for i, size in zip(wanted.tolist(), sizes, strict=True)
                ),
                len(wanted),
                self.views,
                view,
            )
            for which, view in enumerate((self.views.a, self.views.b))
        )
        if images[0].ndim == 3:
            blob, ends = np.stack(images), np.empty(0, np.int64)
        else:
            blob, ends = np.concatenate(images), np.cumsum([len(image) for image in images])
        blob, ends, index = map(torch.from_numpy, (blob, ends, index))
        return Feed(blob, ends, a, b, index, list(bad.items()))

    def _load(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """An image for DALI, and its width and height. BadImage where it cannot be read."""
        data = self.source.read(index)
        if isinstance(data, np.ndarray):
            height, width, _ = data.shape
            return data, (width, height)
        size = None if index in self.by_pillow else plain_size(data)
        if size is None:
            image = decode_rgb(data)
            data, size = to_ppm(image), image.size
        return np.frombuffer(data, np.uint8), size


# --- draws to arrays -----------------------------------------------------------------------------


def jitter_slots(view: ViewConfig) -> tuple[str, ...]:
    """The operations of the colour jitter in the order in which the graph has them, each of which
    an image may pass or skip.

    torchvision applies the four in an order drawn for each image. Here brightness and contrast
    stand on both sides of saturation and hue, and saturation on both sides of hue, so that every
    image takes them in its own order, but that saturation stays next to hue. (Brightness and
    contrast change places with saturation without a trace but where values are clipped.)
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
    for place, (name, factor) in enumerate(jitter):
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
            slot = "saturation0" if place <= pivot or "saturation1" not in slots else "saturation1"
        else:
            side = "early" if place < pivot else "late"
            slot = f"{side}{tones[side]}"
            tones[side] += 1
            found[f"{slot}_contrast"][i] = name == "contrast"
        found[slot][i], found[f"{slot}_on"][i] = factor, True


def blur_taps(sigma: float, views: ViewsConfig) -> int:
    """The window of a Gaussian blur: ``views.blur_window``, less the taps beyond some three sigma,
    which are 0.3 % of the weight and most of the time."""
    # No more than 2 size - 1 can be mirrored.
    return min(views.blur_window, 2 * max(1, round(3 * sigma)) + 1, 2 * views.size - 1)
