"""Archives of image folders, unpacked once into the cache folder, whole or not at all.

A file beside the unpacked folder counts what is in it. A folder that has lost files since (cleaners
delete files that nobody read for a while) is unpacked anew. Links are made last, so that no member
is written through one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sacl_fast.data.images.cache import cache_key, exclusive, make_part
from sacl_fast.data.images.damage import DAMAGED
from sacl_fast.data.images.tar import TooMuch, WholeTar, unended
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import whole_file

logger = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")

_COUNTED = ".sacl-fast-contents"
# Images hardly compress. An archive may hold a quarter of a GiB, and beyond that 50 times its size.
_FREE, _RATIO = 2**28, 50
_CHUNK = 1 << 20  # bytes copied at a time
_LONGEST_LINK = 4096  # bytes: longer paths cannot be followed


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, cache: Path) -> Path:
    """The folder with the contents of ``archive``, unpacked below ``cache`` unless it is there.

    The folder belongs to this path, size and modification time. It appears complete or not at
    all, and of several processes one unpacks while the others wait.
    """
    try:
        status = archive.stat()
        key = cache_key(archive.resolve(), status.st_size, status.st_mtime_ns)
        folder = cache / "unpacked" / f"{archive.name.split('.')[0][:40]}-{key}"
        if not _is_whole(folder):
            make_part(cache, "unpacked")
            with exclusive(folder.with_name(f".{folder.name}.lock")) as held:
                if not _is_whole(folder):
                    _unpack(archive, folder, alone=held)
        if not json.loads((folder / _COUNTED).read_bytes())["ended"]:
            logger.warning("%s", unended(archive))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"cannot unpack {archive} into {cache / 'unpacked'}: {reason_of(error)}{where}; "
            "data.cache_dir names another folder for it"
        ) from None
    return folder


def _unpack(archive: Path, folder: Path, alone: bool) -> None:
    partial = f".{folder.name}.partial-"
    if alone:  # nobody else is at it, so these are what killed processes left
        for left in folder.parent.glob(f"{partial}*"):
            shutil.rmtree(left, ignore_errors=True)
    if os.path.lexists(folder):
        logger.warning("%s lacks some of what was unpacked there", folder)
    logger.info("unpacking %s into %s, once", archive, folder)
    temporary = folder.with_name(partial + secrets.token_hex(8))
    temporary.mkdir()
    try:
        ended = _extract(archive, temporary)
        contents = json.dumps({**_measured(temporary), "ended": ended}).encode()
        with whole_file(temporary / _COUNTED) as file:
            file.write(contents)
        try:
            os.rename(temporary, folder)
        except OSError:
            if _is_whole(folder):  # another process was faster: same contents
                return
            os.rename(folder, folder.with_name(partial + secrets.token_hex(8)))
            os.rename(temporary, folder)
    finally:
        for left in folder.parent.glob(f"{partial}*") if alone else [temporary]:
            shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether ``folder`` is there with all that was unpacked into it."""
    try:
        counted = json.loads((folder / _COUNTED).read_bytes())
        return counted == {**_measured(folder), "ended": bool(counted["ended"])}
    except DAMAGED:  # it is not there, for the most part
        return False


