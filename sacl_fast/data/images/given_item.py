"""One item of a data set that is given from Python: its image and its label."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sacl_fast.checks import shown
from sacl_fast.data.images.decode import BadImage, to_rgb
from sacl_fast.data.images.splits import few
from sacl_fast.errors import reason_of

_IMAGE_KEYS = ("image", "img")
LABEL_KEYS = ("label", "labels", "target", "class", "fine_label")
MISSING = type("Missing", (), {"__repr__": lambda _: "missing"})()
"""In a label's place: there is no such place."""
_WORKS = "an image of Pillow's or an array (H, W, 3) of uint8 works"


def pixels_of(item: Any) -> np.ndarray:
    """The image in an item: (H, W, 3) uint8. BadImage where there is none."""
    image = _image_in(item)
    try:
        pixels = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
    except Exception as error:  # whatever an image of somebody's raises when it is loaded
        raise BadImage(_said(error)) from error
    if pixels.dtype == np.uint8 and pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        what = f"{pixels.dtype} of shape {pixels.shape}" if pixels.ndim else shown(image)
        hint = "; without ToTensor it is that" if pixels.dtype.kind == "f" and pixels.ndim else ""
        raise BadImage(f"it is {what}, and {_WORKS}{hint}")
    if not pixels.size:
        raise BadImage(f"it has no pixels: shape {pixels.shape}")
    return np.ascontiguousarray(pixels)


def item_of(items: Any, index: int) -> Any:
    """The item, BadImage where it cannot be had."""
    try:
        return items[index]
    except Exception as error:  # somebody's code: whatever it raises, the image cannot be had
        raise BadImage(_said(error)) from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"


def _image_in(item: Any) -> Any:
    if isinstance(item, (tuple, list)):
        if not len(item):
            raise BadImage(f"the item is empty; {_WORKS}")
        return item[0]
    if isinstance(item, Mapping):
        key = first_key(item, _IMAGE_KEYS)
        images = [k for k, v in item.items() if isinstance(v, (Image.Image, np.ndarray))]
        if key is None and len(images) == 1:
            key = images[0]
        if key is None:
            raise BadImage(f"the item has no 'image' among {few([str(k) for k in item])}; {_WORKS}")
        return item[key]
    return item


def label_in(item: Any) -> Any:
    """What stands in the label's place; ``MISSING`` where there is none."""
    if isinstance(item, (tuple, list)):
        return item[1] if len(item) > 1 else MISSING
    if isinstance(item, Mapping):
        key = first_key(item, LABEL_KEYS)
        return MISSING if key is None else item[key]
    return MISSING


def first_key(item: Iterable[Any], keys: Sequence[str]) -> str | None:
    there = list(item)
    return next((key for key in keys if key in there), None)


def plain_label(value: Any) -> int | str | None:
    """A label as a number or a text; None where it is neither."""
    if isinstance(value, str):
        return str(value)
    item: Callable[[], Any] | None = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = item()
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if whole else None
