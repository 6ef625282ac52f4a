"""One HTML file with everything in it: style, script and images. It asks nothing of the network,
which its content security policy rules out, and opens from a folder.

What comes from users (names of files and classes) is escaped; a script gets its data as JSON in
ASCII, in which nothing can end the element.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from PIL import Image

from sacl_fast.output import plain_text

THUMBNAIL = 64  # pixels
_BYTES = 3 * 1024  # of a thumbnail, 4 KiB as text
_NAME = 200  # characters


def document(title: str, body: str, *, command: str, script: str = "", data: Any = None) -> bytes:
    """The page.

    Args:
        body: HTML.
        command: of sacl-fast, that makes the page.
        script: name of a script in ``page/``, for which ``data`` is.
    """
    style = _asset("page.css")
    code = _asset(script) if script else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'"
        f"; script-src {repr(_hash(code)) if code else repr('none')}; base-uri 'none'"
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        generator(command),
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{text(title)}</title>",
        f"<style>{style}</style></head><body>",
        body,
    ]
    if code:
        parts.append(f'<script id="data" type="application/json">{_json(data)}</script>')
        parts.append(f"<script>{code}</script>")
    parts.append("</body></html>\n")
    return "\n".join(parts).encode("ascii", "xmlcharrefreplace")


def generator(command: str) -> str:
    """What says in a page which command made it."""
    return f'<meta name="generator" content="sacl-fast {command}">'


def text(name: str) -> str:
    """A name as HTML text, or as the value of an attribute."""
    return html.escape(short(name))


def short(name: str) -> str:
    """A name as a page shows it: its end, where it is long."""
    shown = plain_text(name)
    return shown if len(shown) <= _NAME else f"…{shown[1 - _NAME :]}"


def table(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Rows of plain text, a heading first. ``numbers``: right-aligned but for the first column."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ("number" if numbers and i else "name" for i in range(len(cells)))
        inner = (
            f'<{tag} class="{kind}">{text(cell)}</{tag}>'
            for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    head, *body = rows
    lines = [row(head, "th"), *(row(cells, "td") for cells in body)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def picture(png: bytes, described: str) -> str:
    """An image in the text."""
    source = base64.b64encode(png).decode()
    return f'<img class="plot" src="data:image/png;base64,{source}" alt="{text(described)}">'


def thumbnail(image: Image.Image) -> str:
    """A JPEG of up to 64 px, in base64 of at most 4 KiB."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    for quality in (85, 70, 50, 30, 10):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= _BYTES:
            break
    return base64.b64encode(buffer.getvalue()).decode()


def _asset(name: str) -> str:
    return files("sacl_fast.looking").joinpath("page", name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _json(data: Any) -> str:
    dumped = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        dumped = dumped.replace(sign, f"\\u{ord(sign):04x}")
    return dumped
