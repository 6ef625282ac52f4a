"""Image folders: files by their listing, classes by the first level of folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sacl_fast.checks import counted
from sacl_fast.config import DataConfig
from sacl_fast.data.images import archives
from sacl_fast.data.images.cache import cache_folder
from sacl_fast.data.images.decode import file_identity
from sacl_fast.data.images.file_list import read_file_list
from sacl_fast.data.images.manifest import EXTENSIONS, Manifest, describe_kinds, list_images
from sacl_fast.data.images.root import existing_root, is_list
from sacl_fast.data.images.source import FileSource, Splits
from sacl_fast.data.images.splits import VAL, enter, few, find_splits
from sacl_fast.data.images.text import read_text
from sacl_fast.errors import UserError
from sacl_fast.files import kind_of

logger = logging.getLogger(__name__)

_TINY_LABELS = "val_annotations.txt"


class FolderSource(FileSource):
    """Image files of a listing."""

    def __init__(
        self,
        manifest: Manifest,
        labels: np.ndarray,
        classes: tuple[str, ...],
        most: int = DataConfig.max_file_bytes,
    ) -> None:
        super().__init__(labels, classes, most)
        self.manifest, self.folder_of = manifest, manifest.folder_of

    def __len__(self) -> int:
        return len(self.manifest)

    def name(self, index: int) -> str:
        manifest = self.manifest
        folder = manifest.folders[self.folder_of[index]]
        return os.path.join(manifest.root, folder, manifest.name(index))

    def identity(self, index: int) -> bytes:
        path = self.name(index)
        return file_identity(path, path.removeprefix(self.manifest.root))


def open_folder(config: DataConfig, _download: bool) -> Splits:
    """The images of ``data.root``: a folder, an archive of one, or a list of paths."""
    root, cache = existing_root(config), cache_folder(config.cache_dir)
    if kind_of(root) == "file":
        if is_list(root):
            return Splits(read_file_list(root, config), None)
        root = enter(archives.unpack(root, cache))
    return folder_splits(config, root, cache)


def folder_splits(config: DataConfig, root: Path, cache: Path) -> Splits:
    """The training and validation images in the folder ``root``."""
    train_root, val_root = find_splits(root)
    train = _labelled(list_images(train_root, cache), config)
    _warn_of_splits(train.manifest)
    if val_root is None or not train.classes:
        return Splits(train, None)
    return Splits(train, _validation(list_images(val_root, cache), train))


def _warn_of_splits(manifest: Manifest) -> None:
    """Warn where a folder that is trained on has the name of one for validation."""
    counted = [folder for folder, n in zip(manifest.folders, manifest.counts, strict=True) if n]
    held_out = [
        folder for folder in counted if any(part.lower() in VAL for part in folder.split("/"))
    ]
    if held_out:
        logger.warning(
            "the images in %s are trained on as well: folders for validation have a folder train "
            "beside them, in data.root (%s)",
            few(held_out, 3),
            manifest.root,
        )


def _require_images(manifest: Manifest) -> None:
    if len(manifest) == 0:
        skipped = describe_kinds(manifest.skipped)
        raise UserError(
            f"no images in {manifest.root}: files that end in {', '.join(EXTENSIONS)} count, in "
            f"it and in its folders{f' (there are {skipped})' if skipped else ''}"
        )


def _labelled(manifest: Manifest, config: DataConfig) -> FolderSource:
    """The training images, with the labels that ``data.labels`` gives them."""
    _require_images(manifest)
    rule = config.labels
    top = _top_folders(manifest)
    classes = tuple(dict.fromkeys(top[manifest.counts > 0].tolist()))  # sorted, as folders are
    if rule == "folder" and "" in classes:
        raise UserError(
            f"data.labels is folder, but some images ({manifest.counts[0]:,}) lie directly in "
            f"{manifest.root} (such as {manifest.name(0)}); every image in a class folder works, "
            "and so does data.labels none"
        )
    if rule == "folder" and len(classes) == 1:
        raise UserError(
            f"data.labels is folder, but {manifest.root} has one class folder only, {classes[0]}; "
            "two or more work, and so does data.labels none"
        )
    if rule == "none" or "" in classes or len(classes) == 1:
        labels, classes = np.full(len(manifest), -1), ()
    else:
        labels = _positions(manifest, top, classes)
    return FolderSource(manifest, labels, classes, config.max_file_bytes)


def _validation(manifest: Manifest, train: FolderSource) -> FolderSource:
    """The validation images, labelled with the classes of ``train``."""
    _require_images(manifest)
    top = _top_folders(manifest)
    unknown = sorted(set(top[manifest.counts > 0].tolist()) - set(train.classes))
    annotations = Path(manifest.root, _TINY_LABELS)
    if unknown and kind_of(annotations) == "file":
        labels = _annotated(annotations, manifest, train.classes)
    elif unknown:
        found = few(unknown)
        what = f"the folder {found}, which is" if len(unknown) == 1 else f"{found}, which are"
        if unknown[0] == "":
            what = f"{counted(int(manifest.counts[0]), 'image')} without a class folder, which is"
        raise UserError(
            f"{manifest.root} holds {what} none of the class folders of {train.manifest.root} "
            f"({few(train.classes)}); the same class folders in both work, so do class names in "
            f"{annotations.name} beside the images (a line each: file name, tab, class), and so "
            "does data.labels none where no labels are needed"
        )
    else:
        labels = _positions(manifest, top, train.classes)
    return FolderSource(manifest, labels, train.classes, train.most)


def _annotated(path: Path, manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
    """(N,) int64: positions in ``classes`` by the lines of ``path``, as Tiny-ImageNet has them."""
    position = {name: index for index, name in enumerate(classes)}
    columns = [line.split("\t") for line in read_text(path).split("\n") if "\t" in line]
    class_of = {row[0].strip(): row[1].strip() for row in columns}
    names = [manifest.name(index) for index in range(len(manifest))]
    missing = [name for name in names if class_of.get(name) not in position]
    if missing:
        raise UserError(
            f"{path} has no class of the training images for {len(missing)} of "
            f"{counted(len(names), 'image')} "
            f"({few(missing, 3)}); data.labels none works where none are needed"
        )
    return np.array([position[class_of[name]] for name in names], np.int64)


def _top_folders(manifest: Manifest) -> np.ndarray:
    """(F,) str: the folder directly below the root in which each folder lies, "" for the root."""
    return np.array([folder.partition("/")[0] for folder in manifest.folders], dtype=object)


def _positions(manifest: Manifest, top: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    position = {name: index for index, name in enumerate(classes)}
    return np.repeat([position.get(name, -1) for name in top], manifest.counts)
