"""A picture of the views: what the encoder will see, looked at before hours are spent on it."""

from __future__ import annotations

from pathlib import PurePath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sacl_fast.config import Config
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.open import read_views
from sacl_fast.data.views.draw import epoch_order

_TILE = 128  # least side of a drawn view, pixels
_GAP, _MARGIN, _TEXT = 6, 64, 18
_BACKGROUND, _EMPTY, _INK = (255, 255, 255), (225, 225, 225), (60, 60, 60)
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def contact_sheet(source: Source, config: Config, *, count: int = 8, epoch: int = 0) -> Image.Image:
    """``count`` images of an epoch, a column each: the image, its view a, its view b.

    The views are those that training sees, before they are normalised.

    Raises:
        UserError: too many of the images are unreadable; others take the place of a few.
    """
    order = epoch_order(config.seed, epoch, len(source))[:count]
    views = read_views(source, config, epoch, order)
    bad = BadImages(source, config.data.max_bad_share)
    bad.add(views.bad)
    bad.drew(len(order), views.missed)
    indices = views.index.tolist()
    scale = max(1, round(_TILE / config.views.size))
    side = config.views.size * scale

    rows = ("image", "view a", "view b")
    width = _MARGIN + len(indices) * (side + _GAP)
    sheet = Image.new("RGB", (width, _TEXT + len(rows) * (side + _GAP)), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, title in enumerate(rows):
        middle = _TEXT + row * (side + _GAP) + side // 2
        draw.text((_GAP, middle), title, _INK, font, anchor="lm")
    for column, index in enumerate(indices):
        left = _MARGIN + column * (side + _GAP)
        draw.text((left, 2), _fitting(PurePath(source.name(index)).name, side, font), _INK, font)
        pixels = (_whole(source, index, side, font), views.a[column], views.b[column])
        for row, tile in enumerate(pixels):
            picture = tile if isinstance(tile, Image.Image) else Image.fromarray(np.asarray(tile))
            picture = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, _TEXT + row * (side + _GAP)))
    return sheet


def _whole(source: Source, index: int, side: int, font: _Font) -> Image.Image:
    """The image itself, or why Pillow cannot read what another decoder could."""
    try:
        return _letterboxed(source.load(index), side)
    except BadImage as error:
        square = Image.new("RGB", (side, side), _EMPTY)
        ImageDraw.Draw(square).text((2, 2), _fitting(str(error), side - 4, font), _INK, font)
        return square


def _letterboxed(image: Image.Image, side: int) -> Image.Image:
    """The whole image, scaled to fit a square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    square = Image.new("RGB", (side, side), _EMPTY)
    square.paste(
        image.resize((width, height), filter_), ((side - width) // 2, (side - height) // 2)
    )
    return square


def _fitting(text: str, width: int, font: _Font) -> str:
    """The end of a text, as much of it as fits."""
    while text and font.getlength(text) > width:
        text = text[1:]
    return text