def _measured(folder: Path) -> dict[str, int]:
    """How many files lie in ``folder`` and below, links included, and their bytes."""
    files, size, folders = 0, 0, [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name != _COUNTED:
                    files, size = files + 1, size + entry.stat(follow_symlinks=False).st_size
    return {"files": files, "bytes": size}


# --- out of the archive --------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A member of an archive: a folder, a file with its ``data``, or a link to ``linked``."""

    name: str
    kind: str  # "folder", "file", "link" or "hard link"
    data: Callable[[], IO[bytes]] | None = None
    linked: str = ""


class _End(NamedTuple):
    """That of an archive, and whether it is marked."""

    marked: bool


def _extract(archive: Path, folder: Path) -> bool:
    """Write what is in ``archive`` into ``folder``; whether the archive is marked to end there."""
    size = archive.stat().st_size
    most = _FREE + _RATIO * size
    free = shutil.disk_usage(folder).free
    members = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    try:
        file = archive.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {archive}: {reason_and_remedy(error)}") from None
    try:
        with file:
            return _write(members(file, folder, min(most, free)), folder)
    except tarfile.FilterError as error:
        raise UserError(f"{archive} is not safe to unpack: {reason_of(error)}") from None
    except TooMuch:
        if free < most:
            said = f"the {free / 2**30:.1f} GiB that are free in {folder.parent}"
            works = "data.cache_dir names a folder on another disk"
        else:
            said = f"{most / 2**30:.1f} GiB, and is {size / 2**20:.1f} MiB itself"
            works = "if that is meant, unpack it, and give the folder"
        raise UserError(f"{archive} holds more than {said}; {works}") from None
    except _Unwritten as error:
        raise error.reason from None
    except DAMAGED as error:
        raise UserError(
            f"{archive} is no readable archive: {reason_of(error)}; a whole one of "
            f"{', '.join(SUFFIXES)} works, or the unpacked folder"
        ) from None


class _Unwritten(Exception):
    """The disk, not the archive, is at fault."""

    def __init__(self, reason: OSError) -> None:
        self.reason = reason


def _write(entries: Iterator[_Entry | _End], folder: Path) -> bool:
    replaced, links, ended = 0, [], False
    for entry in entries:
        if isinstance(entry, _End):
            ended = entry.marked
            continue
        target = folder / entry.name
        try:
            (target if entry.kind == "folder" else target.parent).mkdir(parents=True, exist_ok=True)
            if entry.kind != "folder" and os.path.lexists(target):
                target.unlink()
                replaced += 1
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise tarfile.ReadError(f"a file and a folder are called {entry.name}") from None
        except OSError as error:
            raise _Unwritten(error) from None
        if entry.kind == "link":
            links.append((target, entry.linked))
        elif entry.kind == "hard link":
            _link(folder / entry.linked, target, entry)
        elif entry.data is not None:
            with entry.data() as data:
                _copy(data, target)
    for target, linked in links:
        if os.path.lexists(target):
            continue  # a later member of the name
        os.symlink(linked, target)
        leads_to = Path(os.path.realpath(target))
        if os.path.isabs(linked) or not leads_to.is_relative_to(os.path.realpath(folder)):
            raise tarfile.FilterError(f"{target.name} is a link to {linked}, outside of it")
    if replaced:
        logger.warning("%d members of the archive were replaced by later ones", replaced)
    return ended


def _copy(data: IO[bytes], target: Path) -> None:
    try:
        file = target.open("xb")
    except OSError as error:
        raise _Unwritten(error) from None
    with file:
        while chunk := data.read(_CHUNK):
            try:
                file.write(chunk)
            except OSError as error:
                raise _Unwritten(error) from None


def _link(existing: Path, target: Path, entry: _Entry) -> None:
    if not existing.is_file():
        raise tarfile.ReadError(f"{entry.name} is a link to {entry.linked}, which is not in it")
    try:
        os.link(existing, target)
    except OSError:  # the file system has none
        with existing.open("rb") as data:
            _copy(data, target)


def _tar_members(file, folder: Path, most: float) -> Iterator[_Entry | _End]:
    whole, total = WholeTar(file, most), 0
    for member in whole:
        total += member.size  # of sparse ones more than they take in the archive
        if total > most:
            raise TooMuch
        name = _inside(_with_slashes(member.name))
        tarfile.data_filter(member.replace(name=name, deep=False), os.fspath(folder))
        if member.isdir():
            yield _Entry(name, "folder")
        elif member.issym():
            yield _Entry(name, "link", linked=member.linkname)
        elif member.islnk():
            yield _Entry(name, "hard link", linked=_inside(_with_slashes(member.linkname)))
        else:
            yield _Entry(name, "file", lambda member=member: _data(whole.tar, member))
    yield _End(whole.ended)


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    data = tar.extractfile(member)
    assert data is not None, member.name  # it is a file
    return data


def _zip_members(file, folder: Path, most: float) -> Iterator[_Entry | _End]:
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > most:
        raise TooMuch
    for entry in entries:
        name = _zip_name(entry)
        if name.endswith("/"):
            yield _Entry(_inside(name), "folder")
        elif stat.S_ISLNK(entry.external_attr >> 16):
            with archive.open(entry) as data:
                linked = os.fsdecode(data.read(_LONGEST_LINK))
            yield _Entry(_inside(name), "link", linked=linked)
        else:
            yield _Entry(_inside(name), "file", lambda entry=entry: archive.open(entry))
    yield _End(True)


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The name of a member. Where it does not say that it is UTF-8, ``zipfile`` reads it as code
    page 437; macOS writes UTF-8 and does not say so."""
    name = entry.filename
    if not entry.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    by_windows = entry.create_system == 0
    return name.replace("\\", "/") if by_windows else _with_slashes(name)


def _with_slashes(name: str) -> str:
    """Archives made on Windows may have backslashes between folders, and no slash then."""
    return name if "/" in name else name.replace("\\", "/")


def _inside(name: str) -> str:
    """A name as a relative path that does not lead upwards."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise tarfile.FilterError(f"{name!r} would be written outside")
    return "/".join(parts)
