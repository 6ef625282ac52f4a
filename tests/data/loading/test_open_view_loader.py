"""Which loader makes the views, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sacl_fast.config import Backend, Config, DaliConfig, DataConfig, ViewsConfig
from sacl_fast.config.choices import LoaderName
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading import open as module
from sacl_fast.data.loading.open import dali_obstacle, open_view_loader, resolve_loader
from sacl_fast.data.loading.torchvision_stream import TorchvisionStream
from sacl_fast.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    dali_obstacle.cache_clear()
    yield
    dali_obstacle.cache_clear()


def settings(loader: LoaderName = "auto", size: int = 224, backend: Backend = "auto") -> Config:
    return Config(
        data=DataConfig(loader=loader),
        views=ViewsConfig(size=size),
        backend=backend,
    )


def test_auto_takes_dali_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "dali_obstacle", lambda: None)
    compiled_views = pytest.importorskip("sacl_fast.data.views.compiled", exc_type=ImportError)
    assert resolve_loader(settings(size=32), GPU).loader == "dali"
    for compiled, small in ((True, "dali"), (False, "torchvision")):
        monkeypatch.setattr(compiled_views, "are_compiled", lambda *_, now=compiled: now)
        assert resolve_loader(settings(), CPU).loader == "dali"
        assert resolve_loader(settings(size=64), CPU).loader == "dali"
        assert resolve_loader(settings(size=32), CPU).loader == small
    assert resolve_loader(settings("dali", 32), CPU).loader == "dali"
    assert resolve_loader(settings("torchvision"), GPU).loader == "torchvision"
    assert resolve_loader(settings(backend="torch"), CPU) == ("torchvision", "backend torch")
    assert resolve_loader(settings("dali", backend="torch"), CPU).loader == "dali"


@pytest.mark.parametrize(
    ("cuda", "package"),
    [
        ("13.0", "nvidia-dali-cuda130"),
        ("12.6", "nvidia-dali-cuda120"),
        (None, "nvidia-dali-cuda130"),
    ],
)
def test_without_dali_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cuda: str, package: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert package in resolve_loader(settings(), CPU).reason
    with pytest.raises(UserError, match=f"data.loader is dali, but .*{package}"):
        resolve_loader(settings("dali"), CPU)
    source = ArraySource("x", np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, ())
    config = Config(batch_size=2, data=DataConfig(workers=0))
    with caplog.at_level(logging.INFO):
        loader = open_view_loader(source, config, device=CPU)
    assert type(loader._stream) is TorchvisionStream
    assert f"pip install {package}" in caplog.text


def test_a_dali_that_does_not_import_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libdali.so: cannot open shared object file")

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(module.importlib, "import_module", broken)
    loader, reason = resolve_loader(settings(), CPU)
    assert loader == "torchvision"
    assert "libdali.so" in reason


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": -2}, "threads is -2"),
        ({"readers": -2}, "readers is -2"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"memory": 0.0}, "memory is 0"),
        ({"hw_decoder_load": 1.5}, "hw_decoder_load is 1.5"),
    ],
)
def test_options_are_checked(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"data.dali.{named}"):
        DaliConfig(**options)
