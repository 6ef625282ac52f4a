"""Which loader makes the views, and what is said about it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sacl_fast.config import Backend, Config, DaliConfig, DataConfig, ViewsConfig
from sacl_fast.config.choices import LoaderName
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading import open as module
from sacl_fast.data.loading.open import dali_obstacle, open_view_loader, resolve_loader
from sacl_fast.data.loading.torchvision_stream import PillowStream, TorchvisionStream
from sacl_fast.data.views.operator import why_not_compiled
from sacl_fast.errors import UserError
from sacl_fast.ops.compiled import obstacle

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
    for why_not, said in ((None, "operator augments"), ("old", "decodes and augments.*old")):
        monkeypatch.setattr(module, "why_not_compiled", lambda *_, now=why_not: now)
        loader, reason = resolve_loader(settings(size=32), GPU)
        assert loader == "dali" and re.search(said, reason)
    for compiled, small in ((True, "dali"), (False, "torchvision")):
        monkeypatch.setattr(module, "are_compiled", lambda *_, now=compiled: now)
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
@pytest.mark.parametrize("built", [True, False])
def test_without_dali_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cuda: str,
    package: str,
    built: bool,
    folder: Path,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert package in resolve_loader(settings(), CPU).reason
    with pytest.raises(UserError, match=f"data.loader is dali, but .*{package}"):
        resolve_loader(settings("dali"), CPU)
    source = open_sources(DataConfig(root=str(folder)), 0).train
    config = Config(batch_size=2, data=DataConfig(workers=0))
    monkeypatch.setattr(module, "are_compiled", lambda *_: built)
    with caplog.at_level(logging.INFO):
        loader = open_view_loader(source, config, device=CPU)
    assert type(loader._stream) is (PillowStream if built else TorchvisionStream)
    assert f"pip install {package}" in caplog.text


def test_a_dali_that_does_not_import_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libdali.so: cannot open shared object file")

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(module.importlib, "import_module", broken)
    loader, reason = resolve_loader(settings(), CPU)
    assert loader in ("pillow", "torchvision")
    assert "libdali.so" in reason


def test_pillow_decodes_where_dali_is_missing_and_the_operator_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "dali_obstacle", lambda: "no DALI")
    for built, loader in ((None, "pillow"), ("not built", "torchvision")):
        monkeypatch.setattr(module, "are_compiled", lambda *_, now=built: now is None)
        monkeypatch.setattr(module, "why_not_compiled", lambda *_, now=built: now)
        for device in (CPU, GPU):
            assert resolve_loader(settings(), device) == (loader, "no DALI")
    with pytest.raises(UserError, match=r"loader is pillow, .*\(not built\); .*torchvision works"):
        resolve_loader(settings("pillow"), GPU)


def test_a_backend_of_another_device_decides_nothing() -> None:
    """Beside a GPU, ``pillow`` has the CPU make the views, whatever the operators of the step."""
    for backend in ("triton", "cuda"):
        assert bool(why_not_compiled(settings(backend=backend), CPU)) == bool(obstacle())
    assert why_not_compiled(settings(backend="torch"), CPU) == "backend torch"


def test_the_operator_alone_makes_views_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"cpu": True, "cuda": True}
    reasons = {True: None, False: "not built"}
    monkeypatch.setattr(module, "are_compiled", lambda _, device: built[device.type])
    monkeypatch.setattr(module, "why_not_compiled", lambda _, device: reasons[built[device.type]])
    monkeypatch.setattr(module, "dali_obstacle", lambda: None)

    def auto(device: torch.device, backend: Backend = "auto") -> str:
        return resolve_loader(settings(backend=backend), device, packed=True).loader

    assert auto(CPU) == auto(GPU) == "compiled"
    assert auto(CPU, "torch") == "torchvision"
    built["cuda"] = False
    assert (auto(CPU), auto(GPU)) == ("compiled", "dali")
    monkeypatch.setattr(module, "dali_obstacle", lambda: "no DALI")
    assert (auto(CPU), auto(GPU)) == ("compiled", "compiled")
    built["cpu"] = False
    assert auto(CPU) == auto(GPU) == "torchvision"
    for loader in ("torchvision", "pillow"):
        monkeypatch.setattr(module, "why_not_compiled", lambda *_: None)
        assert resolve_loader(settings(loader), CPU, packed=True).loader == loader


def test_compiled_is_for_pixels_and_needs_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"loader is compiled, which is for .*auto works.* cache"):
        resolve_loader(settings("compiled"), CPU)
    monkeypatch.setattr(module, "why_not_compiled", lambda *_: "not built")
    with pytest.raises(
        UserError, match=r"loader is compiled, .*\(not built\); .*torchvision works"
    ):
        resolve_loader(settings("compiled"), CPU, packed=True)


def test_pillow_is_not_for_the_backend_torch() -> None:
    with pytest.raises(UserError, match=r"loader is pillow, .*\(backend torch\)"):
        resolve_loader(settings("pillow", backend="torch"), CPU)


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
