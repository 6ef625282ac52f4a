"""``sacl-fast features`` from settings to files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sacl_fast.config.looking import FeaturesConfig
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.trained import Trained
from sacl_fast.files import kind_of, user_path, whole_file
from sacl_fast.looking.features import features_of_trained
from sacl_fast.looking.files import check_writable, write_features
from sacl_fast.looking.page import grid_of, look_at, page_of, picture_of, purity_line
from sacl_fast.looking.projection import check_projection


class Written(NamedTuple):
    files: list[Path]
    lines: list[str]
    """What to say of them."""


def look_at_trained(trained: Trained, settings: FeaturesConfig, *, quiet: bool = False) -> Written:
    """Write the features of what ``open_trained`` found, and what they look like.

    Raises:
        UserError: as ``features_of_trained``; a file cannot be written or read.
    """
    path = (trained.folder or trained.path.parent) / "features.npz"
    if settings.out is not None:
        path = user_path(settings.out, "out")
    if kind_of(path) == "folder":
        raise UserError(f"{path} is a folder; --out names a file")
    check_writable(path)
    if settings.pages:
        check_projection(settings.project)
    with made_folder(path.parent):
        found = features_of_trained(trained, settings, path.parent, quiet=quiet)
        write_features(found, path)
    left_out = f"; {len(found.bad):,} unreadable ones left out" if found.bad else ""
    length = "of length 1" if settings.normalise else "as the encoder gives them"
    lines = [
        f"{len(found):,} images{left_out}; {found.features.shape[1]:,} features each, {length}"
    ]
    if not settings.pages:
        return Written([path], lines)
    look = look_at(found, settings, quiet=quiet)
    if said := purity_line(look):
        lines.append(said)
    if look.alike:
        lines.append(f"{len(look.alike):,} pairs of the images shown look alike: duplicates?")
    pages = {
        f"_{settings.project}.png": picture_of(found, look),
        "_neighbours.png": grid_of(found, look),
        ".html": page_of(found, look, settings),
    }
    files = [path]
    for end, content in pages.items():
        files.append(path.with_name(path.stem + end))
        write_whole(files[-1], content)
    return Written(files, lines)


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
