"""Images from Python: what is taken for an image and a label, and what is answered otherwise."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.fingerprint import fingerprint
from sacl_fast.data.images.given import Given, GivenSource
from sacl_fast.data.images.given_item import pixels_of
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.images.splits import few
from sacl_fast.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
LABELS = [1, 0, 1, 2, 0, 2]


class Items:
    """Counts how often each is read."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items, self.reads = items, [0] * len(items)
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


class Feature:
    names = ("cat", "dog", "owl")


class Table(Items):
    """As a ``datasets.Dataset``: rows by number, columns by name."""

    features = {"image": object(), "label": Feature()}  # noqa: RUF012

    def __getitem__(self, index: Any) -> Any:
        return [row[index] for row in self.items] if isinstance(index, str) else self.items[index]


def opened(source: Any, val: Any = None, **settings: Any):
    return open_sources(DataConfig(**settings), 0, given=Given(source, val))


def pairs(labels: Any = LABELS) -> list[tuple[Any, Any]]:
    return [(Image.fromarray(p), label) for p, label in zip(PIXELS, labels, strict=True)]


@pytest.mark.parametrize(
    "items",
    [
        PIXELS,
        list(PIXELS),
        [Image.fromarray(p) for p in PIXELS],
        pairs(),
        [{"img": p, "fine_label": 3} for p in PIXELS],
        [{"x": p, "what": "?"} for p in PIXELS],
        [(torch.from_numpy(p), torch.tensor(1)) for p in PIXELS],
    ],
)
def test_the_pixels_are_the_images(items: Any) -> None:
    source = opened(items).train
    assert len(source) == 6 and source.decoded
    for i in range(6):
        assert (source.read(np.int64(i)) == PIXELS[i]).all()  # type: ignore[arg-type]
        assert source.load(i).size == (7, 5)
    assert source.name(3) == "source[3]"


def test_other_modes_become_rgb() -> None:
    gray = PIXELS[0, ..., 0]
    for item in (gray, Image.fromarray(gray)):
        assert (pixels_of(item) == gray[..., None]).all() and pixels_of(item).shape == (5, 7, 3)
    assert pixels_of(Image.fromarray(PIXELS[0]).convert("RGBA")).shape == (5, 7, 3)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (torch.zeros(3, 4, 4), "float32 of shape (3, 4, 4).*without ToTensor"),
        (PIXELS[0].transpose(2, 0, 1), "uint8 of shape (3, 5, 7)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        ({"a": 1, "b": 2}, "no 'image' among a, b"),
        ((), "empty"),
        ("a.png", "'a.png'"),
        (None, "None"),
    ],
)
def test_what_is_no_image_is_unreadable(item: Any, said: str) -> None:
    pattern = said.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(BadImage, match=pattern):
        pixels_of(item)
    source = opened([PIXELS[0], item, PIXELS[1]]).train
    with pytest.raises(BadImage, match=pattern):
        source.read(1)
    assert fingerprint(source)


def test_an_item_that_raises_is_unreadable_and_says_why() -> None:
    items = Items([*pairs(), KeyError("gone")], targets=[*LABELS, 1])
    source = opened(items).train
    with pytest.raises(BadImage, match="KeyError: 'gone'"):
        source.load(6)
    assert source.label(6) == 1


@pytest.mark.parametrize(
    ("items", "names", "labels"),
    [
        (pairs(), ("0", "1", "2"), LABELS),
        (pairs([5, 10, 5, 7, 7, 10]), ("5", "7", "10"), [0, 2, 0, 1, 1, 2]),
        (pairs(["b", "a", "b", "c", "a", "a"]), ("a", "b", "c"), [1, 0, 1, 2, 0, 0]),
        (pairs(np.array(LABELS)), ("0", "1", "2"), LABELS),
        (Items(pairs(), targets=torch.tensor(LABELS), classes=list("xyz")), tuple("xyz"), LABELS),
        (Items(list(PIXELS), labels=LABELS), ("0", "1", "2"), LABELS),
        # Names that are not one for each class are none.
        (Items(pairs(), targets=LABELS, classes=list("xxz")), ("0", "1", "2"), LABELS),
        (
            Table([{"image": p, "label": y} for p, y in pairs()]),
            ("cat", "dog", "owl"),
            LABELS,
        ),
        (torch.utils.data.Subset(Items(pairs(), targets=LABELS), [3, 1]), ("0", "2"), [1, 0]),  # type: ignore[arg-type]
        ([(p, {"boxes": []}) for p in PIXELS], (), [-1] * 6),
        (pairs([None] * 6), (), [-1] * 6),
    ],
)
def test_labels(items: Any, names: tuple[str, ...], labels: list[int]) -> None:
    source = opened(items).train
    assert source.classes == names
    assert source.labels.tolist() == labels == [source.label(i) for i in range(len(source))]
    without = opened(items, labels="none").train
    assert without.classes == () and set(without.labels.tolist()) == {-1}


