"""Settings of torch's that some tests of runs need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def short_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which steps are timed for no longer than one of few images takes."""
    monkeypatch.setattr("sacl_fast.engine.dry_run._TIMED", 0.1)


@pytest.fixture
def full_precision() -> Iterator[None]:
    """cuDNN's convolutions in float32, not TF32."""
    convolutions: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before
