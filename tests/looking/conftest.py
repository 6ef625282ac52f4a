"""Features of small images, a folder of awkward names, and a browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sacl_fast.data.images.source import ArraySource
from sacl_fast.looking.features import Features

MakeFeatures = Callable[..., Features]


@pytest.fixture
def made() -> MakeFeatures:
    """Makes features (N, F) of images of noise, in memory."""

    def make(features: np.ndarray, labels: Any = None, classes: tuple[str, ...] = ()) -> Features:
        n = len(features)
        labels = np.full(n, -1) if labels is None else np.asarray(labels)
        pixels = np.random.default_rng(0).integers(0, 256, (n, 12, 12, 3), np.uint8)
        source = ArraySource("noise", pixels, labels, classes)
        return Features(
            np.asarray(features, np.float32), labels, classes, np.zeros(n, np.int8),
            np.arange(n), {"encoder": "none"}, {}, (source, None),
        )  # fmt: skip

    return make


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """Images in two classes whose names would break a page, a table or a path; one is no image,
    two are the same."""
    rng = np.random.default_rng(0)
    root = os.fsencode(tmp_path / "awkward")
    names = [b"<img src=x onerror=window.broken=1>.png", b"a'b\"c&amp;.png", b"\xff\xfe.png"]
    names += ["\u2028$x$ _日本.png".encode(), b"]]><!--.png", b"one.png", b"two.png"]
    for nth, folder in enumerate((b"<script>window.broken=1", b"_b|`$y$")):
        os.makedirs(os.path.join(root, folder))
        for name in names:
            seed = nth if name in (b"one.png", b"two.png") else rng.integers(1000)
            pixels = np.random.default_rng(seed).integers(0, 200, (3, 3, 3), np.uint8)
            image = Image.fromarray(pixels + 50 * nth).resize((40, 30))
            with open(os.path.join(root, folder, name), "wb") as file:
                image.save(file, "PNG")
        with open(os.path.join(root, folder, b"broken.png"), "wb") as file:
            file.write(b"none")
    return Path(os.fsdecode(root))


class Browser:
    """A page in headless Chromium, driven by ChromeDriver's protocol (W3C WebDriver)."""

    def __init__(self, address: str, session: str) -> None:
        self._address = f"{address}/session/{session}"

    def open(self, path: Path, width: int = 1000) -> None:
        self.post("window/rect", {"width": width, "height": 900})
        self.post("url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        """What a function body returns in the page."""
        return self.post("execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.post("actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def errors(self) -> list[str]:
        """What the page logged since the last call."""
        return [entry["message"] for entry in self.post("se/log", {"type": "browser"})]

    def post(self, what: str, body: dict[str, Any]) -> Any:
        return call(f"{self._address}/{what}", body)


def call(address: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    chrome = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not driver or not chrome:
        pytest.skip("no Chromium with ChromeDriver here (Debian: chromium, chromium-driver)")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
        address = f"http://127.0.0.1:{next(filter(None, said))[1]}"
        folder = tmp_path_factory.mktemp("chromium")
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
        flags += "--disable-background-networking --disable-component-update --disable-sync"
        options = {"binary": chrome, "args": [*flags.split(), f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = call(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
        yield Browser(address, session["sessionId"])
        call(f"{address}/session/{session['sessionId']}", None, "DELETE")
    finally:
        process.terminate()
        process.wait()
