"""Shared by all tests: which of them need a CUDA device, and where the real images are."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# What the project keeps for a user, none of it in the home of whoever runs the tests. It stays, so
# that a build's operators are checked once (``ops/self_check``), not once a process.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parent.parent / "build/cache")
if os.environ.get("TRITON_INTERPRET") == "1":  # where tests ask for kernels to look into them
    os.environ["SACL_FAST_SELF_CHECK"] = "off"

import numpy as np
import pytest
from PIL import Image

from sacl_fast.config import Config
from tests.tiny import tiny_run

# Whoever started the tests may ignore signals (nohup, a shell's background), and what they start
# would inherit that.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        interrupt = signal.default_int_handler
        signal.signal(number, interrupt if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Commands raise the log's level, which ends with the test."""
    logger = logging.getLogger("sacl_fast")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images; a test that asks for it is skipped without one."""
    given = os.environ.get("SACL_FAST_DATA")
    if not given:
        pytest.skip("SACL_FAST_DATA is not set; it names the folder with the real images")
    if not Path(given).is_dir():
        pytest.skip(f"SACL_FAST_DATA is {given}, which is not a folder")
    return Path(given).resolve()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """48 images of 20 x 20 px in two classes that differ by colour and texture."""
    rng = np.random.default_rng(0)
    for name, base in (("bright", 170), ("dark", 60)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(24):
            pixels = rng.normal(base, 40, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return tmp_path / "images"


@pytest.fixture
def tiny(image_folder: Path, tmp_path: Path) -> Config:
    """A run of a few seconds: three steps an epoch, a reading at each."""
    return tiny_run(image_folder, tmp_path / "run")
