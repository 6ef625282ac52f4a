"""Which folders and shards are for training and which for validation, by their names.

``train`` and ``val`` have many spellings: ``Training`` and ``Testing``, ``TRAIN``, ``seg_train``
and ``seg_test``, ``train_images``. A spelling that is not known would make a class of a split, and
what was held out for testing would be trained on.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sacl_fast.data.images.manifest import is_folder, is_image
from sacl_fast.errors import UserError, reason_and_remedy
from sacl_fast.output import plain_text

logger = logging.getLogger(__name__)

# Of several that are there, the first counts.
TRAIN = ("train", "training", "trainset", "trainval")
VAL = ("val", "valid", "validation", "valset", "eval", "test", "testing", "testset")
_BOTH = {*TRAIN, *VAL}
_DEEPEST = 4  # folders that wrap all others


class SplitFolders(NamedTuple):
    train: Path
    """Where the training images are: the root itself where there are no splits."""
    val: Path | None


def find_splits(root: Path) -> SplitFolders:
    """The splits in ``root``, or in the one folder that it holds, if that has some.

    Raises:
        UserError: ``root`` cannot be read, or two folders in it go by one name.
    """
    return _splits_in(root) or _splits_in(enter(root)) or SplitFolders(root, None)


def split_by_name(shards: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The shards for training and for validation, by the words in their names; all for training
    where not every name has one of either."""
    said = [words_of(shard.stem) for shard in shards]
    held_out = [bool(words & {*VAL}) and not words & {*TRAIN} for words in said]
    if not any(held_out) or not any(words & {*TRAIN} for words in said):
        return list(shards), []
    unclear = [shard.name for shard, words in zip(shards, said, strict=True) if not words & _BOTH]
    if unclear:
        raise UserError(
            f"the shards in {shards[0].parent} are for training and for validation by their names, "
            f"but {few(unclear, 3)} for neither; folders train and val for them work"
        )
    pairs = list(zip(shards, held_out, strict=True))
    return [shard for shard, held in pairs if not held], [shard for shard, held in pairs if held]


def words_of(name: str) -> set[str]:
    """The words in a name, in lower case: of ``seg_train``, ``TrainImages``, ``in1k-train-01``."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def few(names: Sequence[str], show: int = 5) -> str:
    """The first of some names, as a sentence can hold them, and how many more there are."""
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(plain_text(name) for name in names[:show]) + more


def are_beside(name: str, root: Path) -> bool:
    """Whether ``root`` holds splits, and what is in a folder ``name`` in it is of none of them, nor
    would be if that were made."""
    named = _named_splits(root)
    return named is not None and name not in named and not words_of(name) & _BOTH


def _splits_in(root: Path) -> SplitFolders | None:
    named = _named_splits(root)
    if named is None:
        return None
    train, val = named
    unused = [name for name in _look(root)[0] if name not in named]
    if unused:
        unknown = any(not words_of(name) & _BOTH for name in unused)
        logger.log(
            logging.WARNING if unknown else logging.INFO,
            "training images: %s; for validation: %s; folders beside them that are unused: %s",
            *(root / train, root / val if val else "none", few(unused)),
        )
    return SplitFolders(_unwrapped(root / train), _unwrapped(root / val) if val else None)


def _named_splits(root: Path) -> tuple[str, str | None] | None:
    """The folders in ``root`` for training and for validation, by their names."""
    names = _look(root)[0]
    train = _first(root, names, TRAIN)
    if train is not None:
        return train, _first(root, names, VAL)
    # Words count only where both are found: train_steam and train_diesel are classes.
    said = {name: words_of(name) for name in names}
    trains = [name for name in names if said[name] & {*TRAIN} and not said[name] & {*VAL}]
    vals = [(word, name) for word in VAL for name in names if word in said[name]]
    return (trains[0], vals[0][1]) if len(trains) == 1 and vals else None


def _first(root: Path, names: list[str], known: Sequence[str]) -> str | None:
    for word in known:
        found = [name for name in names if name.lower() == word]
        if len(found) > 1:
            raise UserError(
                f"{root} holds the folders {few(found)}, which go by one name; one of them works"
            )
        if found:
            return found[0]
    return None


def enter(root: Path) -> Path:
    """``root`` without the folders that wrap everything in it."""
    for _ in range(_DEEPEST):
        names, images = _look(root)
        if len(names) != 1 or images or names[0].lower() in TRAIN:
            break
        root = root / names[0]
    return root


def _unwrapped(folder: Path) -> Path:
    """``seg_train/seg_train``, as some archives have it, is ``seg_train``."""
    names, images = _look(folder)
    return folder / names[0] if names == [folder.name] and not images else folder


def _look(root: Path) -> tuple[list[str], bool]:
    """The visible folders in ``root``, and whether there are images or shards beside
    them."""
    names, images = [], False
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if is_folder(entry):
                    names.append(entry.name)
                else:
                    images = images or is_image(entry.name) or entry.name.endswith(".tar")
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {reason_and_remedy(error)}") from None
    return sorted(names), images
