"""The labels of images that are given from Python.

A label is a whole number from 0 on (of Python's, numpy's or a tensor's without dimensions), or a
text. With anything else in their place the images count as unlabelled, and the log says so: with a
float, a truth value, None, an array, boxes; with -1 throughout, as torchvision and Hugging Face
mark what has no label; and where each of many images has a label of its own, which is its number or
its name. Some labels that are none among others that are is an error.

The items tell what is a label. Where labels cost nothing (a column of a Hugging Face data set, an
attribute ``targets`` or ``labels`` (N), as torchvision's data sets have it), and some items agree,
they are taken from there. Else every item is read once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sacl_fast.checks import shown
from sacl_fast.data.images.given_item import LABEL_KEYS, MISSING, first_key, plain_label
from sacl_fast.errors import UserError

if TYPE_CHECKING:
    from sacl_fast.data.images.given import GivenSource

logger = logging.getLogger(__name__)

NO_LABELS = "data.labels none does without labels"
_WORKS = "a whole number from 0 on or a text"
_MANY = 64  # images, each of a class of its own: more are no classes


class Labels(NamedTuple):
    """What a data set says of its images' classes."""

    values: list[int] | list[str]
    names: tuple[str, ...] | None
    """Of whole numbers."""


def labels_of(source: GivenSource) -> Labels | None:
    """The labels of all images; None where there are none, which the log says unless there is
    nothing in their place.

    Raises:
        UserError: some images have one and others have not, or numbers and texts are mixed.
    """
    beside = {index: value for index, value in source.beside.items() if value is not MISSING}
    values, names = _cheap_labels(source.items, len(source)) or (None, None)
    if beside and all(plain_label(value) is None for value in beside.values()):
        index, value = next(iter(beside.items()))
        return _unused(source, f"{source.name(index)} has {_line(value)} in its label's place")
    if not beside and values is None:
        return None
    if values is None or any(plain_label(values[i]) != plain_label(v) for i, v in beside.items()):
        logger.info(
            "reading all of %s (%d) once, for their labels; an attribute targets (N) saves that",
            *(source.title, len(source)),
        )
        values = [source.read_label(index) for index in range(len(source))]
        names = _names(source.items)
    if all(plain_label(value) == -1 for value in values):
        return _unused(source, f"all labels of {source.title} are -1")
    plain = _plain(values, source)
    if len(set(plain)) == len(plain) > _MANY:
        first = f"{source.name(0)} has {shown(plain[0])}"
        return _unused(source, f"each image of {source.title} has a label of its own ({first})")
    return Labels(plain, names)


def _unused(source: GivenSource, why: str) -> None:
    logger.warning(
        "%s counts as unlabelled: %s; labels work that are whole numbers from 0 on or texts, each "
        "of several images",
        *(source.title, why),
    )


def _line(value: Any) -> str:
    return " ".join(shown(value).split())


def _cheap_labels(items: Any, count: int) -> tuple[list[Any], tuple[str, ...] | None] | None:
    """What is no more than an attribute away, and the names of classes."""
    features = getattr(items, "features", None)
    if isinstance(features, Mapping) and (key := first_key(features, LABEL_KEYS)) is not None:
        values = list(items[key])
        if len(values) == count and plain_label(values[0]) is not None:
            return values, _unique(getattr(features[key], "names", None))
    inner, indices = getattr(items, "dataset", None), getattr(items, "indices", None)
    if inner is not None and isinstance(indices, Sequence) and len(indices) == count:
        found = _cheap_labels(inner, len(inner))  # torch.utils.data.Subset
        if found is None:
            return None
        return [found[0][index] for index in indices], found[1]
    for name in ("targets", "labels"):
        values = getattr(items, name, None)
        if values is not None and hasattr(values, "__len__") and len(values) == count:
            values = list(values)
            if plain_label(values[0]) is not None:
                return values, _names(items)
    return None


def _names(items: Any) -> tuple[str, ...] | None:
    return _unique(getattr(items, "classes", None))


def _unique(names: Any) -> tuple[str, ...] | None:
    """Names of classes, if that is what they are."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names) if names and len(set(names)) == len(names) else None


def _plain(values: Sequence[Any], source: GivenSource) -> list[int] | list[str]:
    plain: list[Any] = []
    for index, value in enumerate(values):
        found = plain_label(value)
        if found is None or (isinstance(found, int) and found < 0):
            raise UserError(
                f"the label of {source.name(index)} is {_line(value)}; {_WORKS} works, "
                f"and {NO_LABELS}"
            )
        plain.append(found)
    kinds = {type(value) for value in plain}
    if len(kinds) > 1:
        raise UserError(
            f"some labels of {source.title} are numbers and some are texts; one of the two works, "
            f"and {NO_LABELS}"
        )
    return plain
