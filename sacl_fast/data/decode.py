"""Image files to 8-bit RGB, as torchvision's loader does it, without its surprises.

16-bit grayscale is scaled instead of clipped, palettes keep their transparent colours without a
warning, and every way a file can be broken is one exception with a reason. JPEGs are decoded in
full (no ``draft`` mode), so pixels are those of other frameworks.
"""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
from PIL import Image

# What Pillow's decoders raise on broken data: its own errors, and those of parsing garbage.
_BROKEN = (
    *(OSError, SyntaxError, EOFError, ValueError, TypeError, IndexError, KeyError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError, MemoryError),
)


class BadImage(Exception):
    """A file that holds no readable image; says why."""


def read_rgb(path: str) -> Image.Image:
    """The image in the file ``path``, mode RGB. BadImage where it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(image)
    except Image.UnidentifiedImageError:
        empty = os.path.getsize(path) == 0
        raise BadImage("the file is empty" if empty else "no known image format") from None
    except _BROKEN as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage(reason or type(error).__name__) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, whatever holds them
        wide = np.asarray(image).astype(np.float64)
        return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA") and (image.mode == "PA" or "transparency" in image.info):
        return image.convert("RGBA").convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied: by way of the plain mode
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")
