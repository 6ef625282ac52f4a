"""Shared by all tests: which of them need a CUDA device, and where the real images are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images; a test that asks for it is skipped without one."""
    given = os.environ.get("SACL_FAST_DATA")
    if not given:
        pytest.skip("SACL_FAST_DATA is not set; it names the folder with the real images")
    if not Path(given).is_dir():
        pytest.skip(f"SACL_FAST_DATA is {given}, which is not a folder")
    return Path(given).resolve()
