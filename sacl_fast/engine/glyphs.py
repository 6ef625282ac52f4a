"""The font of the pictures, and which names it can draw."""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import findfont, get_font


@cache
def font_path() -> str:
    """Of DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic and others, but for
    Chinese, Japanese and Korean."""
    return str(findfont("DejaVu Sans"))


def drawable(name: str, instead: str) -> str:
    """``name``, or ``instead`` where the font lacks a glyph of it."""
    font = get_font(font_path())
    return name if all(font.get_char_index(ord(c)) for c in name) else instead
