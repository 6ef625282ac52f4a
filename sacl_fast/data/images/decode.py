"""Image files to 8-bit RGB, as torchvision's loader does it, without its surprises.

16-bit grayscale and floats are scaled instead of clipped, palettes keep their transparent colours
without a warning, and every way a file can be broken is one exception with a reason. JPEGs are
decoded in full (no ``draft`` mode), so pixels are those of other frameworks.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.errors import reason_of

_MOST = DataConfig.max_file_bytes
# Formats whose header has the size that decoding gives; some others (ICO, EPS) find it then.
_TOLD = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "PPM", "TIFF")


class BadImage(Exception):
    """A file that holds no readable image; says why."""


def read_bytes(
    path: str,
    most: int = _MOST,
    offset: int = 0,
    size: int | None = None,
    first: int | None = None,
) -> bytes:
    """The contents of the file ``path``, or ``size`` bytes of it from ``offset`` on; of those the
    ``first`` alone, where that is given.

    BadImage where it cannot be read, is no regular file (a pipe would be waited for, a device has
    no end) or where that is more than ``most`` bytes.
    """
    try:
        _require_regular(os.stat(path))  # opening a device may set it off
        # What became a pipe since is opened without waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            _require_regular(status)
            wanted = status.st_size if size is None else size
            if wanted > most:
                raise BadImage(f"it has {wanted} bytes, and data.max_file_bytes is {most}")
            if offset + wanted > status.st_size:
                raise BadImage("the shard ends before it")
            wanted = wanted if first is None else min(wanted, first)
            file.seek(offset)
            data = file.read(wanted)
            while len(data) < wanted and (more := file.read(wanted - len(data))):
                data += more  # the system reads 2 GiB at a time, and less on some networks
            return data
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise BadImage(reason_of(error)) from error


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise BadImage(f"it is no file but {what}")


def file_identity(path: str, name: str) -> bytes:
    """``name`` and the size of the file ``path``, -1 where there is none."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):
        size = -1
    return os.fsencode(f"{name}\0{size}")


def decode_rgb(data: bytes) -> Image.Image:
    """The image in the encoded ``data``, mode RGB. BadImage where it cannot be read."""
    with _opened(data) as image:
        image.load()
        return to_rgb(image)


def image_size(data: bytes) -> tuple[int, int, bool]:
    """(width, height) of an image by its header, and whether decoding is sure to give them.
    ``data`` may be the beginning of a file; BadImage where that does not tell."""
    with _opened(data) as image:
        return *image.size, image.format in _TOLD


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
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise BadImage(reason_of(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, whatever holds them
        wide = np.asarray(image).astype(np.float64)
        return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _of_floats(np.asarray(image))
    if image.mode in ("P", "PA") and (image.mode == "PA" or "transparency" in image.info):
        return image.convert("RGBA").convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied: by way of the plain mode
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def _of_floats(gray: np.ndarray) -> Image.Image:
    """Of an image (H, W) of 0 to 1, or of 0 to 255."""
    low, high = float(gray.min()), float(gray.max())
    if not 0 <= low <= high <= 255:  # nor any NaN
        raise BadImage(f"its values are {low:g} to {high:g}; 0 to 1 and 0 to 255 work")
    whole = gray * (255 if high <= 1 else 1)
    return Image.fromarray(whole.round().astype(np.uint8)).convert("RGB")
