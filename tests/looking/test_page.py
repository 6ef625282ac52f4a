"""The page and the pictures: what is in the HTML, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.config.looking import FeaturesConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.looking import html
from sacl_fast.looking.features import Features
from sacl_fast.looking.page import grid_of, look_at, page_of, picture_of
from sacl_fast.looking.pictures import drawn_names, grid_png

SETTINGS = FeaturesConfig(queries=5, neighbours=3, shown=9, clusters=3)


class Page(HTMLParser):
    """What a page holds, as a browser's parser reads it."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._script = False
        self.feed(content.decode("ascii"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture
def found(awkward: Path) -> Features:
    """Features of the images with awkward names, two of which are the same in each class."""
    source = open_sources(DataConfig(root=str(awkward)), 0).train
    index = np.array([i for i in range(len(source)) if not source.name(i).endswith("broken.png")])
    features = np.random.default_rng(0).random((len(index), 6), np.float32)
    names = [os.path.basename(source.name(i)) for i in index]
    for cls in (0, 1):
        here = source.labels[index] == cls
        one, two = (int(np.flatnonzero(here & [n == s for n in names])[0])
                    for s in ("one.png", "two.png"))  # fmt: skip
        features[two] = features[one]
    labels = source.labels[index]
    splits, said = np.zeros(len(index), np.int8), {"encoder": "<b>", "data": {"root": "'\"&"}}
    return Features(features, labels, source.classes, splits, index, said, {}, (source, None))


def unlabelled(found: Features) -> Features:
    return replace(found, labels=np.full(len(found), -1), classes=())


@pytest.mark.parametrize("labels", [True, False])
def test_everything_is_inside_and_names_are_text(found, labels):
    found = found if labels else unlabelled(found)
    content = page_of(found, look_at(found, SETTINGS, quiet=True), SETTINGS)
    page = Page(content)
    assert [tag for tag, _ in page.tags if tag in ("b", "iframe", "object")] == []
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) >= 5 * 4
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
    jpegs = [image["jpeg"] for image in page.data["images"]]
    for source in [*sources, *(f"data:image/jpeg;base64,{jpeg}" for jpeg in jpegs)]:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        image.load()
        assert image.format == "JPEG" and max(image.size) <= 64
    titles = {attrs.get("title") for tag, attrs in page.tags if tag == "figure"}
    named = {image["name"] for image in page.data["images"]} | titles
    assert any("<img src=x onerror=window.broken=1>.png" in str(name) for name in named)
    assert len(page.scripts) == 2 and "http" not in page.text
    assert ("of the same class" in page.text) == labels
    assert ("clusters, for want of labels" in page.text) != labels
    assert len(content) < 4096 * (9 + 5 * 4 + 2 * 24) + 64 * 1024


def test_duplicates_are_found(found):
    look = look_at(found, replace(SETTINGS, shown=20), quiet=True)
    names = [{os.path.basename(found.name(i)) for i in pair} for pair in look.alike]
    assert names.count({"one.png", "two.png"}) == 2


def test_thumbnails_are_small_whatever_the_image():
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    for image in (Image.fromarray(noise), Image.new("L", (1, 500)), Image.new("RGB", (3, 3))):
        assert len(html.thumbnail(image)) <= 4096


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("labels", [True, False])
def test_few_images(made, n, labels):
    named = (np.arange(n) % 2, ("a", "b")) if labels else ()
    found = made(np.eye(3)[:n], *named)
    look = look_at(found, SETTINGS, quiet=True)
    assert len(Page(page_of(found, look, SETTINGS)).data["images"]) == n
    assert picture_of(found, look) and grid_of(found, look)


@pytest.mark.parametrize("count", [2, 10, 100, 1000])
def test_pictures_of_few_and_many_classes(made, count, recwarn):
    rng = np.random.default_rng(0)
    labels = np.arange(max(count, 60)) % count
    labels[:2] = -1
    classes = tuple(f"_cl$ass_{i} \udcff 日" for i in range(count))
    found = made(rng.random((len(labels), 4)), labels, classes)
    look = look_at(found, SETTINGS, quiet=True)
    image = Image.open(io.BytesIO(picture_of(found, look)))
    assert image.size == (1045, 748)
    grid_of(found, look)
    page = Page(page_of(found, look, SETTINGS))
    assert len(page.data["groups"]) == len({*labels[look.shown]} - {-1})
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_names_are_drawn_as_they_are_or_as_a_number():
    assert drawn_names(["Äpfel", "плющ", "猫", "a\udcff"]) == [
        "Äpfel", "плющ", "class 2", "a\\udcff",
    ]  # fmt: skip
    tile = Image.new("RGB", (9, 9))
    grids = {name: grid_png([[(tile, name, False)]]) for name in ("Äpfel", "Apfel", "?pfel")}
    assert len({*grids.values()}) == 3


def test_a_browser_shows_it_without_errors(found, browser, tmp_path):
    path = tmp_path / "page & #1.html"
    look = look_at(found, SETTINGS, quiet=True)
    path.write_bytes(page_of(found, look, SETTINGS))
    browser.open(path)
    assert browser.errors() == []
    assert browser.run("return window.broken") is None
    tiles = "[...document.querySelectorAll('#tiles button')]"
    assert browser.run(f"return {tiles}.length") == 9
    loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    assert browser.run(f"return {loaded}")
    # A click shows an image and its neighbours; a dot does the same.
    browser.run(f"{tiles}[4].click()")
    name = browser.run("return JSON.parse(document.getElementById('data').textContent).images[4]")
    assert browser.run("return document.querySelector('#panel h3').textContent") == name["name"]
    assert browser.run("return document.querySelectorAll('#panel button').length") == 3
    browser.run("document.querySelectorAll('.dot')[2].dispatchEvent(new MouseEvent('click'))")
    assert browser.run(f"return {tiles}.findIndex(t => t.ariaPressed === 'true')") == 2
    # Arrow keys go from tile to tile, Enter chooses.
    browser.run(f"{tiles}[0].focus()")
    browser.press("\ue014")
    browser.press("\ue007")
    assert browser.run(f"return {tiles}.findIndex(t => t.ariaPressed === 'true')") == 1
    # The filter leaves one class.
    browser.run("const f = document.getElementById('filter'); f.value = '0';"
                "f.dispatchEvent(new Event('change'))")  # fmt: skip
    left = browser.run(f"return {tiles}.filter(t => t.offsetWidth).length")
    of_first = sum(look.groups[i] == look.groups[look.shown[0]] for i in look.shown)
    assert 0 < left < 9 and left in (of_first, 9 - of_first)
    assert browser.run("return document.getElementById('count').textContent") == (
        f"{left} of 9 images"
    )
    for width in (380, 1400):  # no scrolling sideways
        browser.open(path, width)
        assert browser.run(
            "return document.documentElement.scrollWidth <= Math.max(innerWidth, 500)"
        )
    assert browser.errors() == []
