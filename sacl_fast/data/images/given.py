"""Images that are given from Python: any indexable of them, as a source.

``source[index]`` is an image; or a tuple that begins with one and has its label next; or a mapping
with both, as rows of a Hugging Face ``datasets.Dataset`` are. An image is one of Pillow's, of any
mode, or an array (H, W, 3) or (H, W) of uint8. What a label is: ``given_labels``.

Worker processes are forked, so nothing is pickled. What ``__init__`` opened (a file, a connection)
is shared among them, position in the file included: data sets that read from one open it anew
where the process is another. What is not a ``Source`` is never asked by two threads at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sacl_fast.checks import shown
from sacl_fast.config import DataConfig
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.given_item import item_of, label_in, pixels_of, plain_label
from sacl_fast.data.images.given_labels import NO_LABELS, Labels, labels_of
from sacl_fast.data.images.source import Source, Splits, Subset
from sacl_fast.data.images.splits import few
from sacl_fast.errors import UserError

_IDENTIFIED = 64  # images whose pixels tell a data set from another
_READ_TWICE = 4
_OF_A_SOURCE = ("classes", "labels", "decoded", "load", "read", "label", "name", "identity")


class Given(NamedTuple):
    """Training images and images to validate with, from Python; none."""

    source: Any = None
    val: Any = None


class GivenSource:
    """A ``Source`` of an indexable; ``title`` is what messages call it.

    What an item holds is looked at when it is read. One whose reading fails is an unreadable image.
    """

    decoded = True

    def __init__(self, items: Any, title: str) -> None:
        """
        Raises:
            UserError: it has no length or no items by index, is empty, or gives no images, or
                other ones each time.
        """
        self.items, self.title = items, title
        self.classes: tuple[str, ...] = ()
        self._count = _count(items, title)
        self.labels = np.full(self._count, -1)
        self.beside: dict[int, Any] = {}
        """Of some readable images, spread over the data set: what stands in the label's place."""
        self._broken: dict[int, str] = {}
        chosen = np.unique(np.linspace(0, self._count - 1, _IDENTIFIED).round().astype(int))
        self._identities = {index: self._look(index) for index in chosen.tolist()}
        if not self.beside:
            why = self._broken[0]
            raise UserError(f"{title} holds no image that can be read, for {self.name(0)}: {why}")
        for index in chosen[:: -(-len(chosen) // _READ_TWICE)].tolist():
            if self._look(index) != self._identities[index]:
                raise UserError(
                    f"{self.name(index)} is another image each time it is read; {title} without "
                    "random transforms works, since views of each image are drawn from it anyway"
                )
        self._broken.clear()

    def __len__(self) -> int:
        return self._count

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.read(index))

    def read(self, index: int) -> np.ndarray:
        index = int(index)
        if index in self._broken:  # no label was found for it
            raise BadImage(self._broken[index])
        return pixels_of(item_of(self.items, index))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def identity(self, index: int) -> bytes:
        """The pixels of some images, spread over the data set: reading all may take an hour."""
        return self._identities.get(index, b"")

    def read_label(self, index: int) -> Any:
        """What stands in the label's place of an item; where that cannot be read, the image is
        unreadable from then on, and has the label of another."""
        try:
            return label_in(item_of(self.items, index))
        except BadImage as error:
            self._broken[index] = str(error)
            labels = (value for value in self.beside.values() if plain_label(value) is not None)
            return next(labels, None)

    def _look(self, index: int) -> bytes:
        """What tells the image from another; its label is noted."""
        try:
            item = item_of(self.items, index)
            pixels = pixels_of(item)
        except BadImage as error:
            self._broken[index] = str(error)
            return b"unreadable"
        self.beside[index] = label_in(item)
        return b"%d %d " % pixels.shape[:2] + pixels.tobytes()


def open_given(config: DataConfig, _download: bool) -> Splits:
    """Never any images: those of such a run are in no file."""
    raise UserError(
        "data.source is python: the images of this run were given from Python, so they are to be "
        "given again, by the argument source= of sacl_fast.train, load_encoder, export or "
        "those of sacl_fast.evaluate; --data.source and --data.root name others"
    )


def given_splits(config: DataConfig, given: Given) -> Splits | None:
    """The images that are given; None where none are.

    Raises:
        UserError: they are no images by index, or their labels do not fit one another.
    """
    source, val = given
    if source is None:
        if val is not None:
            raise UserError("val= was given without source=; both, or source= alone, work")
        return None
    if config.labels == "folder":
        raise UserError(
            "data.labels is folder, but images that are given from Python lie in no folders; "
            "data.labels auto takes their labels, none does without"
        )
    train, held_out = _opened(source, "source"), None if val is None else _opened(val, "val")
    if config.labels == "none":
        return Splits(_unlabelled(train), None)
    if isinstance(train, GivenSource):
        _set_labels(train, labels_of(train), None)
    if held_out is None or not train.classes:
        return Splits(train, None)
    if isinstance(held_out, GivenSource):
        _set_labels(held_out, labels_of(held_out), train.classes)
    elif held_out.classes != train.classes:
        raise UserError(
            f"val has the classes ({few(held_out.classes)}) and source ({few(train.classes)}); the "
            f"same ones work, and {NO_LABELS}"
        )
    return Splits(train, held_out)


def refuse_both(data: DataConfig | None, given: Given) -> None:
    """Raise UserError where settings that were made for this call name images, and others are
    given: one would be ignored."""
    if data is None or given.source is None:
        return
    given_alone(data, given)
    if data.source not in ("folder", "python"):
        raise UserError(
            f"data.source is {data.source}, and source= gives images from Python; one of the two "
            "works"
        )


def as_given(config: DataConfig, given: Given) -> DataConfig:
    """The settings of images as a run records them where they are given from Python."""
    if given.source is None:
        return config
    return replace(config, source="python", root=None)


def given_alone(config: DataConfig, given: Given) -> DataConfig:
    """``as_given``, of settings that name no folder beside them. (A preset names a source.)

    Raises:
        UserError: they name one, which would be ignored.
    """
    if given.source is not None and config.root is not None:
        raise UserError(
            f"data.root is {config.root}, and source= gives images from Python; one of the two "
            "works"
        )
    return as_given(config, given)


# --- items ----------------------------------------------------------------------------------------


def _opened(given: Any, title: str) -> Source | GivenSource:
    if not all(hasattr(given, name) for name in _OF_A_SOURCE):
        return GivenSource(given, title)
    if not len(given):
        raise UserError(f"{title} holds no images; one or more work")
    return given


def _unlabelled(source: Source) -> Source:
    if not source.classes:
        return source
    images = Subset(source, np.arange(len(source)))
    images.classes, images.labels = (), np.full(len(source), -1)
    return images


def _count(items: Any, title: str) -> int:
    works = (
        "a list, an array (N, H, W, 3) or a data set with __len__ and __getitem__ works, of images "
        "or of tuples or mappings of an image and its label"
    )
    if isinstance(items, Mapping):
        raise UserError(
            f"{title} is a mapping of {few([str(key) for key in items])}; one of its values works"
        )
    if isinstance(items, (str, bytes)) or not hasattr(items, "__getitem__"):
        raise UserError(f"{title} is {shown(items)}, which has no images by index; {works}")
    if isinstance(items, np.ndarray) and items.ndim == 3 and items.shape[2] == 3:
        raise UserError(f"{title} is one image, of shape {items.shape}; {works}")
    try:
        count = len(items)
    except (TypeError, NotImplementedError):
        raise UserError(f"{title} is {shown(items)}, which has no length; {works}") from None
    if not count:
        raise UserError(f"{title} holds no images; one or more work")
    return count


# --- labels ---------------------------------------------------------------------------------------


def _set_labels(
    source: GivenSource, labels: Labels | None, classes: tuple[str, ...] | None
) -> None:
    """Give a source its labels; ``classes``: those of the training images, for validation."""
    if labels is None:
        if classes:
            raise UserError(
                f"{source.title} has no labels, but source has; labels in both work, and "
                f"{NO_LABELS}"
            )
        return
    names = _named(source, labels, classes)
    if classes is None:
        numbered = isinstance(labels.values[0], int)
        known = labels.names if numbered and labels.names else _in_order(set(names), numbered)
        source.classes = tuple(known)
    else:
        if unknown := sorted(set(names) - set(classes)):
            raise UserError(
                f"{source.title} has the label {few(unknown, 3)}, which is none of source's "
                f"({few(classes)}); the same classes in both work, and {NO_LABELS}"
            )
        source.classes = classes
    position = {name: index for index, name in enumerate(source.classes)}
    source.labels = np.array([position[name] for name in names], np.int64)


def _named(source: GivenSource, labels: Labels, classes: tuple[str, ...] | None) -> list[str]:
    """Each image's class by name. Numbers without names have those of the training images."""
    if isinstance(labels.values[0], str):
        return [str(value) for value in labels.values]
    names = labels.names
    if names is None and classes and not all(name.isdigit() for name in classes):
        names = classes
    if names is None:
        return [str(value) for value in labels.values]
    largest = max(int(value) for value in labels.values)
    if largest >= len(names):
        raise UserError(
            f"{source.title} has the label {largest}, but {len(names)} names of classes; labels "
            f"from 0 to {len(names) - 1} work, and {NO_LABELS}"
        )
    return [names[int(value)] for value in labels.values]


def _in_order(names: set[str], numbered: bool) -> list[str]:
    return sorted(names, key=int) if numbered else sorted(names)
