"""A text file with the path of one image in each line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from sacl_fast.data.decode import file_identity, read_bytes, read_rgb
from sacl_fast.errors import UserError


class FileListSource:
    """Image files by path.

    The N paths are one array of bytes, as the names of a ``Manifest`` are and for the same reason.
    """

    decoded = False

    def __init__(
        self, folder: str, paths: list[str], labels: np.ndarray, classes: tuple[str, ...]
    ) -> None:
        self.folder, self.labels, self.classes = folder, labels, classes
        self.paths = np.frombuffer(b"".join(os.fsencode(path) + b"\0" for path in paths), np.uint8)
        self.ends = np.flatnonzero(self.paths == 0)

    def __len__(self) -> int:
        return len(self.ends)

    def load(self, index: int):
        return read_rgb(self.name(index))

    def read(self, index: int) -> bytes:
        return read_bytes(self.name(index))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self._path(index))

    def identity(self, index: int) -> bytes:
        return file_identity(self.name(index), self._path(index))

    def _path(self, index: int) -> str:
        start = self.ends[index - 1] + 1 if index > 0 else 0
        return os.fsdecode(self.paths[start : self.ends[index]].tobytes())


def read_file_list(path: Path, labelled: bool) -> FileListSource:
    """The images that the lines of ``path`` name, relative to its folder or absolute.

    A line is a path, or a path, a tab and the name of its class; empty lines and those that begin
    with # do not count. Classes need a name in every line, and count only if ``labelled``.
    """
    try:
        lines = path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror}") from None
    entries = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    if not entries:
        raise UserError(f"the list {path} names no images; one path in each line works")
    names = sorted({entry[1].strip() for entry in entries if len(entry) > 1})
    folder, paths = str(path.absolute().parent), [entry[0].strip() for entry in entries]
    if not labelled or len(names) < 2 or any(len(entry) < 2 for entry in entries):
        return FileListSource(folder, paths, np.full(len(entries), -1), ())
    position = {name: i for i, name in enumerate(names)}
    labels = np.array([position[entry[1].strip()] for entry in entries])
    return FileListSource(folder, paths, labels, tuple(names))
