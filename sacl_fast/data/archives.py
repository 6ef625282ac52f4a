"""Archives of image folders, unpacked once into the cache folder."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from sacl_fast.data.cache import cache_key, exclusive
from sacl_fast.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, cache: Path) -> Path:
    """The folder with the contents of ``archive``, unpacked below ``cache`` unless it is there.

    The folder belongs to this path, size and modification time. It appears complete or not at
    all, and of several processes one unpacks while the others wait.
    """
    status = archive.stat()
    key = cache_key(archive.resolve(), status.st_size, status.st_mtime_ns)
    folder = cache / "unpacked" / f"{archive.name.split('.')[0][:40]}-{key}"
    if folder.is_dir():
        return folder
    try:
        with exclusive(folder.with_name(f".{folder.name}.lock")) as held:
            if not folder.is_dir():
                _unpack(archive, folder, alone=held)
    except OSError as error:
        raise UserError(
            f"cannot unpack {archive} into {folder.parent}: {error}; data.cache_dir names another "
            "folder for it"
        ) from None
    return folder


def _unpack(archive: Path, folder: Path, alone: bool) -> None:
    partial = f".{folder.name}.partial-"
    if alone:  # nobody else is at it, so these are what killed processes left
        for left in folder.parent.glob(f"{partial}*"):
            shutil.rmtree(left, ignore_errors=True)
    logger.info("unpacking %s into %s, once", archive, folder)
    temporary = Path(tempfile.mkdtemp(prefix=partial, dir=folder.parent))
    try:
        _extract(archive, temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster: same contents
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    try:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)  # names that point outside are made to stay inside
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{archive} is not safe to unpack: {error}") from None
    except _BROKEN as error:
        raise UserError(f"{archive} is no readable archive: {error}") from None
    except (RuntimeError, NotImplementedError) as error:  # a password, an unknown compression
        raise UserError(f"{archive} cannot be unpacked: {error}") from None
