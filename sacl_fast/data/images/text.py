"""Text files from elsewhere: whatever encoding and line ends the program that wrote them chose."""

from __future__ import annotations

import codecs
from pathlib import Path

from sacl_fast.data.images.decode import BadImage, read_bytes
from sacl_fast.errors import UserError

_MOST = 2**32  # bytes
_MARKS = (  # of four bytes first: those of UTF-32 begin with those of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: Path) -> str:
    """The text in ``path``, lines ended by line feeds alone.

    The encoding is what the byte order mark says; without a mark it is UTF-16 or UTF-8, in which
    bytes that are not UTF-8 stand for themselves, as in names of files. Do not take the text apart
    by ``str.splitlines``: it ends lines at characters that names of files may have.
    """
    try:
        data = read_bytes(str(path), _MOST)
    except BadImage as error:
        raise UserError(f"cannot read {path}: {error}") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:4096]:
        # Of UTF-16 without a mark, the zeros of plain letters are second or first.
        encoding = "utf-16-be" if data[:4096:2].count(0) > data[1:4096:2].count(0) else "utf-16-le"
    try:
        errors = "surrogateescape" if encoding in (None, "utf-8") else "strict"
        text = data.decode(encoding or "utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in {encoding}: {error}; UTF-8 works") from None
    if "\0" in text:
        raise UserError(f"{path} is no text: it holds bytes of zero; UTF-8 works")
    return text.replace("\r\n", "\n")