MANY = [(PIXELS[i % 6], i) for i in range(65)]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (pairs([0.5] * 6), r"source\[0\] has 0.5 in its label's place; labels work that are whole"),
        (pairs([None, 0.5] * 3), r"source\[0\] has None in its label's place"),
        (pairs([True, False] * 3), r"source\[0\] has True in"),
        (pairs(np.array([True, False] * 3)), r"has (np.)?True_? in"),
        (pairs([np.float64(1)] * 6), r"1.0\)? in"),
        (pairs([np.array([0, 1])] * 6), r"array\(\[0, 1\]\) in"),
        (pairs([torch.tensor([3])] * 6), r"tensor\(\[3\]\) in"),
        (pairs([torch.tensor(True)] * 6), r"tensor\(True\) in"),
        (pairs([{"boxes": []}] * 6), r"{'boxes': \[\]} in"),
        (pairs(list(PIXELS)), r"has array\(.* in its label's place"),
        ([{"image": p, "label": 0.5} for p in PIXELS], r"has 0.5 in"),
        # What is beside the items does not count where the items have other things.
        (Items(pairs([{}] * 6), targets=[f"{i}.xml" for i in range(6)]), r"has {} in"),
        (pairs([-1] * 6), "all labels of source are -1"),
        (Items(list(PIXELS), labels=np.full(6, -1)), "all labels of source are -1"),
        (MANY, r"each image of source has a label of its own \(source\[0\] has 0\)"),
        ([(p, f"{i}.jpg") for p, i in MANY], r"a label of its own \(source\[0\] has '0.jpg'\)"),
    ],
)
def test_what_is_no_label_is_said(items: Any, said: str, caplog) -> None:
    source = opened(items).train
    assert source.classes == () and set(source.labels.tolist()) == {-1}
    line = next(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert re.match(f"source counts as unlabelled: .*{said}", line) and "\n" not in line
    caplog.clear()
    opened(items, labels="none")
    assert not caplog.records


def test_where_there_is_no_place_for_labels_nothing_is_said(caplog) -> None:
    for items in (PIXELS, [(p,) for p in PIXELS], [{"image": p} for p in PIXELS]):
        assert opened(items).train.classes == ()
    assert not caplog.records


def test_the_items_say_what_their_labels_are() -> None:
    """An attribute that says otherwise, as where labels are transformed, is not gone by."""
    source = opened(Items(pairs([5, 5, 5, 7, 7, 7]), targets=LABELS)).train
    assert source.classes == ("5", "7") and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert opened(MANY[:64]).train.classes == tuple(str(i) for i in range(64))


def test_labels_beside_the_items_cost_no_reading() -> None:
    many = [(p, i % 2) for i, p in enumerate(np.repeat(PIXELS, 50, 0))]
    cheap, dear = Items(many, targets=[label for _, label in many]), Items(many)
    assert (opened(cheap).train.labels == opened(dear).train.labels).all()
    assert sum(cheap.reads) < 80 and min(dear.reads) == 1


def test_an_item_without_a_label_because_it_is_unreadable() -> None:
    source = opened(Items([*pairs()[:4], OSError("x"), *pairs()[4:]])).train
    assert source.classes == ("0", "1", "2")
    with pytest.raises(BadImage, match="OSError: x"):
        source.read(4)


def test_validation_images_have_the_classes_of_training() -> None:
    train = Items(pairs(), targets=LABELS, classes=["x", "y", "z"])
    val = Items(pairs(), targets=LABELS, classes=["z", "x", "y"])
    splits = opened(train, val)
    assert splits.val is not None and splits.val.classes == ("x", "y", "z")
    assert splits.val.labels.tolist() == [0, 2, 0, 1, 2, 1]
    splits = opened(train, pairs())  # numbers without names are those of training
    assert splits.val is not None and splits.val.labels.tolist() == LABELS
    assert opened(list(PIXELS), pairs()).val is None
    assert opened(train, pairs(), labels="none").val is None


def test_a_source_of_the_package_is_taken_as_it_is() -> None:
    source = ArraySource("mine", PIXELS, LABELS, ("a", "b", "c"))
    assert opened(source, source).train is source
    assert opened(source, labels="none").train.classes == ()
    assert len(opened(PIXELS, limit=4).train) == 4


def test_labels_of_any_characters() -> None:
    odd = opened([(p, "\ud800b\n"[i % 2 :]) for i, p in enumerate(PIXELS)]).train
    assert len(fingerprint(odd)) == 32 and few(odd.classes) == r"b\n, \ud800b\n"


def test_the_fingerprint_tells_data_sets_apart() -> None:
    other = PIXELS.copy()
    other[3, 0, 0, 0] ^= 1
    prints = [fingerprint(opened(x).train) for x in (PIXELS, PIXELS.copy(), other, PIXELS[::-1])]
    assert prints[0] == prints[1] and len(set(prints)) == 3


class Changing(Items):
    def __getitem__(self, index: int) -> Any:
        return (super().__getitem__(index) + self.reads[index]).astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "val", "settings", "said"),
    [
        ([], None, {}, "source holds no images"),
        ({"train": PIXELS}, None, {}, "source is a mapping of train; one of its values works"),
        ("photos", None, {}, "'photos', which has no images by index"),
        (iter(PIXELS), None, {}, "no images by index"),
        (torch.utils.data.Dataset(), None, {}, "no length"),
        (PIXELS[0], None, {}, "source is one image"),
        ([1, 2], None, {}, r"source holds no image that can be read, for source\[0\]: it is 1"),
        (Items([OSError("gone")] * 3), None, {}, "OSError: gone"),
        (Changing(list(PIXELS)), None, {}, "another image each time it is read"),
        (None, PIXELS, {}, "val= was given without source="),
        (PIXELS, None, {"labels": "folder"}, "data.labels is folder"),
        (pairs([0, 1, -1, 0, 0, 0]), None, {}, r"label of source\[2\] is -1"),
        (pairs([0, 1, "a", 0, 0, 0]), None, {}, "some labels of source are numbers"),
        (pairs([0, 1, None, 0, 0, 0]), None, {}, r"label of source\[2\] is None"),
        (pairs([None, 1, 0, 0, 0, 0]), None, {}, r"label of source\[0\] is None"),
        (pairs([0, 1, True, 0, 0, 0]), None, {}, r"label of source\[2\] is True"),
        ([*pairs(), PIXELS[0]], None, {}, r"label of source\[6\] is missing; a whole number"),
        (Items(pairs([0, None] * 3), targets=LABELS), None, {}, r"source\[1\] is None"),
        (Items(pairs(), targets=LABELS, classes=["x", "y"]), None, {}, "the label 2, but 2 names"),
        (pairs(), list(PIXELS), {}, "val has no labels, but source has"),
        (pairs(), pairs([0, 1, 9, 9, 8, 0]), {}, "val has the label 8, 9, which is none"),
    ],
)
def test_one_sentence(source: Any, val: Any, settings: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        opened(source, val, **settings)


def test_no_command_opens_images_from_python() -> None:
    with pytest.raises(UserError, match="given again, by the argument source="):
        open_sources(DataConfig(source="python"), 0)


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="datasets is not installed")
def test_a_hugging_face_data_set() -> None:
    import datasets  # pyright: ignore[reportMissingImports]

    names = ["cat", "dog", "owl"]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    columns = {"image": [image for image, _ in pairs()], "label": LABELS}
    table = datasets.Dataset.from_dict(columns, features=features)
    source = opened(table).train
    assert source.classes == tuple(names) and source.labels.tolist() == LABELS
    assert (source.read(2) == PIXELS[2]).all()
    with pytest.raises(UserError, match="mapping of train"):
        opened(datasets.DatasetDict(train=table))


def test_what_is_read_is_looked_at_when_it_is_made() -> None:
    items = Items(list(PIXELS))
    GivenSource(items, "mine")
    assert max(items.reads) <= 3
