"""A text file with the path of one image in each line."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.config import DataConfig
from sacl_fast.data.images.decode import file_identity
from sacl_fast.data.images.manifest import ends_of, is_image, packed, unpacked
from sacl_fast.data.images.source import FileSource
from sacl_fast.data.images.splits import few
from sacl_fast.data.images.text import read_text
from sacl_fast.errors import UserError

logger = logging.getLogger(__name__)

_LOOKED_AT = 10_000  # files, whether they are there: of a million, 7 s less


class FileListSource(FileSource):
    """Image files by path.

    The N paths are one array of bytes, as the names of a ``Manifest`` are and for the same reason.
    """

    def __init__(
        self,
        folder: str,
        paths: list[str],
        labels: np.ndarray,
        classes: tuple[str, ...],
        most: int = DataConfig.max_file_bytes,
    ) -> None:
        super().__init__(labels, classes, most)
        self.folder = folder
        self.paths = packed(paths)
        self.ends = ends_of(self.paths)

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self._path(index))

    def identity(self, index: int) -> bytes:
        return file_identity(self.name(index), self._path(index))

    def _path(self, index: int) -> str:
        return unpacked(self.paths, self.ends, index)


def read_file_list(path: Path, config: DataConfig) -> FileListSource:
    """The images that the lines of ``path`` name, relative to its folder or absolute.

    A line is a path, or a path, a tab and the name of its class. Empty lines and those that begin
    with # do not count, nor does a first one with a tab that is a header: it names no file there,
    nor anything that ends as images do. Classes need a name in every line, and count unless
    ``data.labels`` is none.

    Raises:
        UserError: it cannot be read, names no images, has other lines than these, or more than
            ``data.max_bad_share`` of the files are not there.
    """
    folder = str(path.absolute().parent)
    paths, classes, comments = [], [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip(" \t\r"):
            continue
        if line.startswith("#"):
            comments += [line] if is_image(line.rstrip(" ")) else []
            continue
        image, *rest = (column.strip(" ") for column in line.split("\t"))
        if len(rest) > 1 or not image:
            raise UserError(
                f"line {number} of {path} is {line[:200]!r}; a path works, or a path, a tab and "
                "the name of a class"
            )
        there = is_image(image) or os.path.lexists(os.path.join(folder, image))
        if rest and not paths and not there:
            logger.warning("left out the first line of %s, a header: %r", path, line[:200])
            continue
        paths.append(image)
        classes.append(rest[0] if rest else "")
    if comments:
        logger.warning(
            "left out %s of %s, with # in front: %s; ./%s would count",
            *(counted(len(comments), "line"), path, few(comments, 3), comments[0]),
        )
    if not paths:
        raise UserError(f"the list {path} names no images; one path in each line works")
    paths = [_with_slashes(folder, image) for image in paths]
    _require_files(path, folder, paths, config.max_bad_share)
    return FileListSource(folder, paths, *_labels(path, classes, config), config.max_file_bytes)


def _labels(path: Path, given: list[str], config: DataConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 and class names."""
    names = sorted(set(given) - {""})
    missing = given.count("")
    if missing and names and config.labels != "none":
        logger.warning(
            "no labels: %d of %s of %s have no class (such as that of image %d)",
            *(missing, counted(len(given), "line"), path, given.index("") + 1),
        )
    if config.labels == "none" or missing or len(names) < 2:
        return np.full(len(given), -1), ()
    position = {name: i for i, name in enumerate(names)}
    return np.array([position[name] for name in given]), tuple(names)


def _with_slashes(folder: str, path: str) -> str:
    """A path as Windows writes it, unless it is one as it stands."""
    if "\\" not in path or "/" in path or os.path.lexists(os.path.join(folder, path)):
        return path
    return path.replace("\\", "/")


def _require_files(listed: Path, folder: str, paths: list[str], most: float) -> None:
    """Say how many of the files are not there, before any is asked for."""
    some = paths[:: -(-len(paths) // _LOOKED_AT)]
    missing = [path for path in some if not os.path.isfile(os.path.join(folder, path))]
    if not missing:
        return
    looked_at = "" if len(some) == len(paths) else " that were looked at"
    said = (
        f"{len(missing)} of {len(some)} files of the list {listed}{looked_at} are not there, or "
        f"are no files, such as {os.path.join(folder, missing[0])}"
    )
    if len(missing) > most * len(some):
        raise UserError(f"{said}; data.max_bad_share is {most:g}")
    logger.warning("%s", said)
