"""Image files to 8-bit RGB, as torchvision's loader does it, without its surprises.

16-bit grayscale is scaled instead of clipped, palettes keep their transparent colours without a
warning, and every way a file can be broken is one exception with a reason. JPEGs are decoded in
full (no ``draft`` mode), so pixels are those of other frameworks.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

# What Pillow's decoders raise on broken data: its own errors, and those of parsing garbage.
_BROKEN = (
    *(OSError, SyntaxError, EOFError, ValueError, TypeError, IndexError, KeyError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError, MemoryError),
)


class BadImage(Exception):
    """A file that holds no readable image; says why."""


def read_bytes(path: str) -> bytes:
    """The contents of the file ``path``. BadImage where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error


def file_identity(path: str, name: str) -> bytes:
    """``name`` and the size of the file ``path``, -1 where there is none."""
    try:
        size = os.stat(path).st_size
    except OSError:
        size = -1
    return os.fsencode(f"{name}\0{size}")


def read_rgb(path: str) -> Image.Image:
    """The image in the file ``path``, mode RGB. BadImage where it cannot be read."""
    return decode_rgb(read_bytes(path))


def decode_rgb(data: bytes) -> Image.Image:
    """The image in the encoded ``data``, mode RGB. BadImage where it cannot be read."""
    with _opened(data) as image:
        image.load()
        return _rgb(image)


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an image that all decoders decode alike: a JPEG of 8-bit RGB or gray, or
    an 8-bit RGB PNG without transparency, complete up to its end. None for any other; BadImage
    where not even its header can be read.
    """
    with _opened(data) as image:
        if image.format in ("JPEG", "MPO"):  # MPO: several JPEGs, of which the first counts
            plain = image.mode in ("RGB", "L") and data.rfind(b"\xff\xd9", -64) >= 0
        elif image.format == "PNG":
            bits = data[24:25]  # of a channel
            plain = image.mode == "RGB" and bits == b"\x08" and "transparency" not in image.info
            plain = plain and data.endswith(b"IEND\xaeB`\x82")
        else:
            plain = False
        return image.size if plain else None


def to_ppm(image: Image.Image) -> bytes:
    """An RGB image in the simplest of formats."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read, and BadImage for all that Pillow may raise over it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Image.UnidentifiedImageError:
        raise BadImage("no known image format" if data else "the file is empty") from None
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
