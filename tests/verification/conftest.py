"""As at the start of a process of a user of whose machine nothing is known yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sacl_fast.ops import backend as backends
from sacl_fast.ops import self_check_process
from tests.checking import CHILD, Children, forget


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As at the start of a process of a user who has remembered nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget(monkeypatch)
    yield
    backends._is_right.cache_clear()


@pytest.fixture
def children(anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    monkeypatch.setattr(self_check_process, "_CHILD", CHILD)
    return Children(tmp_path, monkeypatch)
