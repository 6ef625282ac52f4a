"""Draws of a batch where the compiled operator and numpy do not agree, or it is not there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from sacl_fast.data.views import draws as module
from sacl_fast.data.views.draws import agrees_with_numpy, draw_rows, drawn_by_numpy
from sacl_fast.data.views.tables import IMAGENET
from sacl_fast.ops import compiled, self_check
from sacl_fast.ops.self_check import Outcome

INDEX, SIZES = np.arange(9), np.full((9, 2), 40)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    module._is_used.cache_clear()
    yield
    module._is_used.cache_clear()


@pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
def test_another_numpy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A numpy of which ``permutation`` takes its words in another way."""
    of_before = module._compiled

    def drawn_otherwise(*given: object, threads: int) -> Tensor:
        rows = of_before(*given, threads=threads)  # type: ignore[arg-type]
        rows[0, -1, 5:7] = rows[0, -1, 5:7].flip(0)
        return rows

    assert agrees_with_numpy()
    monkeypatch.setattr(module, "_compiled", drawn_otherwise)
    assert not agrees_with_numpy()


def test_where_the_self_check_failed_numpy_draws(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = Outcome("failed", "it does not draw what numpy 9 does", time.time())
    monkeypatch.setitem(self_check._found, "cpu", {"draw_views cpu": failed})
    monkeypatch.setattr(self_check, "_warned", set())
    monkeypatch.setattr(module, "_compiled", None)
    expected = drawn_by_numpy(IMAGENET, 1, 2, INDEX, SIZES)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(draw_rows(IMAGENET, 1, 2, INDEX, SIZES), expected)
    if compiled.obstacle() is None:
        (line,) = caplog.messages
        assert "plain numpy does it" in line


def test_without_the_module_numpy_draws(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "obstacle", lambda: "not built")
    expected = drawn_by_numpy(IMAGENET, 1, 2, INDEX, SIZES)
    assert torch.equal(draw_rows(IMAGENET, 1, 2, INDEX, SIZES), expected)
    assert not caplog.messages
