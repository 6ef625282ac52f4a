"""What ``data.root`` names: a folder, an archive or a list of paths, which must be there."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from sacl_fast.config import DataConfig
from sacl_fast.data.images import archives
from sacl_fast.data.images.pixel_file import is_cache
from sacl_fast.data.images.splits import are_beside, few
from sacl_fast.errors import UserError, reason_and_remedy
from sacl_fast.files import kind_of, user_path

LIST_SUFFIX = ".txt"


def existing_root(config: DataConfig) -> Path:
    """``data.root``. UserError where there is none, or where it is of no use."""
    if not config.root:
        raise UserError(
            "no images given: data.root takes a folder of images or an archive of one "
            f"({', '.join(archives.SUFFIXES)}); data.source demo needs none"
        )
    root = user_path(config.root, "data.root")
    kind = kind_of(root)
    if kind is None:
        raise UserError(f"data.root is {root}, which does not exist (from {Path.cwd()})")
    if kind != "folder" and not (kind == "file" and (archives.is_archive(root) or is_list(root))):
        if kind == "file" and is_cache(root):
            raise UserError(f"data.root is {root}, a cache; data.source cache reads it")
        what = "a file" if kind == "file" else "a pipe, a socket or a device"
        raise UserError(
            f"data.root is {root}, {what}; a folder of images, an archive of one "
            f"({', '.join(archives.SUFFIXES)}) or a list of paths ({LIST_SUFFIX}) works"
        )
    return root


def refuse_among_images(
    out: Path, config: DataConfig, works: str = "--out names a folder elsewhere"
) -> None:
    """Raise UserError where a file in the folder ``out``, which need not be there, would be read as
    an image, a class or a split of ``data.root`` by whatever opens that next.

    Hidden folders are not read, nor are those beside the splits; nor is anything but the shards,
    lists and files of their own in other sources.
    """
    if config.source not in ("folder", "webdataset") or not config.root:
        return
    root = user_path(config.root, "data.root")
    if kind_of(root) != "folder":
        return
    folder, whole = (Path(os.path.realpath(path)) for path in (out, root))
    if not folder.is_relative_to(whole):
        return
    parts = folder.relative_to(whole).parts
    if any(part.startswith(".") for part in parts) or (parts and are_beside(parts[0], whole)):
        return
    raise UserError(
        f"{out} is within the images of data.root ({root}), where what is written would be taken "
        f"for images or a class; {works}"
    )


def check_downloadable(config: DataConfig, root: Path, title: str, own: Collection[str]) -> None:
    """Raise UserError where ``root``, which ``data.root`` names, holds other things than a download
    does: nothing is to be put among the images of a user, or trained on in their place.

    Args:
        title: of the data set.
        own: names of what its download leaves in ``root``, whole or begun.
    """
    if kind_of(root) != "folder":
        return
    try:
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {reason_and_remedy(error)}") from None
    if names and not {*names} & {*own}:
        raise UserError(
            f"data.source is {config.source}, but {config.root or root} holds {few(names, 3)}, "
            f"which is no copy of {title}; --data.source folder opens images of one's own, and a "
            f"--data.root that is empty or missing gets {title} by download"
        )


def is_list(root: Path) -> bool:
    return root.suffix.lower() == LIST_SUFFIX
