"""What libraries raise over damaged files, in one place.

A parser that meets garbage may fail in any of its lines, with its own errors or with Python's. Code
that reads a file of unknown origin catches ``DAMAGED`` around the library's call, and around
nothing else.
"""

from __future__ import annotations

import lzma
import struct
import tarfile
import zipfile
import zlib

DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, SyntaxError),
    *(OverflowError, MemoryError, RuntimeError),  # RuntimeError: depth, passwords, what is unknown
    *(struct.error, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
)
