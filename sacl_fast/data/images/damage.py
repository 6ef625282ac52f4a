"""What libraries raise over damaged files, in one place.

A parser that meets garbage fails in whatever line of it the garbage reaches: besides its own
errors come those of Python. Whoever reads a file of unknown origin catches ``DAMAGED`` around the
library's call, and nothing else there.
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
