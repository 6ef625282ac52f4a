"""``sacl-fast features`` from settings to files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sacl_fast.checks import counted
from sacl_fast.config.looking import FeaturesConfig
from sacl_fast.data.images.root import refuse_among_images
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.trained import Trained
from sacl_fast.files import kind_of, user_path, whole_file
from sacl_fast.looking import html
from sacl_fast.looking.features import features_of_trained
from sacl_fast.looking.files import check_writable, said_of, write_features
from sacl_fast.looking.page import grid_of, look_at, page_of, picture_of, purity_line
from sacl_fast.looking.pictures import SOFTWARE
from sacl_fast.looking.projection import check_projection

_HEAD = 4096  # bytes that say what made a page or a picture


class Written(NamedTuple):
    files: list[Path]
    lines: list[str]
    """What to say of them."""


def look_at_trained(trained: Trained, settings: FeaturesConfig, *, quiet: bool = False) -> Written:
    """Write the features of what ``open_trained`` found, and what they look like.

    Raises:
        UserError: as ``features_of_trained``; a file is there already (but for those of an earlier
            call at the default place), or cannot be written or read.
    """
    default = (trained.folder or trained.path.parent) / "features.npz"
    path = default if settings.out is None else user_path(settings.out, "out")
    check_writable(path)
    refuse_among_images(path.parent, settings.data)
    ends = (f"_{settings.project}.png", "_neighbours.png", ".html") if settings.pages else ()
    pages = [path.with_name(path.stem + end) for end in ends]
    check_new([path, *pages], again=path.absolute() == default.absolute())
    if settings.pages:
        check_projection(settings.project)
    with made_folder(path.parent):
        found = features_of_trained(trained, settings, path.parent, quiet=quiet)
        write_features(found, path)
    left_out = f"; {counted(len(found.bad), 'unreadable one')} left out" if found.bad else ""
    length = "of length 1" if settings.normalise else "as the encoder gives them"
    lines = [
        f"{counted(len(found), 'image')}{left_out}; "
        f"{counted(found.features.shape[1], 'feature')} each, {length}"
    ]
    if not settings.pages:
        return Written([path], lines)
    look = look_at(found, settings, quiet=quiet)
    if said := purity_line(look):
        lines.append(said)
    if look.alike:
        lines.append(f"of the images shown, {counted(len(look.alike), 'pair')} may be duplicates")
    contents = (picture_of(found, look), grid_of(found, look), page_of(found, look, settings))
    for page, content in zip(pages, contents, strict=True):
        write_whole(page, content)
    return Written([path, *pages], lines)


def check_new(paths: Iterable[Path], *, again: bool = False) -> None:
    """Refuse files that are there already; with ``again``, unless 'sacl-fast features' wrote them.

    Raises:
        UserError: there is one, or it cannot be told.
    """
    for path in paths:
        kind = kind_of(path)
        if kind == "folder":
            raise UserError(f"{path} is a folder; --out names a file")
        if os.path.lexists(path) and not (again and kind == "file" and _of_features(path)):
            whose = ", and not from 'sacl-fast features'" if again else ""
            raise UserError(f"{path} is there already{whose}; another --out works")


def _of_features(path: Path) -> bool:
    """Whether the command wrote this file."""
    try:
        if path.suffix == ".npz":
            return said_of(path) is not None
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    mark = html.generator("features") if path.suffix == ".html" else f"Software\0{SOFTWARE}"
    return mark.encode() in head


def write_whole(path: Path, content: bytes) -> None:
    """Raise UserError where it cannot be written; then what was there is as it was."""
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {reason_of(error)}; --out names another file"
        ) from error


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Have the folder; where nothing came of it, it is gone again."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make folder {folder}: {reason_of(error)}; --out names another file"
        ) from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
